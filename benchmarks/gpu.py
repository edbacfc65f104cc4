"""What a GPU does for this project, each figure beside the ceiling of the card that bounds it.

    python benchmarks/gpu.py                     on a machine with a GPU, in at most three minutes
    python benchmarks/gpu.py --json              the same figures on one line at the end
    python benchmarks/gpu.py --rehearse          every part on the CPU in tiny sizes: does the script run?

Each part stands by itself: one that fails says so and the others go on, and none is begun that the time left is too
short for. The figures of a rehearsal mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tyro

from jobs.cluster import connect
from jobs.extraction_log import format_table

if TYPE_CHECKING:
    import torch

    from pipelines.extraction.flow_actor import FlowBatch
    from pipelines.extraction.flow_pool import FlowPool
    from pipelines.extraction.plan import ExtractionSettings, Plan
    from pipelines.tvl1 import TVL1Params

NOTHING = "no flow"
NO_GPU = "torch sees no GPU here, so there is nothing to measure; --rehearse runs every part on the CPU in tiny sizes"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a GPU does for this project."""

    seconds: float = 170
    """Seconds after which no further part begins."""
    parts: tuple[str, ...] = ()
    """Names of parts to run. None: all."""
    videos: int | None = None
    """Self-made videos of 100 frames, 340x256, for the whole extraction. None: three for each CPU."""
    rehearse: bool = False
    """Run every part on the CPU in tiny sizes: kernels in Triton's interpreter, a pretended GPU for Ray."""
    json: bool = False
    """Print the rows as one line of JSON at the end."""


@dataclass(frozen=True)
class Row:
    """One figure, and the ceiling that bounds it."""

    part: str
    what: str
    value: float
    unit: str
    ceiling: float | None = None
    bound_by: str = ""


