"""A small labelled set of real H.264 files in which only motion tells the classes apart, made on the spot.

Shapes drift or change size over a still background. Colours, outlines, patterns, places and sizes are drawn
independently of the class, and both the frame and the range of sizes are closed circles: what leaves on one side enters
on the other, what outgrows the largest size starts at the smallest. So every single frame has the same distribution in
all classes, and a network that sees no motion stays at chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

CLASSES = ("down", "grow", "left", "right", "shrink", "up")
FPS = 25
NUM_SHAPES = 4
MIN_RADIUS, MAX_RADIUS = 0.08, 0.28  # of the shorter side
MIN_SPEED, MAX_SPEED = 1.2 / 256, 3.6 / 256  # shorter sides per frame: 1.2 to 3.6 px where that side is 256 px
MIN_GROWTH, MAX_GROWTH = 0.035, 0.06  # of the radius per frame
DIRECTIONS = {"down": (0, 1), "left": (-1, 0), "right": (1, 0), "up": (0, -1)}
SCALINGS = {"grow": 1, "shrink": -1}

Image = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One shape of the first frame; lengths in pixels, angles in radians, colours RGB in [0, 1]."""

    x: float
    y: float
    phase: float  # place of log(radius) in the closed range of sizes, in [0, 1)
    angle: float
    outline: int
    pattern: int
    colours: Image  # (2, 3)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a video shows, before any motion is chosen."""

    background: Image  # (H, W, 3) in [0, 1]
    shapes: tuple[Shape, ...]
    speed: float  # pixels per frame
    growth: float  # phases per frame


