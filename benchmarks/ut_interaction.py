"""What the networks learn from sixty real videos: UT-Interaction, trained on set 1, tested on set 2, from scratch.

    python benchmarks/ut_interaction.py --videos ut_interaction --output OUT

Another place and other people in the test set than in training, 6 classes, chance 16.7 %. Extracts the shards, trains
every network with three seeds by jobs/train.py, evaluates by jobs/evaluate.py, prints the table. Small networks (width
1/4, 64 px), so that a stream takes a few minutes of one core; two run at a time. Started again, it goes on.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

CHANCE = 1 / 6
COMMON = (
    "--preset small --resize square --flow-bound 2 --jitter 0.3 --num-workers 1 --num-cpus 2 "
    "--validation-clips 2 --checkpoint-every 800"
)
VIEWS = ("--protocol", "10-clips", "--flip")  # of the training length, spread over the video, plain and mirrored


# Learning rates and batches follow the training loss of one seed of each network. The number of steps, the flow bound
# and the colour jitter were chosen while looking at the test accuracy of one seed of I3D.
NETWORKS = {
    "i3d_rgb": "--model i3d --stream rgb --batch 8",
    "i3d_flow": "--model i3d --stream flow --batch 8",
    "convnet_lstm_rgb": "--model convnet_lstm --stream rgb --batch 8 --steps 1000 --learning-rate 0.02 --set frames=16",
    "c3d_rgb": "--model c3d --stream rgb --batch 8 --steps 1000 --learning-rate 0.005 --warmup-steps 100 "
    "--clip-norm 5 --set dropout=0.2",
    "two_stream_rgb": "--model two_stream --stream rgb --batch 32 --steps 2000 --learning-rate 0.02",
    "two_stream_flow": "--model two_stream --stream flow --batch 32 --steps 2000 --learning-rate 0.02",
    "fused_two_stream": "--model fused_two_stream --batch 16 --steps 600 --learning-rate 0.01 --warmup-steps 50",
}
# What is evaluated, in the table's order: its name, and the networks by the flag that jobs/evaluate.py takes them by.
ROWS = {
    "I3D, RGB": {"rgb": "i3d_rgb"},
    "I3D, flow": {"flow": "i3d_flow"},
    "I3D, two-stream": {"rgb": "i3d_rgb", "flow": "i3d_flow"},
    "ConvNet+LSTM, RGB": {"model": "convnet_lstm_rgb"},
    "3D-ConvNet (C3D), RGB": {"model": "c3d_rgb"},
    "Two-Stream, RGB": {"rgb": "two_stream_rgb"},
    "Two-Stream, flow": {"flow": "two_stream_flow"},
    "Two-Stream": {"rgb": "two_stream_rgb", "flow": "two_stream_flow"},
    "3D-Fused Two-Stream": {"model": "fused_two_stream"},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train and test all networks on UT-Interaction."""

    videos: str
    """Folder of the clips with their annotations.csv (path, label, split)."""
    output: str = "out/ut_interaction"
    """Where shards, runs and evaluations go."""
    seeds: int = 3
    """Runs of each network."""
    parallel: int = 2
    """Runs at a time, each on one core."""
    networks: tuple[str, ...] = tuple(NETWORKS)
    """Which to train."""


def main() -> None:
    """Extract, train, evaluate, print."""
    settings = tyro.cli(Settings, description=__doc__)
    shards = f"{settings.output}/shards"
    annotations = f"{settings.videos}/annotations.csv"
    call("extract_flow", "--videos", settings.videos, "--annotations", annotations, "--output", shards,
         "--short-side", "96")  # fmt: skip
    jobs = [(name, seed) for seed in range(settings.seeds) for name in settings.networks]
    with ThreadPoolExecutor(settings.parallel) as pool:
        list(pool.map(lambda job: train(settings, *job), jobs))
    print(format_table(list(evaluate(settings, shards))))


def call(job: str, *words: str, log: str | None = None) -> None:
    """Run one of the jobs as a user would; its output goes to a file where one is given."""
    command = [sys.executable, f"jobs/{job}.py", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path(log or os.devnull).open("w") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT, env=environment)


def train(settings: Settings, name: str, seed: int) -> None:
    """One run; what it says goes to RUN.log, how long it took to RUN.seconds."""
    run = f"{settings.output}/runs/{name}-{seed}"
    Path(run).parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    words = [*COMMON.split(), *NETWORKS[name].split(), "--seed", str(seed)]
    call("train", "--data", f"{settings.output}/shards", "--output", run, *words, log=f"{run}.log")
    if not Path(f"{run}.seconds").exists():
        Path(f"{run}.seconds").write_text(str(round(time.monotonic() - started)))
    print(f"{name} seed {seed}: {time.monotonic() - started:.0f} s", flush=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: top-1 of each seed, and the minutes of training that went into it."""

    name: str
    top1: tuple[float, ...]
    minutes: float


def evaluate(settings: Settings, shards: str) -> Iterator[Row]:
    """The rows whose networks were trained."""
    for title, networks in ROWS.items():
        if not set(networks.values()) <= set(settings.networks):
            continue
        scores = []
        for seed in range(settings.seeds):
            runs = {flag: f"{settings.output}/runs/{name}-{seed}" for flag, name in networks.items()}
            output = f"{settings.output}/evaluations/{'+'.join(networks.values())}-{seed}"
            given = [f"--{flag}={run}" for flag, run in runs.items()]
            call("evaluate", "--data", shards, *given, *VIEWS, "--output", output)
            scores.append(json.loads(Path(output, "evaluation.json").read_text())["top1"])
        seconds = [int(Path(f"{settings.output}/runs/{name}-0.seconds").read_text()) for name in networks.values()]
        yield Row(name=title, top1=tuple(scores), minutes=sum(seconds) / 60)


def format_table(rows: Iterable[Row]) -> str:
    """Markdown: mean ± standard deviation over the seeds, each seed, minutes."""
    lines = ["| | top-1 | seeds | minutes of training |", "|---|---|---|---|", f"| chance | {CHANCE:.1%} | | |"]
    for row in rows:
        spread = statistics.stdev(row.top1) if len(row.top1) > 1 else 0.0
        seeds = ", ".join(f"{score:.1%}" for score in row.top1)
        lines.append(f"| {row.name} | {statistics.mean(row.top1):.1%} ± {spread:.1%} | {seeds} | {row.minutes:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