@dataclass
class Session:
    """What parts share: the settings, the time, and the card's rates as the first part found them."""

    config: Benchmark
    started: float = field(default_factory=time.monotonic)
    bandwidth: float | None = None  # bytes a second, read and written
    matmul: float | None = None  # floating-point operations a second, bf16

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.config.seconds - (time.monotonic() - self.started)

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.config.rehearse else "cuda")

    def seconds_of(self, call: Callable[[], object], *, enough: float = 0.5) -> float:
        """Median seconds of a call on the device, after one that warms up; repeated for about `enough` seconds."""
        call()
        self.wait()
        times: list[float] = []
        begun = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - begun < enough and len(times) < 50):
            started = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - started)
            if self.config.rehearse:
                break
        return sorted(times)[len(times) // 2]

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure_card(session: Session) -> Iterator[Row]:
    """Copy bandwidth and bf16 matrix product: the ceilings of all else."""
    import torch

    tiny = session.config.rehearse
    source = torch.empty(1 << (16 if tiny else 30), dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    session.bandwidth = 2 * len(source) / session.seconds_of(lambda: target.copy_(source))
    yield Row("card", "copy, read + written", session.bandwidth / 1e9, "GB/s")
    side = 64 if tiny else 8192
    a, b = (torch.randn(side, side, device=session.device, dtype=torch.bfloat16) for _ in range(2))
    session.matmul = 2 * side**3 / session.seconds_of(lambda: a @ b)
    yield Row("card", f"matrix product {side}, bf16", session.matmul / 1e12, "TFLOP/s")


def measure_flow(session: Session) -> Iterator[Row]:
    """TV-L1 per preset and batch, pairs a second, and at one batch the share of each kernel."""
    from pipelines import tvl1

    size = (16, 20) if session.config.rehearse else (256, 340)
    for preset in ("faithful",) if session.config.rehearse else tvl1.PRESETS:
        params = tvl1.TVL1Params(num_scales=1, num_warps=1, num_iterations=2) if session.config.rehearse else None
        for batch in (1,) if session.config.rehearse else (8, 16, 64, 256) if preset == "faithful" else (64,):
            yield from _measure_solve(session, preset, params or tvl1.PRESETS[preset], batch, size)


def _measure_solve(
    session: Session, preset: str, params: TVL1Params, batch: int, size: tuple[int, int]
) -> Iterator[Row]:
    import torch

    from pipelines.tvl1.torch_backend import BatchSolver

    frames = torch.randint(0, 256, (batch + 1, size[0] // 8 + 1, size[1] // 8 + 1), dtype=torch.uint8)
    frames = torch.nn.functional.interpolate(frames[None].float(), size, mode="bicubic")[0]
    frames = frames.clamp(0, 255).to(torch.uint8).to(session.device)
    solver = BatchSolver(params)
    seconds = session.seconds_of(lambda: solver.solve(frames))
    if not session.config.rehearse:
        seconds = session.seconds_of(lambda: solver.solve(frames))  # once more: by now it is a graph
    ceiling = session.bandwidth / bytes_of_pair(size, params) if session.bandwidth else None
    where = f"{size[1]}x{size[0]}, batch {batch}"
    yield Row("flow", f"{preset}, {where}", batch / seconds, "pairs/s", ceiling, "memory, if arithmetic were free")
    if batch in (1, 64) and preset == "faithful":
        rate = _measure_actor(params, frames.cpu().numpy())
        yield Row("flow", "… frames in memory to codes in memory", rate, "pairs/s", batch / seconds, "the solve alone")
        plainly = BatchSolver(params, graphs=False)
        for kernel, share in _shares_of_kernels(session, lambda: plainly.solve(frames)).items():
            yield Row("flow", f"… of it {kernel}", 100 * share, "%")


def _measure_actor(params: TVL1Params, frames: np.ndarray) -> float:
    """Pairs a second of what an actor does, copies and quantising included, with as many threads as it has."""
    from pipelines.extraction.flow_actor import THREADS, DeviceFlow, FlowTask
    from pipelines.media.codec import CodecSettings
    from pipelines.tvl1.torch_backend import BatchSolver

    flow = DeviceFlow(FlowTask(backend="torch", preset="faithful", scale=CodecSettings().flow_scale))
    flow.solver = BatchSolver(params)
    rounds = 20 if len(frames) > 2 else 1
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(2):  # run, recorded; replayed after that
            flow.solve(frames, 0)
        started = time.perf_counter()
        list(threads.map(lambda _: flow.solve(frames, 0), range(rounds)))
    return rounds * (len(frames) - 1) / (time.perf_counter() - started)


def bytes_of_pair(size: tuple[int, int], params: TVL1Params) -> float:
    """Bytes that the kernels of a solve read and write for one pair, each float of a launch once."""
    from pipelines.tvl1.pyramid import pyramid_sizes
    from pipelines.tvl1.torch_backend import launches_of

    planes_of_warp = (2 + 2 + 3) + len(launches_of(params.num_iterations)) * (9 + 6) + (4 if params.median == 3 else 0)
    pixels = sum(height * width for height, width in pyramid_sizes(*size, params))
    return 4 * pixels * (params.num_warps * planes_of_warp + 6 / params.scale_step**-2 + 6 + 2)


def _shares_of_kernels(session: Session, solve: Callable[[], object]) -> dict[str, float]:
    """Share of each kernel in the time of a solve, largest first."""
    if session.config.rehearse:
        solve()
        return {"nothing, in a rehearsal": 1.0}
    from torch.profiler import ProfilerActivity, profile

    solve()
    session.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        solve()
        session.wait()
    times = {event.key: event.self_device_time_total for event in found.key_averages()}
    total = sum(times.values())
    return {name: t / total for name, t in sorted(times.items(), key=lambda item: -item[1])[:6] if t}


def measure_extraction(session: Session) -> Iterator[Row]:
    """A few clips from video files to shards: with flow on the GPU, on the CPUs, and with a flow that is nothing."""
    from pipelines.datasets.motion_videos import write_motion_videos

    tiny = session.config.rehearse
    connect(num_cpus=1 if tiny else None, num_gpus=1 if tiny else None)
    import ray

    try:
        with tempfile.TemporaryDirectory() as folder:
            frames, size = (4, (32, 32)) if tiny else (100, (340, 256))
            write_motion_videos(f"{folder}/videos", videos_per_class=1, seed=0, num_frames=frames, size=size)
            _copy_up_to(Path(folder) / "videos", 7 if tiny else session.config.videos or 3 * (os.cpu_count() or 1))
            rates = {how: _extract(session, folder, how) for how in ("warm-up", "nothing", "GPU", "CPU")}
    finally:
        ray.shutdown()
    nothing, gpu, cpu = (rates[how][0] for how in ("nothing", "GPU", "CPU"))
    cores = f"{os.cpu_count()} CPUs"
    yield Row("extraction", f"{cores}, flow that is nothing", nothing, "frames/s")
    yield Row("extraction", f"{cores} and a GPU", gpu, "frames/s", nothing, "decoding and encoding on the CPUs")
    yield Row("extraction", "… share of the time that the GPU computed", 100 * rates["GPU"][1], "%", 100.0, "the GPU")
    yield Row("extraction", f"{cores} without the GPU", cpu, "frames/s", nothing, "decoding and encoding on the CPUs")
    yield Row("extraction", "GPU against CPUs only", gpu / cpu, "×")


def _copy_up_to(folder: Path, count: int) -> None:
    """Copies under other names, until there are so many videos: to draw them takes longer than to extract them."""
    videos = sorted(folder.rglob("*.mp4"))
    for index in range(len(videos), count):
        video = videos[index % len(videos)]
        shutil.copy(video, video.with_name(f"copy_{index}.mp4"))


def _extract(session: Session, folder: str, how: str) -> tuple[float, float]:
    """Frames a second of one extraction, and the share of the time that flow actors computed."""
    from pipelines import tvl1
    from pipelines.extraction.graph import start_actors
    from pipelines.extraction.tasks import Placement

    settings = _settings(tiny=session.config.rehearse)
    backend = "torch" if how == "GPU" and not session.config.rehearse else "cpu"
    with start_actors(settings, backend, Placement(flow_actors=how == "GPU")) as actors:
        if actors:
            kernel = actors.kernel()
            _wait_for_kernels(actors)
        else:
            kernel = NOTHING if how == "nothing" else tvl1.kernel_target(backend)
        pool: Any = NoFlow() if how == "nothing" else actors
        plan = _plan(settings, f"{folder}/videos", f"{folder}/{how}", kernel)
        seconds = _run(plan, backend, pool)
        busy = sum(actors.busy_seconds()) if actors else 0.0
    return _count_frames(plan) / seconds, busy / seconds


def _run(plan: Plan, backend: str, pool: Any) -> float:
    """Wall seconds of the graph."""
    from pipelines.extraction.graph import Steps
    from pipelines.extraction.tasks import Placement, run_graph
    from pipelines.extraction.work import iter_blocks

    started = time.perf_counter()
    for _ in run_graph(iter_blocks(plan, {}, retry=False), Steps.of(plan, backend=backend, pool=pool), Placement()):
        pass
    return time.perf_counter() - started


def _wait_for_kernels(actors: FlowPool) -> None:
    import ray

    ray.get([actor.prewarm.remote() for actor in actors.actors])


class NoFlow:
    """Stands where a pool of actors does: codes like those of a flow that moves, at no cost."""

    def stream(self, frames: Iterable[np.ndarray], num_samples: int) -> Iterator[FlowBatch]:
        """One smooth field, drifting."""
        from pipelines.extraction.batches import BATCH_PIXELS, iter_batches
        from pipelines.extraction.flow_actor import FlowBatch
        from pipelines.media.codec import CodecSettings, count_levels, quantise, stack_components

        scale = CodecSettings().flow_scale
        for batch in iter_batches(frames, BATCH_PIXELS):
            y, x = np.mgrid[: batch.shape[1], : batch.shape[2]] / 20
            field = stack_components(
                quantise(np.stack([3 * np.sin(x + np.cos(y)), 2 * np.cos(x) * np.sin(y)], -1), scale)
            )
            levels = np.stack([np.roll(field, t, 1) for t in range(len(batch) - 1)])
            counts = [count_levels(field, scale)] * len(levels)
            yield FlowBatch(levels=levels, counts=counts, sample=np.zeros((0, *batch.shape[1:], 2)), kernel=NOTHING)


def measure_networks(session: Session) -> Iterator[Row]:
    """I3D at 64x224x224 in training and inference, beside a plain port in the same run (benchmarks/gpu_networks.py)."""
    from gpu_networks import MEASURES, Settings

    tiny = session.config.rehearse
    sizes: dict[str, Any] = {"batch": 2, "frames": 16, "size": 32, "rounds": 1} if tiny else {"rounds": 5}
    settings = Settings(seconds=20, small=tiny, **sizes)
    for part in ("training", "inference"):
        for row in MEASURES[part](settings):
            if row.clips_per_s is None:  # one variant that fails leaves the others
                print(f"{part}: {row.name} failed, {row.error}", flush=True)
                continue
            ceiling = row.clips_per_s * session.matmul / (row.tflops * 1e12) if session.matmul and row.tflops else None
            yield Row(part, row.name, row.clips_per_s, "clips/s", ceiling, "bf16 matrix product")


def _settings(*, tiny: bool) -> ExtractionSettings:
    from pipelines.datasets.shards import ShardSettings
    from pipelines.extraction.plan import ExtractionSettings
    from pipelines.media.decode import DecodeSettings

    return ExtractionSettings(
        decode=DecodeSettings(short_side=32 if tiny else 256), shards=ShardSettings(videos_per_shard=1)
    )


def _plan(settings: ExtractionSettings, videos: str, output: str, kernel: str) -> Plan:
    from pipelines.datasets.catalog import read_catalog
    from pipelines.extraction.plan import make_plan

    return make_plan(read_catalog(videos), settings, videos=videos, output=output, kernel=kernel)


def _count_frames(plan: Plan) -> int:
    from pipelines.datasets.shards import read_commits

    return sum(video["num_frames"] for commit in read_commits(plan.output) for video in commit.videos)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark, and the seconds that it may take."""

    name: str
    measure: Callable[[Session], Iterable[Row]]
    seconds: float


PARTS = [
    Part("card", measure_card, 10),
    Part("flow", measure_flow, 45),
    Part("networks", measure_networks, 45),
    Part("extraction", measure_extraction, 70),
]


def main() -> None:
    """Run the parts, print the table."""
    config = tyro.cli(Benchmark, description=__doc__)
    if config.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is imported
    import torch

    if not config.rehearse and not torch.cuda.is_available():
        print(NO_GPU)
        return
    print(describe(config), flush=True)
    rows = run_parts(Session(config), PARTS)
    print(format_rows(rows))
    if config.json:
        print(json.dumps([asdict(row) for row in rows]))


def describe(config: Benchmark) -> str:
    """Which card, processor and versions the figures are of."""
    import torch

    card = "none, this is a rehearsal" if config.rehearse else torch.cuda.get_device_name()
    return f"card {card}; {os.cpu_count()} CPUs; torch {torch.__version__}"


def run_parts(session: Session, parts: list[Part]) -> list[Row]:
    """The rows of the parts that were wanted, that there was time for and that did not fail."""
    rows: list[Row] = []
    for part in parts:
        if session.config.parts and part.name not in session.config.parts:
            continue
        if part.seconds > session.left:
            print(
                f"{part.name}: left out, {session.left:.0f} s are left of the {part.seconds:g} it may take", flush=True
            )
            continue
        started = time.monotonic()
        try:
            for row in part.measure(session):  # what was measured before a part fails is kept
                rows.append(row)
                print(f"  {row.part}: {row.what} {row.value:.4g} {row.unit}", flush=True)
        except Exception as error:
            print(f"{part.name}: failed, {type(error).__name__}: {' '.join(str(error).split())[:400]}", flush=True)
        print(f"{part.name}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


def format_rows(rows: list[Row]) -> str:
    """One table, each figure beside its ceiling."""
    cells = []
    for row in rows:
        ceiling = "" if row.ceiling is None else f"{row.ceiling:.4g}"
        share = "" if row.ceiling is None else f"{row.value / row.ceiling:.0%}"
        cells.append((f"{row.part}: {row.what}", f"{row.value:.4g} {row.unit}", ceiling, share, row.bound_by))
    return format_table(("", "measured", "ceiling", "of it", "bound by"), cells)


if __name__ == "__main__":
    main()
