"""Extraction under fire: what runs it is killed at random, and what comes out is compared with an undisturbed run.

    python benchmarks/chaos.py --minutes 10 --seed 0

A Ray cluster of several nodes and SeaweedFS, an S3 server, run on 127.0.0.1. The job, which reads videos from the
server and writes shards to it, is run round after round to new prefixes, while workers in the middle of a shard, nodes,
the driver and the server are killed; what is killed and for how long it is away follows from the seed. Nodes and the
server come back after some seconds, the driver by the same command, as a user would start it. Besides, credentials
expire, the disk for temporary files fills up (a small tmpfs, where one may be mounted), and a driver is stopped for
longer than its lease, so that another takes over and it wakes up beside that one. Among the videos are broken ones, and
one is named in the annotations but not there. In every other round one more is cut off at first; then it is put back,
the sources of all that are in shards are deleted, and the job is run with --retry-quarantined. All the while a network
is trained on shards, again and again, and killed like the rest.

Ends with a proof for every round: each catalog row is accounted for once, and all bytes are those of a run that nothing
was done to; so are the weights of every training. The exit status says whether they are.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from jobs.extraction_log import format_table
from pipelines import storage
from pipelines.datasets import shards
from pipelines.datasets.motion_videos import write_broken_videos, write_motion_videos
from pipelines.datasets.records import read_dataset
from pipelines.extraction import verify

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))  # its starters of a server and of nodes
TRAINING = ("--stream", "rgb", "--preset", "debug", "--num-workers", "1", "--num-gpus", "0", "--num-cpus", "2")
FLAGS = ("--short-side", "64", "--videos-per-shard", "2", "--flow-backend", "cpu")
BUCKET = "s3://data"
GHOST = "train/left/ghost.mp4"  # in the annotations only
KILLS = ("worker", "node", "driver", "server", "training")
TROUBLES = ("credentials", "disk", "pause")  # each a third as often as a kill of one kind
DISK_BYTES = 64 << 20  # of the tmpfs for temporary files
MAX_FAILURES = 40  # ends of the driver in a round that nobody killed: by then it does not go on by itself
REFUSED_S = 5.0  # until a driver that another run's lock refused is started again
ROUND_S = 1800.0  # without an end a round hangs
OFF_THE_RECORD = ("runs/", "lock.json", "report.html")  # what depends on the clock


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Kill at random what runs an extraction; compare the result with an undisturbed run."""

    minutes: float = 10.0
    """How long kills go on; the round that is under way then is finished."""
    kills: int = 0
    """Kills that there are to be at least, however long that takes."""
    rounds: int = 1
    """Rounds that share these, so that each can come to its end."""
    seed: int = 0
    """What is killed, when, and for how long it is away."""
    videos_per_class: int = 6
    """Good videos of each of the six classes."""
    frames: int = 200
    """Frames of each good video."""
    nodes: int = 2
    """Nodes of the cluster with one CPU each, beside the head."""
    pause_s: tuple[float, float] = (4.0, 12.0)
    """Shortest and longest time from kill to kill."""
    away_s: tuple[float, float] = (1.0, 15.0)
    """Shortest and longest time that a node or the server is away."""


def main() -> int:
    config = tyro.cli(Chaos)
    # Before ray is imported, which reads its environment once: a token of our own, all sockets on 127.0.0.1.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, running_site(Path(folder), config.nodes) as site:
        catalog = make_videos(config, site.videos)
        upload_videos(site.videos, catalog, f"{BUCKET}/videos")
        quiet = Fire(site, replace(config, kills=0), until=0.0)
        run_round(site, quiet, "undisturbed", f"{BUCKET}/videos")
        expected = Expected(catalog, hash_output("undisturbed"), train_undisturbed(site, quiet))
        print(f"undisturbed: {len(catalog)} videos, {len(expected.files)} files, a training", flush=True)
        return report(config, catalog, *run_rounds(site, config, expected))


