"""What hostile and broken files do to an extraction: small videos of every container, damaged at random.

    python benchmarks/fuzz.py --files 1000 --seed 0          decoder first, then the whole extraction, in minutes
    python benchmarks/fuzz.py --files 10000 --corpus DIR     damages the small videos of a folder as well

Bytes are flipped, parts and boxes cut, moved and repeated, lengths and stamps made huge, negative or equal, streams and
whole halves of files swapped. Every file must end as frames or as a VideoError with a reason, in bounded time and
memory, and then in a shard or in quarantine of an extraction that ends with status 0 and loses no worker. Exit status
1 where one does not; such files are kept under --keep.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import tyro

from jobs.extraction_log import format_table

if TYPE_CHECKING:
    from pipelines.media.decode import DecodeSettings

ROOT = Path(__file__).resolve().parents[1]
SIZE, FRAMES = (64, 48), 12
MAX_CORPUS_BYTES = 200_000
TIMEOUT_S, CPU_LIMIT_S, MAX_FRAMES, MEMORY_MB = 10, 20, 250, 1024
GROWTH_MB = 200  # that this benchmark's own processes may grow by
MAX_S = TIMEOUT_S + CPU_LIMIT_S + 10  # of any file
WORKER_DIED = re.compile(r"worker.*(died|crashed|killed|exited unexpectedly)", re.IGNORECASE)

KINDS = [
    *[("libx264", suffix, "yuv420p") for suffix in ("mp4", "mov", "mkv", "ts", "flv", "h264", "avi", "nut", "3gp")],
    *[("libx265", suffix, "yuv420p10le") for suffix in ("mp4", "mkv", "ts", "hevc")],
    *[("mpeg4", suffix, "yuv420p") for suffix in ("avi", "mp4", "mkv", "m4v")],
    *[("mpeg2video", suffix, "yuv420p") for suffix in ("ts", "mpg", "mkv", "mxf", "m2v")],
    *[("libvpx", suffix, "yuv420p") for suffix in ("webm", "ivf")],
    *[("libvpx-vp9", suffix, "yuva420p") for suffix in ("webm",)],
    *[("libsvtav1", suffix, "yuv420p") for suffix in ("mp4", "mkv", "ivf")],
    *[("mjpeg", suffix, "yuvj420p") for suffix in ("avi", "mov", "mjpeg")],
    *[("flv", "flv", "yuv420p"), ("wmv2", "wmv", "yuv420p"), ("msmpeg4v2", "avi", "yuv420p")],
    *[("gif", "gif", "rgb8"), ("png", "mov", "rgba"), ("ffv1", "mkv", "gray"), ("prores_ks", "mov", "yuva444p10le")],
    *[("h263p", "3gp", "yuv420p"), ("rawvideo", "avi", "bgr24"), ("mpeg1video", "mpg", "yuv420p")],
]

OPTIONS = {"libx264": {"bf": "2", "g": "6"}, "libx265": {"x265-params": "log-level=none"}}

Random = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Fuzz:
    """Damage small videos at random and put them through the decoder and through an extraction."""

    files: int = 1000
    """Damaged files."""
    seed: int = 0
    """Of the damage; the same seed and corpus give the same files."""
    corpus: str | None = None
    """Folder whose videos of at most 200 kB are damaged beside the ones made here."""
    processes: int = 2
    """Processes that decode, and CPUs that the extraction may use."""
    keep: str = "out/fuzz"
    """Folder for the files that broke something."""
    extraction: bool = True
    """Put the files through jobs/extract_flow.py as well."""
    json: bool = False
    """Print one JSON object instead of tables."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one file in the decoder."""

    name: str
    verdict: str  # "whole", "partial", the kind of a VideoError, or "!" and an exception that should not be
    seconds: float
    child_mb: int  # most memory of the decoding process
    own_mb: int  # of this one


