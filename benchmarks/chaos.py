"""Extraction under fire: what runs it is killed at random, and what comes out is compared with an undisturbed run.

    python benchmarks/chaos.py --minutes 10 --seed 0

A Ray cluster of several nodes and SeaweedFS, an S3 server, run on 127.0.0.1. The job, which reads videos from the
server and writes shards to it, is run round after round to new prefixes, while workers in the middle of a shard, nodes,
the driver and the server are killed; what is killed and for how long it is away follows from the seed. Nodes and the
server come back after some seconds, the driver by the same command, as a user would start it. Among the videos are
broken ones, and one is named in the annotations but not there. Ends with a proof for every round: each catalog row is
accounted for once, and all bytes are those of a run that nothing was done to. The exit status says whether they are.
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
FLAGS = ("--short-side", "64", "--videos-per-shard", "2", "--flow-backend", "cpu")
BUCKET = "s3://data"
GHOST = "train/left/ghost.mp4"  # in the annotations only
KINDS = ("worker", "node", "driver", "server")
MAX_FAILURES = 10  # ends of the driver in a round that nobody killed: by then it does not go on by itself
ROUND_S = 900.0  # without an end a round hangs
OFF_THE_RECORD = ("runs/", "lock.json", "report.html")  # what depends on the clock


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """Kill at random what runs an extraction; compare the result with an undisturbed run."""

    minutes: float = 10.0
    """How long kills go on; the round that is under way then is finished."""
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
        catalog = upload_videos(config, Path(folder) / "videos")
        quiet = Fire(site, config, until=0.0)
        run_round(site, quiet, "undisturbed")
        expected = hash_output("undisturbed")
        print(f"undisturbed: {len(catalog)} videos, {len(expected)} files", flush=True)
        return report(config, catalog, *run_rounds(site, config, catalog, expected))


class Site:
    """What an extraction runs on: cluster, S3 server, and the driver of the moment."""

    def __init__(self, folder: Path, nodes: int, server: ExitStack) -> None:
        from ray_nodes import open_cluster

        self.folder = folder
        self.driver: subprocess.Popen[bytes] | None = None
        self.drivers = 0
        self.server = server
        self.start_server()
        self.cluster = open_cluster()
        os.environ["RAY_ADDRESS"] = self.cluster.address
        for _ in range(nodes):
            self.start_node()

    def start_server(self) -> None:
        """Start the S3 server on the folder and the ports that it had before."""
        from seaweed import running_seaweed

        server = self.server.enter_context(running_seaweed(self.folder / "s3"))
        os.environ |= server.environment()
        self.server_process = server.process

    def start_node(self) -> None:
        from ray_nodes import persist

        persist(lambda: self.cluster.add_node(num_cpus=1))

    def start_driver(self, name: str) -> Path:
        """Run the job, which writes to this prefix; the file of what it says."""
        log = self.folder / f"driver-{self.drivers}.log"
        self.drivers += 1
        where = ("--videos", f"{BUCKET}/videos", "--annotations", f"{BUCKET}/list.csv", "--output", f"{BUCKET}/{name}")
        command = [sys.executable, str(ROOT / "jobs" / "extract_flow.py"), *where, *FLAGS]
        with log.open("wb") as file:
            self.driver = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        return log

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
        if self.driver is None or self.driver.poll() is not None:
            return False
        self.driver.kill()
        return True

    def kill_server(self, rng: random.Random) -> bool:
        if self.server_process.poll() is not None:
            return False
        self.server.close()
        return True

    def close(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


@contextmanager
def running_site(folder: Path, nodes: int) -> Iterator[Site]:
    with ExitStack() as server:  # stopped even if the cluster does not start
        site = Site(folder, nodes, server)
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
    """Kills until a moment, and brings back what was killed."""

    def __init__(self, site: Site, config: Chaos, *, until: float) -> None:
        self.site, self.config, self.until = site, config, until
        self.rng = random.Random(config.seed)
        self.kills: Counter[str] = Counter()
        self.next_kill = time.monotonic()
        self.returning: list[tuple[float, Callable[[], None]]] = []
        self._plan_next()

    def tick(self) -> None:
        """Do what is due now."""
        now = time.monotonic()
        due = [action for at, action in self.returning if at <= now]
        self.returning = [(at, action) for at, action in self.returning if at > now]
        for action in due:
            action()
        if self.next_kill <= now < self.until:
            self._kill(self.rng.choice(KINDS))
            self._plan_next()

    def _plan_next(self) -> None:
        self.next_kill += self.rng.uniform(*self.config.pause_s)

    def _kill(self, kind: str) -> None:
        if not getattr(self.site, f"kill_{kind}")(self.rng):
            return
        self.kills[kind] += 1
        back = {"node": self.site.start_node, "server": self.site.start_server}.get(kind)
        if back:
            self.returning.append((time.monotonic() + self.rng.uniform(*self.config.away_s), back))


@dataclass(frozen=True, kw_only=True)
class Round:
    """What it took to finish one output, and what is wrong with it."""

    starts: int
    failures: tuple[str, ...]  # why a driver that nobody killed gave up
    waits: int  # reads and writes that waited for the server, as far as the drivers were told of them
    wrong: tuple[str, ...] = ()


class ChaosError(RuntimeError):
    """An extraction does not come to its end."""


def run_rounds(
    site: Site, config: Chaos, catalog: dict[str, str], expected: dict[str, str]
) -> tuple[Fire, list[Round]]:
    """Extract again and again under fire until the time is up; each output is checked."""
    fire = Fire(site, config, until=time.monotonic() + 60 * config.minutes)
    rounds: list[Round] = []
    while not rounds or time.monotonic() < fire.until:
        name = f"round-{len(rounds)}"
        done = run_round(site, fire, name)
        while fire.returning:
            fire.tick()
            time.sleep(0.1)
        rounds.append(Round(**{**vars(done), "wrong": tuple(find_wrong(name, catalog, expected))}))
        print(
            f"{name}: {done.starts} starts, {'as undisturbed' if not rounds[-1].wrong else rounds[-1].wrong}",
            flush=True,
        )
    return fire, rounds


def run_round(site: Site, fire: Fire, name: str) -> Round:
    """Run the command until it ends well, as a user would: killed or failed, it is started again."""
    deadline = time.monotonic() + ROUND_S
    starts, waits, failures = 0, 0, []
    while True:
        starts += 1
        log = site.start_driver(name)
        assert site.driver is not None
        while (status := site.driver.poll()) is None:
            fire.tick()
            time.sleep(0.1)
            if time.monotonic() > deadline:
                raise ChaosError(f"{name} is not done after {ROUND_S:.0f} s: {tail(log)}")
        waits += log.read_text(errors="replace").count("; trying again for up to")
        if status == 0:
            return Round(starts=starts, failures=tuple(failures), waits=waits)
        if status != -signal.SIGKILL:
            failures.append(tail(log))
            print(f"{name}: the driver gave up: {failures[-1]}", flush=True)
            if len(failures) > MAX_FAILURES:
                raise ChaosError(f"{name} failed {len(failures)} times")


def tail(log: Path) -> str:
    """The last line that a driver said."""
    return (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1][:500]


def upload_videos(config: Chaos, folder: Path) -> dict[str, str]:
    """Put good, broken and missing videos on the server; path of each → the status that it is to end with."""
    write_motion_videos(
        folder, videos_per_class=config.videos_per_class, seed=config.seed, num_frames=config.frames, size=(64, 48)
    )
    write_broken_videos(folder / "train" / "broken")
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.mp4"))
    for path in paths:
        storage.put(f"{BUCKET}/videos/{path}", (folder / path).read_bytes())
    statuses = {str(path): "quarantined" if path.parts[1] == "broken" else "ok" for path in paths}
    catalog = {**statuses, GHOST: "missing"}
    text = io.StringIO()
    rows = [(path, path.split("/")[1], path.split("/")[0]) for path in sorted(catalog)]
    csv.writer(text).writerows([("path", "label", "split"), *rows])
    storage.put(f"{BUCKET}/list.csv", text.getvalue().encode())
    return catalog


def hash_output(name: str) -> dict[str, str]:
    """sha256 of every file of an output that does not depend on the clock."""
    files = [file.path for file in storage.list_files(f"{BUCKET}/{name}") if not file.path.startswith(OFF_THE_RECORD)]
    return {file: hashlib.sha256(storage.read_bytes(f"{BUCKET}/{name}/{file}")).hexdigest() for file in files}


def find_wrong(name: str, catalog: dict[str, str], expected: dict[str, str]) -> Iterator[str]:
    """What an output has lost, has twice, or has otherwise than the undisturbed one."""
    output = f"{BUCKET}/{name}"
    described = read_dataset(output)
    videos = shards.read_table(f"{output}/videos.parquet").to_pylist()
    told = Counter((video["source"] or GHOST, video["status"]) for video in videos)
    for row in sorted((told - Counter(catalog.items())) + (Counter(catalog.items()) - told)):
        yield f"{row[0]} as {row[1]} is {told[row]} times in videos.parquet"
    rows = (row for shard in described.shards for row in shards.read_rows(f"{output}/{shard.file}", ["source"]))
    in_shards = Counter((row["source"], "ok") for row in rows)
    if in_shards != Counter(video for video in catalog.items() if video[1] == "ok"):
        yield "the shards' rows are not exactly the good videos"
    found = hash_output(name)
    differing = sorted(file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file))
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
        *((f"{kind} killed", fire.kills[kind]) for kind in KINDS),
        ("rounds", len(rounds)),
        ("shards a round", len(read_dataset(f"{BUCKET}/undisturbed").shards)),
        ("videos a round", f"{len(catalog)} ({', '.join(f'{count} {name}' for name, count in statuses.items())})"),
        ("starts of the driver", sum(done.starts for done in rounds)),
        ("drivers that gave up", failures.total()),
        ("waits for the server that were logged", sum(done.waits for done in rounds)),
        ("every row accounted for once, all hashes equal", f"{equal} of {len(rounds)} rounds"),
    ]
    print(format_table((f"{config.minutes:g} minutes, seed {config.seed}", ""), lines))
    for done in rounds:
        for wrong in done.wrong:
            print(f"WRONG: {wrong}")
    return 0 if equal == len(rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