class Site:
    """What an extraction runs on: cluster, S3 server, and the driver and the training of the moment."""

    def __init__(self, folder: Path, nodes: int, server: ExitStack, lasting: ExitStack) -> None:
        from ray_nodes import open_cluster

        self.folder, self.videos = folder, folder / "videos"
        self.driver: Process | None = None
        self.training: Process | None = None
        self.paused: Process | None = None
        self.starts = 0
        self.server, self.lasting = server, lasting
        self.proxy: Any = None
        self.start_server()
        self.disk = mount_disk(folder / "disk", lasting)
        self.cluster = open_cluster()
        os.environ["RAY_ADDRESS"] = self.cluster.address
        for _ in range(nodes):
            self.start_node()

    def start_server(self) -> None:
        """Start the S3 server on the folder and the ports that it had before, behind a proxy that stays."""
        from faulty_s3 import running_proxy
        from seaweed import running_seaweed

        server = self.server.enter_context(running_seaweed(self.folder / "s3"))
        self.proxy = self.proxy or self.lasting.enter_context(running_proxy(server.endpoint))
        os.environ |= server.environment(self.proxy.endpoint)
        self.server_process = server.process

    def start_node(self) -> None:
        from ray_nodes import persist

        persist(lambda: self.cluster.add_node(num_cpus=1))

    def start_driver(self, name: str, videos: str, *flags: str) -> Process:
        """Run the job, which writes to this prefix."""
        where = ("--videos", videos, "--annotations", f"{BUCKET}/list.csv", "--output", f"{BUCKET}/{name}")
        self.driver = self._start("extract_flow", *where, *FLAGS, *flags)
        return self.driver

    def start_training(self, name: str) -> Process:
        """Run a training on the undisturbed shards, on a Ray of its own."""
        where = ("--data", f"{BUCKET}/undisturbed", "--output", f"{BUCKET}/{name}")
        self.training = self._start("train", *where, *TRAINING, RAY_ADDRESS="")
        return self.training

    def _start(self, job: str, *flags: str, **environment: str) -> Process:
        log = self.folder / f"{job}-{self.starts}.log"
        self.starts += 1
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *flags]
        environment["PYTHONFAULTHANDLER"] = "1"
        with log.open("wb") as file:
            popen = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **environment})
        return Process(popen, log)

    def kill_worker(self, rng: random.Random) -> bool:
        """Kill a process that is making a shard, if one is."""
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.cluster.worker_nodes]
        busy = sorted(pid for raylet in raylets for pid in children(raylet) if command_of(pid).startswith("ray::Map"))
        if busy:
            os.kill(rng.choice(busy), signal.SIGKILL)
        return bool(busy)

    def kill_node(self, rng: random.Random) -> bool:
        """Kill all processes of a node, if one is there."""
        nodes = sorted(self.cluster.worker_nodes, key=lambda node: node.node_id)
        if nodes:
            self.cluster.remove_node(rng.choice(nodes), allow_graceful=False)
        return bool(nodes)

    def kill_driver(self, rng: random.Random) -> bool:
        return self.driver is not None and self.driver is not self.paused and self.driver.kill()

    def kill_training(self, rng: random.Random) -> bool:
        return self.training is not None and self.training.kill()

    def kill_server(self, rng: random.Random) -> bool:
        if self.server_process.poll() is not None:
            return False
        self.server.close()
        return True

    def expire_credentials(self, rng: random.Random) -> bool:
        self.proxy.lasting = "expired"
        return True

    def renew_credentials(self) -> None:
        self.proxy.lasting = None

    def fill_disk(self, rng: random.Random) -> bool:
        """Fill the disk for temporary files to the last byte, if there is one of its own."""
        if self.disk is None:
            return False
        with suppress(OSError), (self.disk / "full").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        return True

    def clear_disk(self) -> None:
        if self.disk is not None:
            (self.disk / "full").unlink(missing_ok=True)

    def pause_driver(self, rng: random.Random) -> bool:
        """Stop a driver that holds the lock until the round is over. A node more replaces what it has reserved."""
        if self.paused or self.driver is None or self.driver.popen.poll() is not None or not self.driver.works():
            return False
        os.kill(self.driver.popen.pid, signal.SIGSTOP)
        self.paused = self.driver
        self.start_node()
        return True

    def wake_driver(self) -> str | None:
        """Let the stopped driver go on, beside what another has done meanwhile; what is wrong with its end."""
        if self.paused is None:
            return None
        asleep, self.paused = self.paused, None
        os.kill(asleep.popen.pid, signal.SIGCONT)
        try:
            status = asleep.popen.wait(ROUND_S / 8)
        except subprocess.TimeoutExpired:
            asleep.popen.send_signal(signal.SIGABRT)  # so that it says where it stands
            asleep.popen.wait()
            stack = asleep.log.read_text(errors="replace").rpartition("Fatal Python error")[2]
            return f"a driver that slept past its lease did not end: {stack[:6000]}"
        right = status == 1 and "taken over by another run" in asleep.tail()
        return None if right else f"a driver that slept past its lease ended with {status}: {asleep.tail()}"

    def close(self) -> None:
        for process in (self.driver, self.training, self.paused):
            if process is not None and process.kill():
                process.popen.wait()
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


