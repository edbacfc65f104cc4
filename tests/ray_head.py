"""A head of a Ray cluster as a process of its own: token authentication on, its own home, ended by its process id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ports import free_ports

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).parent / "ray")
KERNELS = Path.home() / ".cache" / "two-stream-i3d"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Head:
    """The address of a head's job server, and the environment that its clients need."""

    address: str
    environment: dict[str, str]

    def start(self, *words: str, cwd: Path = ROOT) -> subprocess.Popen[str]:
        """A command in the cluster's environment; `words` begin with `ray` or `python`."""
        command = [{"ray": RAY, "python": sys.executable}[words[0]], *words[1:]]
        return subprocess.Popen(
            command, env=self.environment, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *words: str, cwd: Path = ROOT, timeout: float = 800) -> tuple[int, str]:
        """Exit status and output of such a command."""
        process = self.start(*words, cwd=cwd)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def submit(self, *words: str, timeout: float = 800) -> tuple[int, str]:
        """The job of these words through `ray job submit` from the project's root."""
        command = ("ray", "job", "submit", "--working-dir", ".", "--", "python", *words)
        return self.run(*command, timeout=timeout)


@contextmanager
def run_head(home: Path, *flags: str, autoscaler: dict[str, Any] | None = None, **environment: str) -> Iterator[Head]:
    """`ray start --head` with `flags` and settings of the environment, until the block is left.

    `autoscaler` is a cluster's configuration whose nodes are processes of this machine (provider fake_multinode).
    """
    port, dashboard, agent = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
    settings = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": address,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody waits for what still runs
        **environment,
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=settings, check=True, capture_output=True)
    # Of this user's home the head has the compiled flow kernels only: to compile them takes a quarter of a minute.
    KERNELS.mkdir(parents=True, exist_ok=True)
    (home / ".cache").mkdir()
    (home / ".cache" / KERNELS.name).symlink_to(KERNELS)
    temporary = Path("/tmp") / f"ray-{os.getpid()}-{port}"  # a socket's path may have 107 characters
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command = [RAY, "start", "--head", "--block", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    command += [f"--temp-dir={temporary}", *ports, *flags]
    if autoscaler:
        autoscaler["provider"]["gcs_address"] = f"{ray.util.get_node_ip_address()}:{port}"
        (home / "autoscaler.json").write_text(json.dumps(autoscaler))
        command.append(f"--autoscaling-config={home / 'autoscaler.json'}")
    process = start_head(command, settings, home / "head.log")
    try:
        wait_until_up(agent, process, home / "head.log")  # it takes the jobs that the dashboard is handed
        yield Head(address, settings)
    finally:
        process.send_signal(signal.SIGTERM)  # with --block this ends all processes of the head, and no others
        process.wait(timeout=120)
        end_nodes(temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def start_head(command: list[str], settings: dict[str, str], log: Path, attempts: int = 3) -> subprocess.Popen[bytes]:
    """The process of a head that has started. On a busy machine it may miss its own deadlines: then it starts again."""
    for left in reversed(range(attempts)):
        with log.open("w") as file:
            process = subprocess.Popen(command, env=settings, stdout=file, stderr=file, start_new_session=True)
        while "Ray runtime started" not in log.read_text():
            if process.poll() is not None:
                assert left, log.read_text()
                assert "timed out during startup" in log.read_text(), log.read_text()
                break
            time.sleep(0.5)
        else:
            return process
    raise AssertionError(log.read_text())


def end_nodes(temporary: Path) -> None:
    """Kill the processes of nodes that an autoscaler started: they are known by the head's folder, and by that only."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{temporary}/".encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


def wait_until_up(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until somebody listens on the port."""
    deadline = time.monotonic() + 180
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)


def read_job(head: Head, job: str) -> dict[str, Any]:
    """What the job server says of a job: `status`, `driver_exit_code`, `message`."""
    return _ask(head, f"/api/jobs/{job}", "GET")


def stop_job(head: Head, job: str) -> None:
    """What `ray job stop` asks the job server for, which takes seconds to be up."""
    assert _ask(head, f"/api/jobs/{job}/stop", "POST") == {"stopped": True}


def _ask(head: Head, path: str, method: str) -> dict[str, Any]:
    token = (Path(head.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{head.address}{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.loads(answer.read()))


def wait_until(true: Any, process: subprocess.Popen[str], *, timeout: float = 240) -> None:
    """Until a condition holds, while the process runs."""
    deadline = time.monotonic() + timeout
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
