"""Fréchet Video Distance: each dialect against the arithmetic of who published it; the job from files to a number."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fixtures_jobs import NO_GPUS, run_here, succeed
from test_decode import write_video
from torch import Tensor
from torch.nn.functional import interpolate

import models
from models import checkpoint, torchscript
from models.checkpoint import Metadata
from models.folding import fold_batch_norm
from models.torchscript import is_torchscript
from pipelines.datasets.motion_videos import CLASSES, write_motion_videos
from pipelines.errors import NetworkError, OutageError, SettingsError
from pipelines.evaluation import fvd
from pipelines.evaluation.fvd_clips import DIALECTS, ClipChoice, prepare_clips
from pipelines.evaluation.scoring import unless_away
from pipelines.media.decode import DecodeSettings, decode
from pipelines.media.decoder_process import Decoder

SMALL = ("--min-clips", "2", "--frames", "16", *NO_GPUS)


def squeezed(clip: Tensor) -> Tensor:
    """google-research, TATS, cd-fvd: all pixels to 224 × 224, then 2 x / 255 - 1."""
    frames = interpolate(clip.permute(0, 3, 1, 2).float(), (224, 224), mode="bilinear", align_corners=False)
    return 2.0 * frames.transpose(0, 1) / 255.0 - 1


def cropped(clip: Tensor, side: int) -> Tensor:
    """VideoGPT's `preprocess`, doubled to ±1: in [0, 1], the shorter side first, then the centre."""
    video = clip.permute(0, 3, 1, 2).float() / 255.0
    h, w = video.shape[2:]
    scale = side / min(h, w)
    size = (side, math.ceil(w * scale)) if h < w else (math.ceil(h * scale), side)
    video = interpolate(video, size=size, mode="bilinear", align_corners=False)
    top, left = (video.shape[2] - 224) // 2, (video.shape[3] - 224) // 2
    return 2 * (video[:, :, top : top + 224, left : left + 224].permute(1, 0, 2, 3) - 0.5)


PUBLISHED = {
    "stylegan-v": squeezed,
    "videogpt": lambda clip: cropped(clip, 224),
    "features": lambda clip: cropped(clip, 256),
}