def main() -> None:
    config = tyro.cli(Fuzz, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        seeds = make_seeds(Path(folder) / "seeds", config.corpus)
        write_damaged(videos, seeds, files=config.files, seed=config.seed)
        begun = time.monotonic()
        outcomes = decode_all(videos, config.processes)
        report: dict[str, Any] = {"files": config.files, "seed": config.seed, "seeds": len(seeds)}
        report["decoder"] = summarise(outcomes, time.monotonic() - begun)
        faults = judge_outcomes(outcomes)
        if config.extraction:
            report["extraction"], more = extract_all(videos, Path(folder) / "out", config.processes)
            faults |= more
        report["faults"] = faults
        keep(videos, faults, Path(config.keep))
    print(json.dumps(report, indent=1) if config.json else describe(report))
    sys.exit(1 if faults else 0)


# --- inputs ---


def make_seeds(folder: Path, corpus: str | None) -> list[Path]:
    """Whole small videos: one of each kind this build of FFmpeg can write, and those of the corpus."""
    from pipelines.media.mp4 import ordinary_priority

    folder.mkdir(parents=True)
    os.environ.setdefault("SVT_LOG", "1")
    made = [folder / f"{codec}-{pixel_format}.{suffix}" for codec, suffix, pixel_format in KINDS]
    with ordinary_priority():
        for path, (codec, _, pixel_format) in zip(made, KINDS, strict=True):
            with suppress(av.error.FFmpegError, ValueError):
                write_seed(path, codec, pixel_format)
    found = sorted(p for p in Path(corpus).rglob("*") if p.is_file()) if corpus else []
    return [p for p in [*made, *found] if p.exists() and 0 < p.stat().st_size <= MAX_CORPUS_BYTES]


def write_seed(path: Path, codec: str, pixel_format: str) -> None:
    name = {"m2v": "mpeg2video", "mjpeg": "mjpeg"}.get(path.suffix[1:])
    with av.open(str(path), "w", format=name) as output:
        stream = output.add_stream(codec, rate=25, options=OPTIONS.get(codec, {}))
        stream.width, stream.height = (352, 288) if codec.startswith("h263") else SIZE
        stream.pix_fmt = pixel_format
        sound = output.add_stream("aac", rate=16000) if path.suffix in (".mp4", ".mov", ".mkv", ".ts") else None
        for index in range(FRAMES):
            picture = np.full((stream.height, stream.width, 3), 20 * index, np.uint8)
            picture[: 8 + index, : 8 + 3 * index] = 255
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = index, Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
            silence.rate = 16000
            output.mux([*sound.encode(silence), *sound.encode()])


def write_damaged(folder: Path, seeds: list[Path], *, files: int, seed: int) -> None:
    """Damaged files, each from its own random numbers, so that file i is the same however many there are."""
    folder.mkdir(parents=True)
    for index in range(files):
        random = np.random.default_rng([seed, index])
        source = seeds[index % len(seeds)]
        data = restamp(source, random, folder) if random.random() < 0.2 else None
        data = source.read_bytes() if data is None else data
        for _ in range(int(random.choice([0, 1, 1, 2, 4]))):
            damage = DAMAGES[int(random.integers(len(DAMAGES)))]
            data = damage(data, random, seeds)
        (folder / f"{index:05d}-{source.stem}{source.suffix}").write_bytes(data or b"\0")
    for leftover in folder.glob("restamped.*"):
        leftover.unlink()


def flip_bytes(data: bytes, random: Random, _: list[Path]) -> bytes:
    damaged = as_array(data)
    places = random.integers(0, max(1, damaged.size), int(2 ** random.integers(0, 8)))
    damaged[places[places < damaged.size]] = random.integers(0, 256)
    return damaged.tobytes()


def flip_bytes_of_the_header(data: bytes, random: Random, seeds: list[Path]) -> bytes:
    split = min(len(data), 400)
    if random.random() < 0.5:  # MP4 may keep its header at the end
        return data[:-split] + flip_bytes(data[-split:], random, seeds)
    return flip_bytes(data[:split], random, seeds) + data[split:]


def set_numbers(data: bytes, random: Random, seeds: list[Path]) -> bytes:
    """Lengths, counts and stamps made huge, negative, zero or equal."""
    damaged = bytearray(data)
    for _ in range(int(random.integers(1, 6))):
        value = random.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x10000, 0x00FFFFFF])
        at = int(random.integers(0, max(1, min(len(data), 2000) if random.random() < 0.7 else len(data))))
        damaged[at : at + 4] = struct.pack(str(random.choice(["<I", ">I"])), int(value))
    return bytes(damaged)


def cut(data: bytes, random: Random, _: list[Path]) -> bytes:
    first, last = sorted(random.integers(0, len(data) + 1, 2).tolist())
    return data[:first] + data[last:] if random.random() < 0.5 else data[:last]


def repeat(data: bytes, random: Random, _: list[Path]) -> bytes:
    first, last = sorted(random.integers(0, len(data) + 1, 2).tolist())
    return (data[:last] + data[first:last] * int(random.integers(1, 20)) + data[last:])[: 4 * MAX_CORPUS_BYTES]


def move(data: bytes, random: Random, _: list[Path]) -> bytes:
    first, second, third = sorted(random.integers(0, len(data) + 1, 3).tolist())
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def swap_halves(data: bytes, random: Random, seeds: list[Path]) -> bytes:
    """The head of this file and the tail of another."""
    other = seeds[int(random.integers(len(seeds)))].read_bytes()
    return data[: int(random.integers(0, len(data) + 1))] + other[int(random.integers(0, len(other) + 1)) :]


