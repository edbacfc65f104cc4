"""How a job finds its Ray: the cluster it was submitted to, or one of its own on this machine.

A job calls `connect` before it imports anything that imports ray, which reads its environment once, at import. Nothing
below jobs/ reads the environment.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.errors import SettingsError
from pipelines.formatting import format_count

MEMORY_DEATHS = "3"  # ray_data.MAX_WORKER_DEATHS, which cannot be had before ray is imported


def connect(
    *, num_cpus: int | None = None, num_gpus: int | None = None, log_to_driver: bool = True, dashboard: bool = False
) -> str:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), else start Ray here, on loopback only.

    Returns a phrase about where that is. `num_cpus` sizes a Ray that is started here; on a cluster the graph limits
    itself. `num_gpus`, where given, is what that Ray takes to be there: a rehearsal pretends. Without `log_to_driver`
    what workers print stays in Ray's log files, for jobs that fetch their own lines.
    `dashboard` starts that too, on loopback as well: what asks for the state of actors needs it. Called again, it
    keeps the Ray it has.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    submitted = is_submitted()
    if not submitted:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's default, said aloud: left unset, it warns
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on Linux too this is what keeps sockets on 127.0.0.1
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a dashboard reports to Ray's authors
    # Ray counts what its memory monitor kills apart, and would let a task that is too large for a node die for ever.
    os.environ.setdefault("RAY_task_oom_retries", MEMORY_DEATHS)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's boxes, printed by verbosity 0 as well
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end a search as if its trials were done
    if not submitted:
        # Nobody takes this machine away at two minutes' notice, and its workers answer at once.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    on_stop = signal.getsignal(signal.SIGTERM)
    if ray.is_initialized():
        pass
    elif submitted:
        ray.init(logging_level=logging.WARNING, log_to_driver=log_to_driver)
    else:
        print("starting    Ray on this machine", flush=True)
        start_here({"num_cpus": num_cpus, "num_gpus": num_gpus, "log_to_driver": log_to_driver}, dashboard)
    if on_stop is signal.default_int_handler:  # Ray has put its own there, which ends the process with a stack trace
        signal.signal(signal.SIGTERM, on_stop)
    cpus, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
    place = f"a cluster of {format_count(len(ray.nodes()), 'node')}" if submitted else "this machine"
    waiting = "" if cpus else "; tasks wait for workers to come"
    return f"{place}, {format_count(cpus, 'CPU')}, {format_count(gpus, 'GPU')}{waiting}"


def is_submitted() -> bool:
    """Whether the job was given a cluster, as `ray job submit` does, rather than a Ray of its own on this machine."""
    return bool(os.environ.get("RAY_ADDRESS"))


def count_own_gpus() -> int:
    """GPUs of this machine that torch can use; no Ray is needed to ask."""
    import torch

    return torch.cuda.device_count()


def count_processors(num_workers: int | None, num_gpus: int | None) -> tuple[float, int]:
    """CPUs of the cluster now, and GPUs to use: `num_gpus` of them, or all.

    A cluster that scales itself may have no workers now, only a head on which nothing runs. Then the flags must say
    what to wait for, else SettingsError; its CPUs are taken to be one for each worker.
    """
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    if not cpus and not gpus and (num_gpus is None or not (num_workers or num_gpus)):
        raise SettingsError(
            "the cluster has no workers now, so it does not say how many to use: give --num-workers N with "
            "--num-gpus 0, or --num-gpus N, and the job waits for them to come"
        )
    gpus = gpus if num_gpus is None else num_gpus
    check_gpus(max(gpus, num_workers or 0) if gpus else 0)
    return cpus or float(num_workers or gpus), gpus


def check_counts(*, num_workers: int | None, num_cpus: int | None, num_gpus: int | None) -> None:
    """SettingsError for workers, CPUs or GPUs of which there cannot be so few."""
    for flag, count, least in (
        ("--num-workers", num_workers, 1),
        ("--num-cpus", num_cpus, 1),
        ("--num-gpus", num_gpus, 0),
    ):
        if count is not None and count < least:
            raise SettingsError(f"{flag} is {count}: give at least {least}, or leave it out for all")


def check_gpus(wanted: float) -> None:
    """SettingsError where this machine's own Ray has fewer GPUs: none will come, and Ray would wait for them."""
    import ray

    present = ray.cluster_resources().get("GPU", 0.0)
    if wanted > present and not is_submitted():
        raise SettingsError(
            f"this machine has {format_count(present, 'GPU')}, and the flags ask for {wanted:g}: "
            f"give --num-gpus (and --num-workers, "
            "where there are some) of at most as many, or --num-gpus 0 to use CPUs"
        )


def check_precision(precision: str, gpus: int) -> None:
    """SettingsError where a precision of inference wants GPUs and none will be used."""
    if precision == "fp16" and not gpus:
        raise SettingsError("--precision fp16 needs GPUs, and there are none to use: take fp32 or bf16")


def describe_workers(precision: str, num_workers: int, *, use_gpu: bool) -> str:
    """`2 GPUs, bf16, sums and logits in fp32`: what will compute, and how exactly."""
    from models import cuda

    workers = format_count(num_workers, "GPU" if use_gpu else "CPU")
    return f"{workers}, {cuda.describe(precision, training=False) if use_gpu else precision}"


def start_here(settings: dict[str, Any], dashboard: bool, *, attempts: int = 3) -> None:
    """Start Ray here. On a busy machine it may miss its own deadline of 30 s, which no setting moves: try again."""
    import ray

    settings = {**settings, "include_dashboard": dashboard}
    for left in reversed(range(attempts)):
        # For the workers, which inherit it. Untold they ask the Ray that was last started on this machine, alive or
        # not, for the state of actors: what stopped trials had reserved stays reserved, and a search waits. Where
        # there is no dashboard nobody listens at this port, and who asks knows it at once: Ray Train's end would else
        # wait some 12 s for an answer.
        port = _free_port()
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        if dashboard:
            settings["dashboard_port"] = port
        try:
            with _only_what_serves(settings):
                ray.init(address="local", logging_level=logging.WARNING, **settings)
            return
        except Exception as error:  # Ray raises no narrower one
            if left == 0 or "timed out during startup" not in str(error):
                raise
            ray.shutdown()  # knows nothing of a node that did not come up
            _end_processes(error)


@contextmanager
def _only_what_serves(settings: dict[str, Any]) -> Iterator[None]:
    """Meanwhile Ray starts no process for what its `settings` leave out, nor one that adds nodes: no setting says so.

    Each would take a second of a CPU at the start, which waits for the dashboard's server, and another at the end.
    """
    from ray._private.node import Node

    left_out = {
        "start_monitor": True,  # the autoscaler
        "start_api_server": not settings["include_dashboard"],
        "start_log_monitor": not settings["log_to_driver"],
    }
    starts = {name: getattr(Node, name) for name, without in left_out.items() if without and hasattr(Node, name)}
    for name in starts:
        setattr(Node, name, lambda self, **_: None)
    try:
        yield
    finally:
        for name, start in starts.items():
            setattr(Node, name, start)


def _end_processes(error: BaseException) -> None:
    """End what a node had started whose constructor raised: nobody holds it, and its processes live as long as ours."""
    from ray._private.node import Node

    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("self")
        if isinstance(node, Node):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