@pytest.mark.parametrize("size", [(48, 64), (65, 37), (256, 256), (49, 49), (240, 427), (224, 224)])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_clips_are_prepared_as_published(dialect: str, size: tuple[int, int]) -> None:
    clips = torch.randint(256, (2, 3, *size, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = torch.stack([PUBLISHED[dialect](clip) for clip in clips])
    found = prepare_clips(clips, DIALECTS[dialect])
    assert found.shape == (2, 3, 3, 224, 224)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_frames_at_their_own_rate_and_size(tmp_path: Path) -> None:
    """Of 30 frames a second each picture once, at the size it has."""
    path = write_video(tmp_path / "v.mp4", frames=31, size=(94, 62), times=[round(1000 * n / 30) for n in range(31)])
    with Decoder(DecodeSettings(fps="native", frame_size="native")) as decoder:
        frames = decoder.frames(path)
        native = np.stack(list(frames))
    assert native.shape == (31, 62, 94, 3)
    assert (frames.info.frames, frames.info.height, frames.info.width) == (31, 62, 94)
    assert frames.info.duration == pytest.approx(31 / 30, rel=0.01)
    with av.open(str(path)) as container:
        plain = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(native.astype(int) - plain).mean() < 1


def numbered(length: int) -> list[np.ndarray]:
    return [np.full((1, 1, 3), index, np.uint8) for index in range(length)]


def first_frames(clips: Sequence[np.ndarray]) -> list[int]:
    return [int(clip[0, 0, 0, 0]) for clip in clips]


def test_every_window_is_as_likely() -> None:
    choice = ClipChoice(frames=4, clips_per_video=2)
    places = Counter[int]()
    for video in range(3000):
        clips, length = choice.select(numbered(11), f"v{video}")
        assert length == 11
        assert len(set(first_frames(clips))) == 2
        places.update(first_frames(clips))
    assert sorted(places) == list(range(8))
    # 750 expected of each; a binomial's deviation is 24.
    assert max(abs(count - 750) for count in places.values()) < 110


def test_clips_follow_from_the_seed_and_the_video() -> None:
    choice = ClipChoice(frames=4)
    frames = numbered(200)
    drawn = [first_frames(choice.select(frames, name)[0]) for name in ("a", "b", "a")]
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0] != first_frames(replace(choice, seed=1).select(frames, "a")[0])
    assert choice.starts(200, "a") == choice.starts(200, "a") != choice.starts(200, "b")


@pytest.mark.parametrize(("length", "starts"), [(6, []), (7, [0]), (13, [0]), (14, [0, 7]), (30, [0, 7])])
def test_clips_from_the_first_frame_on(length: int, starts: list[int]) -> None:
    """Four frames, every second: 7 stored ones, two clips at most."""
    choice = ClipChoice(frames=4, frame_step=2, clips_per_video=2, begin="first")
    clips, _ = choice.select(numbered(length), "v")
    assert first_frames(clips) == choice.starts(length, "v") == starts
    assert all(
        clip[:, 0, 0, 0].tolist() == [start + 2 * n for n in range(4)]
        for clip, start in zip(clips, starts, strict=True)
    )
    assert len(ClipChoice(frames=4, frame_step=2).select(numbered(length), "v")[0]) == bool(starts)


@pytest.mark.parametrize("flag", ["frames", "frame_step", "clips_per_video"])
def test_a_choice_of_nothing_is_refused(flag: str) -> None:
    with pytest.raises(SettingsError, match=f"--{flag.replace('_', '-')} is 0"):
        ClipChoice(**{flag: 0})


@torch.no_grad()
def save_network(folder: Path) -> str:
    torch.manual_seed(0)
    model = models.build("i3d", num_classes=5, stream="rgb", width=0.0625, frames=16, bn_momentum=1.0)
    model(torch.randn(2, 3, 16, 224, 224) / 4)
    checkpoint.save(folder, model, Metadata(classes=tuple("abcde")))
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """real/, 6 videos; generated/, 6 others, one more that is too short and one that is broken; weights/."""
    folder = tmp_path_factory.mktemp("fvd")
    write_motion_videos(folder / "real", videos_per_class=1, seed=0, num_frames=18, size=(64, 48))
    write_motion_videos(folder / "generated", videos_per_class=1, seed=1, num_frames=18, size=(48, 64))
    write_video(folder / "generated" / "short.mp4", frames=12)
    (folder / "generated" / "broken.mp4").write_text("This is not a video.\n")
    save_network(folder / "weights")
    return folder


@torch.no_grad()
def plain_distance(sets: Path, dialect: str) -> float:
    """The same by PyTorch and numpy alone, clips from the first frame on."""
    torch.set_num_threads(1)
    model: Any = fold_batch_norm(checkpoint.load(sets / "weights")[0])
    statistics = []
    for name in ("real", "generated"):
        vectors = []
        for path in sorted((sets / name).rglob("*_*.mp4")):
            frames = list(decode(path, settings=fvd.DECODING))[:16]
            x = PUBLISHED[dialect](torch.from_numpy(np.stack(frames)))[None]
            vectors.append((model.pooled_features(x) if dialect == "features" else model(x))[0].double().numpy())
        covariance = np.cov(np.stack(vectors), rowvar=False, bias=dialect == "stylegan-v")
        statistics.append((np.mean(vectors, axis=0), covariance))
    (m1, c1), (m2, c2) = statistics
    roots = np.sqrt(np.maximum(np.linalg.eigvals(c1 @ c2).real, 0))
    return float(np.square(m1 - m2).sum() + np.trace(c1 + c2) - 2 * roots.sum())


@pytest.mark.slow
@pytest.mark.parametrize(
    "dialect", [pytest.param(name, marks=() if name == "stylegan-v" else pytest.mark.soak) for name in DIALECTS]
)
def test_the_job_agrees_with_plain_code(ray_here: None, sets: Path, tmp_path: Path, dialect: str) -> None:
    flags = ["--weights", sets / "weights", "--dialect", dialect, "--begin", "first", *SMALL]
    printed = succeed("fvd", sets / "real", sets / "generated", *flags, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "fvd.json").read_text())
    assert found["fvd"] == pytest.approx(plain_distance(sets, dialect), rel=1e-4)
    assert (found["real"]["clips"], found["generated"]["clips"], found["generated"]["videos"]) == (6, 6, 8)
    assert found["dimensions"] == (64 if dialect == "features" else 5)
    reasons = found["generated"]["failed"]
    assert reasons["short"] == "ShortVideoError: it has 12 frames, a clip spans 16"
    assert reasons["broken"].startswith("VideoError: ")
    assert all(f"failed      {name}: {reason}" in printed for name, reason in reasons.items())