def swap_codecs(data: bytes, random: Random, _: list[Path]) -> bytes:
    """Packets of one codec under the name of another."""
    names = [b"avc1", b"hvc1", b"hev1", b"mp4v", b"av01", b"XVID", b"MJPG", b"FLV1", b"H264", b"vp09", b"ap4h", b"WMV2"]
    old, new = (names[int(i)] for i in random.permutation(len(names))[:2])
    present = [name for name in names if name in data] or [old]
    return data.replace(present[int(random.integers(len(present)))], new)


def damage_boxes(data: bytes, random: Random, seeds: list[Path]) -> bytes:
    """Boxes of an MP4, at any depth: one taken out, doubled, moved or given another length."""
    boxes = list(iter_boxes(data, 0, len(data), 0))
    if not boxes:
        return data
    (start, end), (other, _) = (boxes[int(i)] for i in random.integers(0, len(boxes), 2))
    box = data[start:end]
    match int(random.integers(4)):
        case 0:
            return data[:start] + data[end:]
        case 1:
            return data[:end] + box + data[end:]
        case 2:
            rest = data[:start] + data[end:]
            return rest[:other] + box + rest[other:]
    length = int(random.choice([0, 1, 7, len(box) + 1, 0x7FFFFFFF, 0xFFFFFFFF]))
    return data[:start] + struct.pack(">I", length) + data[start + 4 :]


def iter_boxes(data: bytes, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    """(first byte, byte after the last) of each box."""
    while start + 8 <= end and depth < 8:
        (size,), name = struct.unpack_from(">I", data, start), data[start + 4 : start + 8]
        if size < 8 or start + size > end or not name.isalnum():
            return
        yield start, start + size
        if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"udta", b"moof", b"traf"):
            yield from iter_boxes(data, start + 8, start + size, depth + 1)
        start += size


def restamp(source: Path, random: Random, folder: Path) -> bytes | None:
    """The packets of a video in its container again, with other stamps; None where FFmpeg refuses to write them."""
    target = folder / f"restamped{source.suffix}"
    big = int(random.choice([1, 25, 2**31, 2**33, 2**45, -(2**31), 0]))
    kind, at = int(random.integers(5)), int(random.integers(FRAMES))
    with suppress(av.error.FFmpegError, ValueError, OverflowError, IndexError, AttributeError):
        with av.open(str(source)) as reading, av.open(str(target), "w") as writing:
            stream = writing.add_stream_from_template(reading.streams.video[0])
            packets = [packet for packet in reading.demux(video=0) if packet.size]
            for index, packet in enumerate(packets):
                move_stamps(packet, packets[at % len(packets)], kind, big if index >= at else 0)
                packet.stream = stream
                with suppress(av.error.FFmpegError):
                    writing.mux(packet)
        return target.read_bytes()
    return None


def move_stamps(packet: av.Packet[Any], other: av.Packet[Any], kind: int, by: int) -> None:
    match kind:
        case 0:
            packet.pts, packet.dts = (packet.pts or 0) + by, (packet.dts or 0) + by
        case 1:
            packet.pts = (packet.dts or 0) + abs(by)
        case 2:
            packet.pts, packet.dts = other.pts, other.dts
        case 3:
            packet.pts = packet.dts = None
        case 4:
            packet.pts, packet.dts = -(packet.pts or 0), packet.dts