def write_motion_videos(
    folder: str | Path, *, videos_per_class: int, seed: int, num_frames: int = 50, size: tuple[int, int] = (128, 96)
) -> None:
    """Write `train/CLASS/CLASS_0000.mp4`, … of (width, height) `size` at 25 fps, every third video under `test/`.

    The classes are `down`, `grow`, `left`, `right`, `shrink` and `up`. The same seed gives the same bytes, and a video
    does not depend on how many others are asked for.
    """
    if min(videos_per_class, num_frames) < 1 or min(size) < 16 or size[0] % 2 or size[1] % 2:
        raise ValueError(
            f"videos_per_class {videos_per_class}, num_frames {num_frames}, size {size}: at least 1, 1 and even sides "
            "of at least 16 px are needed"
        )
    for label, name in enumerate(CLASSES):
        for index in range(videos_per_class):
            split = "test" if index % 3 == 2 else "train"
            path = Path(folder) / split / name / f"{name}_{index:04d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene = draw_scene(np.random.default_rng([seed, label, index]), size)
            _write_h264(path, [render_frame(scene, name, t) for t in range(num_frames)])


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A random scene of (width, height) `size`, which knows nothing of its class."""
    return Scene(
        background=_draw_background(rng, size),
        shapes=tuple(_draw_shape(rng, size) for _ in range(NUM_SHAPES)),
        speed=rng.uniform(MIN_SPEED, MAX_SPEED) * min(size),
        growth=rng.uniform(MIN_GROWTH, MAX_GROWTH) / np.log(MAX_RADIUS / MIN_RADIUS),
    )


def render_frame(scene: Scene, name: str, t: int) -> npt.NDArray[np.uint8]:
    """Frame `t` of the scene moving as class `name`, as (H, W, 3) uint8 RGB."""
    frame = scene.background.copy()
    shorter = min(frame.shape[:2])
    step_x, step_y = DIRECTIONS.get(name, (0, 0))
    for shape in scene.shapes:
        centre = (shape.x + step_x * scene.speed * t, shape.y + step_y * scene.speed * t)
        phase = (shape.phase + SCALINGS.get(name, 0) * scene.growth * t) % 1
        _paint(frame, shape, centre, MIN_RADIUS * shorter * (MAX_RADIUS / MIN_RADIUS) ** phase)
    return np.rint(frame * 255).astype(np.uint8)


def write_broken_videos(folder: str | Path) -> None:
    """Write four files that no decoder gets a frame from: truncated, empty, text and audio only, all named .mp4."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    truncated = folder / "truncated.mp4"
    scene = draw_scene(np.random.default_rng(0), (64, 64))
    _write_h264(truncated, [render_frame(scene, "left", t) for t in range(10)])
    content = truncated.read_bytes()
    truncated.write_bytes(content[: len(content) // 2])  # the index, which comes last, is gone
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("This is not a video.\n")
    _write_tone(folder / "audio_only.mp4")


def _draw_background(rng: np.random.Generator, size: tuple[int, int]) -> Image:
    """(H, W, 3) float32 in [0, 1]: random colour blotches of two sizes."""
    coarse, fine = rng.random((4, 5, 3), np.float32), rng.random((24, 32, 3), np.float32)
    blotches = 0.7 * cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC) + 0.3 * cv2.resize(fine, size)
    return np.clip(blotches, 0, 1, dtype=np.float32)


def _draw_shape(rng: np.random.Generator, size: tuple[int, int]) -> Shape:
    return Shape(
        x=rng.uniform(0, size[0]),
        y=rng.uniform(0, size[1]),
        phase=rng.uniform(),
        angle=rng.uniform(0, 2 * np.pi),
        outline=int(rng.integers(3)),
        pattern=int(rng.integers(3)),
        colours=_draw_colours(rng),
    )


def _draw_colours(rng: np.random.Generator) -> Image:
    """(2, 3) float32: a dark and a bright colour, in random order."""
    colours = np.stack([rng.uniform(0, 0.35, 3), rng.uniform(0.65, 1, 3)]).astype(np.float32)
    return np.asarray(rng.permutation(colours), np.float32)


def _paint(frame: Image, shape: Shape, centre: tuple[float, float], radius: float) -> None:
    """Blend the shape into (H, W, 3) `frame`, with soft edges so that fractions of a pixel show."""
    height, width = frame.shape[:2]
    x = (np.arange(width, dtype=np.float32) - centre[0] + width / 2) % width - width / 2
    y = (np.arange(height, dtype=np.float32) - centre[1] + height / 2) % height - height / 2
    rows, columns = np.flatnonzero(np.abs(y) < 1.5 * radius), np.flatnonzero(np.abs(x) < 1.5 * radius)
    turn = np.exp(-1j * shape.angle) / radius
    place = (x[columns] + 1j * y[rows, None]) * turn
    u, v = place.real.astype(np.float32), place.imag.astype(np.float32)
    inside = np.clip((1 - _measure(shape.outline, u, v)) * radius + 0.5, 0, 1)[..., None]
    mix = _fill(shape.pattern, u, v)[..., None]
    colour = mix * shape.colours[0] + (1 - mix) * shape.colours[1]
    window = np.ix_(rows, columns)
    frame[window] = inside * colour + (1 - inside) * frame[window]


def _measure(outline: int, u: Image, v: Image) -> Image:
    """Distance from the shape's centre in units of its radius: 1 on the outline of a disc, a square or a bar."""
    if outline == 0:
        return np.hypot(u, v)
    return np.maximum((1.1 if outline == 1 else 2) * np.abs(u), 1.1 * np.abs(v))


def _fill(pattern: int, u: Image, v: Image) -> Image:
    """Share of the first colour, in [0, 1]: plain, stripes or blobs."""
    if pattern == 0:
        return np.ones_like(u)
    wave = np.sin(5 * u) if pattern == 1 else np.sin(5 * u) * np.sin(5 * v)
    return np.clip(0.5 + 2 * wave, 0, 1)


def _write_h264(path: Path, frames: Sequence[npt.NDArray[np.uint8]]) -> None:
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        # With its macroblock tree x264 gives other bytes on some runs, which follow from what lies in memory.
        options = {"crf": "23", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def _write_tone(path: Path) -> None:
    """One second of 440 Hz as AAC."""
    rate = 44_100
    wave = (0.2 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)).astype(np.float32)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