@pytest.mark.slow
def test_statistics_serve_again_and_only_where_they_fit(ray_here: None, sets: Path, tmp_path: Path) -> None:
    flags = ["--weights", sets / "weights", *SMALL]
    succeed("fvd", sets / "real", sets / "real", *flags, "--output", tmp_path)
    assert json.loads((tmp_path / "fvd.json").read_text())["fvd"] < 1e-9
    kept = (tmp_path / "real.npz").read_bytes()
    assert kept != b""
    printed = succeed("fvd", tmp_path / "real.npz", tmp_path / "generated.npz", "--min-clips", "6")
    assert "FVD         0.0000" in printed
    assert "6 clips; statistics" in printed
    refused = run_here("fvd", tmp_path / "real.npz", sets / "real", *flags, "--dialect", "videogpt")
    assert "cannot be compared: dialect is stylegan-v in" in refused.stderr
    few = run_here("fvd", tmp_path / "real.npz", tmp_path / "generated.npz")
    assert few.returncode == 1
    assert "gives 6 clips, and --min-clips is 256" in few.stderr


@pytest.mark.slow
def test_shards_are_a_set_as_well(motion_shards: str, sets: Path, tmp_path: Path) -> None:
    flags = ["--weights", sets / "weights", "--output", tmp_path, *SMALL]
    succeed("fvd", motion_shards, motion_shards, *flags)
    found = json.loads((tmp_path / "fvd.json").read_text())
    assert found["fvd"] < 1e-9
    assert (found["real"]["videos"], found["real"]["clips"]) == (20, 18)
    assert sorted(found["real"]["failed"].values()) == ["missing", "unreadable"]
    assert "no data set of shards" in run_here("fvd", sets / "real", sets / "real", *flags, "--split", "test").stderr


def test_videos_that_are_away_end_the_run(motion_shards: str, tmp_path: Path) -> None:
    videos, _ = fvd.find_videos(motion_shards)
    assert videos.index is not None
    away = str(tmp_path / "away")
    files = [file.replace(videos.index.data, away) for file in videos.index.table["file"].to_pylist()]
    table = videos.index.table.set_column(videos.index.table.schema.get_field_index("file"), "file", [files])
    videos = replace(videos, index=replace(videos.index, data=away, table=table))
    row = fvd.ReadClips(videos, ClipChoice())({"id": 0})
    with pytest.raises(OutageError, match=f"^{away} cannot be read"):
        list(unless_away([row]))