@dataclass(frozen=True)
class Process:
    """A job that runs, and the file of what it says."""

    popen: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> bool:
        """Whether it was alive."""
        if self.popen.poll() is not None:
            return False
        self.popen.kill()
        return True

    def works(self) -> bool:
        """Whether an extraction has begun."""
        return "to do " in self.log.read_text(errors="replace")

    def tail(self) -> str:
        """The error that it ended with, else the last line that it said: what Ray says of lost nodes may come later."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])[:500]


def mount_disk(folder: Path, lasting: ExitStack) -> Path | None:
    """A small disk for the temporary files of all jobs; None where this process may mount none."""
    os.environ["RAY_TMPDIR"] = tempfile.gettempdir()  # else Ray's own files would lie there, too
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=False)
    if mounted.returncode:
        return None
    lasting.callback(lambda: subprocess.run(["umount", "-l", folder], check=False))
    os.environ["TMPDIR"] = str(folder)
    return folder


@contextmanager
def running_site(folder: Path, nodes: int) -> Iterator[Site]:
    with ExitStack() as lasting, ExitStack() as server:  # stopped even if the cluster does not start
        site = Site(folder, nodes, server, lasting)
        try:
            yield site
        finally:
            site.close()


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    try:
        return [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except OSError:
        return []


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


class Fire:
    """Kills and other trouble until a moment, and brings back what was taken."""

    def __init__(self, site: Site, config: Chaos, *, until: float) -> None:
        self.site, self.config, self.until = site, config, until
        self.rng = random.Random(config.seed)
        self.done: Counter[str] = Counter()
        self.round = 0
        self.returning: list[tuple[float, Callable[[], None]]] = []
        self._plan_next()

    @property
    def kills(self) -> int:
        return sum(self.done[kind] for kind in KILLS)

    def burns(self) -> bool:
        """Whether it goes on in this round."""
        share = self.config.kills * (self.round + 1) / self.config.rounds
        return time.monotonic() < self.until or self.kills < min(share, self.config.kills)

    def tick(self) -> None:
        """Do what is due now."""
        self._bring_back()
        if self.burns() and self.next_at <= time.monotonic():
            kinds = [*KILLS * 3, *TROUBLES]
            self._do(self.rng.choice(kinds))
            self._plan_next()

    def rest(self) -> None:
        """Until all that was taken is back."""
        while self.returning:
            self._bring_back()
            time.sleep(0.1)
        self._plan_next()

    def _bring_back(self) -> None:
        now = time.monotonic()
        due = [action for at, action in self.returning if at <= now]
        self.returning = [(at, action) for at, action in self.returning if at > now]
        for action in due:
            action()

    def _plan_next(self) -> None:
        self.next_at = time.monotonic() + self.rng.uniform(*self.config.pause_s)

    def _do(self, kind: str) -> None:
        site = self.site
        trouble = {"credentials": site.expire_credentials, "disk": site.fill_disk, "pause": site.pause_driver}
        if not trouble.get(kind, getattr(site, f"kill_{kind}", None))(self.rng):  # type: ignore[misc]
            return
        self.done[kind] += 1
        back = {
            **{"node": site.start_node, "server": site.start_server},
            **{"credentials": site.renew_credentials, "disk": site.clear_disk},
        }
        if kind in back:
            self.returning.append((time.monotonic() + self.rng.uniform(*self.config.away_s), back[kind]))


@dataclass(frozen=True)
class Expected:
    """What every round is to end with: status of each video by path, hashes of the output and of trained weights."""

    catalog: dict[str, str]
    files: dict[str, str]
    weights: str


@dataclass(frozen=True, kw_only=True)
class Round:
    """What it took to finish one output, and what is wrong with it."""

    starts: int
    failures: tuple[str, ...]  # why a driver that nobody killed gave up
    waits: int  # reads and writes that waited for the server, as far as the drivers were told of them
    wrong: tuple[str, ...] = ()

    def __add__(self, other: Round) -> Round:
        return Round(
            starts=self.starts + other.starts,
            failures=self.failures + other.failures,
            waits=self.waits + other.waits,
            wrong=self.wrong + other.wrong,
        )


class ChaosError(RuntimeError):
    """A job does not come to its end."""


def run_rounds(site: Site, config: Chaos, expected: Expected) -> tuple[Fire, list[Round]]:
    """Extract and train again and again under fire until the time is up; each output is checked."""
    fire = Fire(site, config, until=time.monotonic() + 60 * config.minutes)
    rounds: list[Round] = []
    while len(rounds) < config.rounds or fire.burns():
        fire.round = len(rounds)
        name, training = f"round-{len(rounds)}", f"training-{len(rounds)}"
        site.start_training(training)
        if len(rounds) % 2:
            done = run_retried_round(site, fire, name, expected.catalog)
        else:
            done = run_round(site, fire, name, f"{BUCKET}/videos")
        finish_training(site, fire, training)
        fire.rest()
        woken = site.wake_driver()
        wrong = [*find_wrong(name, expected), *([woken] if woken else [])]
        if hash_weights(training) != expected.weights:
            wrong.append(f"the weights of {training} are others")
        rounds.append(replace(done, wrong=(*done.wrong, *wrong)))
        said = rounds[-1].wrong or "as undisturbed"
        print(f"{name}: {done.starts} starts, {fire.kills} kills by now, {said}", flush=True)
    return fire, rounds


def run_retried_round(site: Site, fire: Fire, name: str, catalog: dict[str, str]) -> Round:
    """One video is cut off at first; then it is put back, the others' sources go, and quarantine is tried again."""
    videos = f"{BUCKET}/{name}-videos"
    good = sorted(path for path, status in catalog.items() if status == "ok")
    fire.rest()
    upload_videos(site.videos, catalog, videos)
    whole = (site.videos / good[0]).read_bytes()
    storage.put(f"{videos}/{good[0]}", whole[: len(whole) // 3])
    done = run_round(site, fire, name, videos)
    fire.rest()
    storage.put(f"{videos}/{good[0]}", whole)
    for path in good[1:]:
        storage.delete(f"{videos}/{path}")
    return done + run_round(site, fire, name, videos, "--retry-quarantined")


def run_round(site: Site, fire: Fire, name: str, videos: str, *flags: str) -> Round:
    """Run the command until it ends well, as a user would: killed or failed, it is started again."""
    deadline = time.monotonic() + ROUND_S
    starts, waits = 0, 0
    failures: list[str] = []
    while True:
        starts += 1
        driver = site.start_driver(name, videos, *flags)
        while (status := driver.popen.poll()) is None and driver is not site.paused:
            fire.tick()
            time.sleep(0.1)
            if time.monotonic() > deadline:
                raise ChaosError(f"{name} is not done after {ROUND_S:.0f} s: {driver.tail()}")
        waits += driver.log.read_text(errors="replace").count("; trying again for up to")
        if status == 0:
            return Round(starts=starts, failures=tuple(failures), waits=waits)
        if status in (None, -signal.SIGKILL):
            continue
        if site.paused and "is being written by another run" in driver.tail():  # by the one that is asleep
            time.sleep(REFUSED_S)
            continue
        failures.append(driver.tail())
        print(f"{name}: the driver gave up: {failures[-1]}", flush=True)
        if len(failures) > MAX_FAILURES:
            raise ChaosError(f"{name} failed {len(failures)} times")


def train_undisturbed(site: Site, quiet: Fire) -> str:
    """Hash of the weights of a training that nothing was done to."""
    site.start_training("training")
    finish_training(site, quiet, "training")
    return hash_weights("training")


def finish_training(site: Site, fire: Fire, name: str) -> None:
    """Start the training again until it ends well."""
    deadline = time.monotonic() + ROUND_S
    while True:
        assert site.training is not None
        while (status := site.training.popen.poll()) is None:
            fire.tick()
            time.sleep(0.1)
            if time.monotonic() > deadline:
                raise ChaosError(f"{name} is not done after {ROUND_S:.0f} s: {site.training.tail()}")
        if status == 0:
            return
        if status != -signal.SIGKILL:
            print(f"{name}: the training gave up: {site.training.tail()}", flush=True)
        site.start_training(name)


def hash_weights(name: str) -> str:
    """sha256 of the last weights of a run."""
    from pipelines.training.trainer import read_result

    return storage.hash_file(storage.join(read_result(f"{BUCKET}/{name}").last, "weights.safetensors"))


def make_videos(config: Chaos, folder: Path) -> dict[str, str]:
    """Make good and broken videos; path of each, and of one that is not there → the status that it is to end with."""
    write_motion_videos(
        folder, videos_per_class=config.videos_per_class, seed=config.seed, num_frames=config.frames, size=(64, 48)
    )
    write_broken_videos(folder / "train" / "broken")
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.mp4"))
    statuses = {str(path): "quarantined" if path.parts[1] == "broken" else "ok" for path in paths}
    return {**statuses, GHOST: "missing"}


def upload_videos(folder: Path, catalog: dict[str, str], videos: str) -> None:
    """Put the videos that there are, and the annotations of all, on the server."""
    for path, status in catalog.items():
        if status != "missing":
            storage.put(f"{videos}/{path}", (folder / path).read_bytes())
    text = io.StringIO()
    rows = [(path, path.split("/")[1], path.split("/")[0]) for path in sorted(catalog)]
    csv.writer(text).writerows([("path", "label", "split"), *rows])
    storage.put(f"{BUCKET}/list.csv", text.getvalue().encode())


def hash_output(name: str) -> dict[str, str]:
    """sha256 of every file of an output that does not depend on the clock."""
    files = [file.path for file in storage.list_files(f"{BUCKET}/{name}") if not file.path.startswith(OFF_THE_RECORD)]
    return {file: hashlib.sha256(storage.read_bytes(f"{BUCKET}/{name}/{file}")).hexdigest() for file in files}


def find_wrong(name: str, expected: Expected) -> Iterator[str]:
    """What an output has lost, has twice, or has otherwise than the undisturbed one."""
    output, catalog = f"{BUCKET}/{name}", expected.catalog
    described = read_dataset(output)
    videos = shards.read_table(f"{output}/videos.parquet").to_pylist()
    told = Counter((video["source"] or GHOST, video["status"]) for video in videos)
    for row in sorted((told - Counter(catalog.items())) + (Counter(catalog.items()) - told)):
        yield f"{row[0]} as {row[1]} is {told[row]} times in videos.parquet"
    rows = (row for shard in described.shards for row in shards.read_rows(f"{output}/{shard.file}", ["source"]))
    in_shards = Counter((row["source"], "ok") for row in rows)
    if in_shards != Counter(video for video in catalog.items() if video[1] == "ok"):
        yield "the shards' rows are not exactly the good videos"
    found, files = hash_output(name), expected.files
    differing = sorted(file for file in found.keys() | files.keys() if found.get(file) != files.get(file))
    if differing:
        yield f"{len(differing)} files differ, such as {differing[0]}"
    for finding in [*verify.check_shards(output, described), *verify.check_tables(output, described)]:
        yield f"{finding.where}: {finding.what}"


def report(config: Chaos, catalog: dict[str, str], fire: Fire, rounds: list[Round]) -> int:
    """Print the table; the exit status."""
    statuses = Counter(catalog.values())
    equal = sum(not done.wrong for done in rounds)
    failures = Counter(reason for done in rounds for reason in done.failures)
    lines: list[tuple[str, Any]] = [
        *((f"{kind} killed", fire.done[kind]) for kind in KILLS),
        ("credentials expired", fire.done["credentials"]),
        ("disk full", fire.done["disk"] if fire.site.disk else "not tried: no disk could be mounted"),
        ("driver stopped past its lease", fire.done["pause"]),
        ("rounds, each with a training", len(rounds)),
        ("of these with sources deleted and --retry-quarantined", len(rounds) // 2),
        ("shards a round", len(read_dataset(f"{BUCKET}/undisturbed").shards)),
        ("videos a round", f"{len(catalog)} ({', '.join(f'{count} {name}' for name, count in statuses.items())})"),
        ("starts of the driver", sum(done.starts for done in rounds)),
        ("drivers that gave up", failures.total()),
        ("waits for the server that were logged", sum(done.waits for done in rounds)),
        ("every row accounted for once, all hashes equal, weights too", f"{equal} of {len(rounds)} rounds"),
    ]
    print(format_table((f"{config.minutes:g} minutes, seed {config.seed}", ""), lines))
    for done in rounds:
        for wrong in done.wrong:
            print(f"WRONG: {wrong}")
    return 0 if equal == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