def as_array(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


DAMAGES: list[Callable[[bytes, Random, list[Path]], bytes]] = [
    *(flip_bytes, flip_bytes_of_the_header, set_numbers, set_numbers, cut, repeat, move),
    *(swap_halves, swap_codecs, damage_boxes, damage_boxes),
]


# --- the decoder ---


def make_settings() -> DecodeSettings:
    from pipelines.media.decode import DecodeSettings

    return DecodeSettings(
        short_side=32,
        max_frames=MAX_FRAMES,
        timeout_s=TIMEOUT_S,
        cpu_limit_s=CPU_LIMIT_S,
        memory_limit_mb=MEMORY_MB,
    )


def decode_all(folder: Path, processes: int) -> list[Outcome]:
    """Every file through the decoder process, in the order of their names."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(decode_file, sorted(folder.iterdir()), chunksize=8)


def decode_file(path: Path) -> Outcome:
    from pipelines.errors import VideoError
    from pipelines.media.decoder_process import process_decoder

    begun = time.monotonic()
    frames = process_decoder(make_settings()).frames(path)
    try:
        count = sum(1 for _ in frames)
        verdict = "partial" if frames.info.partial else "whole"
        if not 0 < count == frames.info.frames <= MAX_FRAMES:
            verdict = f"! {count} frames, the decoder says {frames.info.frames}"
    except VideoError as error:
        verdict = error.kind if error.message.strip() else f"! no reason for {error.kind}"
    except Exception as error:  # what this benchmark looks for
        verdict = f"! {type(error).__name__}: {error}"
    seconds = time.monotonic() - begun
    return Outcome(
        name=path.name, verdict=verdict, seconds=seconds, child_mb=peak_mb(frames.pid), own_mb=peak_mb(os.getpid())
    )


def peak_mb(pid: int | None) -> int:
    """Most resident memory of a living process so far, MiB; 0 where it is gone or the system does not say."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return 0


def summarise(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    slowest = sorted(outcomes, key=lambda outcome: -outcome.seconds)[:5]
    return {
        "seconds": round(seconds, 1),
        "verdicts": dict(Counter(outcome.verdict for outcome in outcomes).most_common()),
        "slowest": [asdict(outcome) for outcome in slowest],
        "crashed or hung": [o.name for o in outcomes if o.verdict in ("decoder_crashed", "decoder_hung", "too_slow")],
        "most memory of a decoder, MiB": max(outcome.child_mb for outcome in outcomes),
        "most memory of its parent, MiB": max(outcome.own_mb for outcome in outcomes),
    }


def judge_outcomes(outcomes: list[Outcome]) -> dict[str, str]:
    """Name of each file that broke a promise → which."""
    faults = {outcome.name: outcome.verdict for outcome in outcomes if outcome.verdict.startswith("!")}
    faults |= {o.name: f"took {o.seconds:.0f} s" for o in outcomes if o.seconds > MAX_S}
    grown = max(outcome.own_mb for outcome in outcomes) - min(outcome.own_mb for outcome in outcomes)
    return faults | ({"the parent": f"grew by {grown} MiB"} if grown > GROWTH_MB else {})


# --- the extraction ---


def extract_all(videos: Path, output: Path, processes: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The same files through the command; what it made of them, and which of them, or what else, broke a promise."""
    command = [sys.executable, str(ROOT / "jobs" / "extract_flow.py"), "--videos", str(videos), "--output", str(output)]
    command += ["--short-side", "32", "--max-frames", str(MAX_FRAMES), "--decode-timeout", str(TIMEOUT_S)]
    command += ["--flow-backend", "cpu", "--num-cpus", str(processes)]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=output.parent)
    said = done.stdout + done.stderr
    faults = {} if done.returncode == 0 else {"the extraction": f"exit status {done.returncode}: {said[-2000:]}"}
    died = [line for line in said.splitlines() if WORKER_DIED.search(line)]
    faults |= {"a worker": died[0]} if died else {}
    table = output / "videos.parquet"
    rows = pq.read_table(table).to_pylist() if table.exists() else []
    faults |= {row["source"]: f"ends as {row['status']}: {row['error_message']}" for row in rows if not is_settled(row)}
    unsettled = {path.name for path in videos.iterdir()} - {row["source"] for row in rows}
    faults |= {name: "is in no table" for name in unsettled if not is_left_out(name)}
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "exit status": done.returncode,
        "status": dict(Counter(row["status"] for row in rows)),
        "kinds": dict(Counter(row["error_kind"] for row in rows if row["error_kind"]).most_common()),
        "stages": dict(Counter(row["stage"] for row in rows if row["stage"])),
        "left out by their endings": sum(is_left_out(name) for name in unsettled),
    }, faults


def is_settled(row: dict[str, Any]) -> bool:
    reason = bool(row["error_kind"] and row["error_message"] and row["stage"] == "decode")
    return row["status"] == "ok" or (row["status"] == "quarantined" and reason)


def is_left_out(name: str) -> bool:
    """Whether a catalog takes no file of this ending."""
    from pipelines.datasets.catalog import VIDEO_EXTENSIONS

    return Path(name).suffix.lower() not in VIDEO_EXTENSIONS


def keep(videos: Path, faults: dict[str, str], folder: Path) -> None:
    """Copy what broke something out of the temporary folder."""
    for name in faults:
        if (videos / name).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(videos / name, folder / name)


def describe(report: dict[str, Any]) -> str:
    decoder, extraction = report["decoder"], report.get("extraction")
    parts = [f"{report['files']:,} files from {report['seeds']} seeds, seed {report['seed']}"]
    parts.append(format_table(("decoder", "files"), [(k, f"{v:,}") for k, v in decoder["verdicts"].items()]))
    parts += [f"{name}: {value}" for name, value in decoder.items() if name not in ("verdicts", "slowest")]
    if extraction:
        parts += ["", *(f"extraction {name}: {value}" for name, value in extraction.items())]
    parts += ["", *(f"FAULT {name}: {what}" for name, what in report["faults"].items())]
    return "\n".join([*parts, f"{len(report['faults'])} faults"])


if __name__ == "__main__":
    main()