def test_a_folder_that_went_away_ends_the_run(tmp_path: Path) -> None:
    """A mount that is gone leaves an empty folder, or none; one file that is gone costs that file."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.mp4").write_bytes(b"no video")
    videos, _ = fvd.find_videos(str(folder))
    (folder / "a.mp4").unlink()
    row = fvd.ReadClips(videos, ClipChoice())({"id": 0})
    assert list(unless_away([row])) == [row]
    (folder / "b.mp4").unlink()
    for leave in (lambda: None, folder.rmdir):
        leave()
        with pytest.raises(OutageError, match="videos"):
            list(unless_away([fvd.ReadClips(videos, ClipChoice())({"id": 0})]))


def test_vectors_that_are_not_finite_are_no_distance(sets: Path) -> None:
    embedder = fvd.Embedding(weights=str(sets / "weights"), dialect="videogpt", choice=ClipChoice()).load()
    rows = [{"place": n, "error": "", "vectors": np.full((1, 5), value)} for n, value in enumerate((1.0, np.nan))]
    videos = fvd.VideoSet(name="real", ids=("a", "b"))
    with pytest.raises(NetworkError, match="of real 1 of 2 vectors are not finite"):
        fvd.summarise_set(videos, {}, rows, embedder)


class Program(torch.nn.Module):
    """StyleGAN-V's signature around a mean over each third of the picture."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale:
            x = x / 255 * 2 - 1
        if resize:
            x = torch.nn.functional.interpolate(x, size=[x.size(2), 224, 224], mode="trilinear", align_corners=False)
        assert return_features
        return x.reshape(x.size(0), 3, x.size(2), 7, 32, 224).mean(dim=[2, 4, 5]).flatten(1)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    torch.jit.script(Program()).save(str(tmp_path / "i3d_torchscript.pt"))
    return tmp_path / "i3d_torchscript.pt"


def test_a_program_is_not_run_unless_it_is_known_or_trusted(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = fvd.Embedding(weights=str(program), dialect="stylegan-v", choice=ClipChoice())
    clips = np.random.default_rng(0).integers(0, 256, (3, 16, 40, 60, 3), dtype=np.uint8)
    trusted = replace(embedding, trust_torchscript=True).load()
    monkeypatch.setattr(torchscript, "KNOWN", {trusted.hash: "the test's own"})
    known = embedding.load()
    np.testing.assert_array_equal(known(clips), trusted(clips))
    # What the program makes of pixels is what it makes of the same clips prepared here.
    prepared = prepare_clips(torch.from_numpy(clips), DIALECTS["stylegan-v"])
    np.testing.assert_allclose(known(clips), Program()(prepared, return_features=True).numpy(), atol=1e-5)
    with pytest.raises(NetworkError, match="gives logits only"):
        replace(embedding, dialect="features").load()
    monkeypatch.setattr(torchscript, "KNOWN", {})
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(NetworkError, match=rf"is a program, .*{trusted.hash}\): .*--trust-torchscript"):
        embedding.load()


def test_other_jobs_do_not_run_a_program_either(program: Path, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it was loaded"))
    video = next((sets / "real").rglob("*.mp4"))
    refused = run_here("predict", video, "--rgb", program)
    assert refused.returncode == 1
    assert f"error: --rgb {program}: {program} is a TorchScript file, which is a program" in refused.stderr


def test_what_is_no_program_is_told_apart(sets: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("PK")
    assert not any(
        map(is_torchscript, (tmp_path / "state.pt", tmp_path / "text.pt", sets / "weights", tmp_path / "no"))
    )


def test_networks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small = models.build("i3d", num_classes=6, stream="flow", width=0.0625, frames=16)
    checkpoint.save(tmp_path / "flow", small, Metadata(classes=CLASSES))
    with pytest.raises(NetworkError, match="needed is one of rgb"):
        fvd.Embedding(weights=str(tmp_path / "flow"), dialect="features", choice=ClipChoice()).load()
    save_network(tmp_path / "rgb")
    with pytest.raises(SettingsError, match=r"--frames is 2: .*leaves no time steps"):
        fvd.Embedding(weights=str(tmp_path / "rgb"), dialect="features", choice=ClipChoice(frames=2)).load()
    assert "no network is given" in run_here("fvd", "a", "b").stderr
