"""The command as people run it, its numbers against forward passes made by hand."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from i3d_reference import reference_logits, released_variables
from tensorflow_checkpoint_writer import write_checkpoint
from test_pretrained import as_kinetics_400, as_piergiaj

import models
from jobs import predict
from models import checkpoint
from models.checkpoint import Metadata
from models.input_spec import CHANNELS
from models.video_model import VideoModel
from pipelines import storage, tvl1
from pipelines.datasets.motion_videos import CLASSES, write_motion_videos
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings, decode
from pipelines.training.trained_network import Network

BOUND = 2.0  # px: some of the test video's motion is beyond, so a wrong bound shows


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@torch.no_grad()
def build_small(stream: str, **settings: object) -> VideoModel:
    """A small I3D whose running statistics keep activations alive, so that its logits depend on what it sees."""
    torch.manual_seed(len(stream))
    small = {"width": 0.125, "size": 64, "frames": 16, "test_frames": 24, "num_classes": len(CLASSES)}
    model = models.build("i3d", stream=stream, bn_momentum=1.0, **{**small, **settings})
    model(torch.randn(2, CHANNELS[stream], 16, 64, 64) / 4)
    model.state_dict()["logits.weight"].div_(20)  # to logits of a few units, which the job prints to four decimals
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rgb, flow: our checkpoints; others that do not go with these; video.mp4; rgb.npy, flow.npy."""
    folder = tmp_path_factory.mktemp("predict")
    write_motion_videos(folder / "videos", videos_per_class=1, seed=3, num_frames=40)
    shutil.move(next(folder.rglob("right_0000.mp4")), folder / "video.mp4")
    convention = CodecSettings(bound=BOUND).flow_convention()
    flow = build_small("flow")
    checkpoint.save(folder / "rgb", build_small("rgb"), Metadata(classes=CLASSES))
    checkpoint.save(folder / "flow", flow, Metadata(classes=CLASSES, flow_convention=convention))
    checkpoint.save(folder / "shuffled", flow, Metadata(classes=CLASSES[::-1]))
    checkpoint.save(folder / "two", build_small("flow", num_classes=2), Metadata(classes=("a", "b")))
    checkpoint.save(
        folder / "both", models.build("two_stream", num_classes=2, width=0.125), Metadata(classes=("a", "b"))
    )
    backward = {**convention, "direction": "t+1_to_t"}
    checkpoint.save(folder / "backward", flow, Metadata(classes=CLASSES, flow_convention=backward))
    rng = np.random.default_rng(0)
    for stream, channels in (("rgb", 3), ("flow", 2)):
        np.save(folder / f"{stream}.npy", rng.uniform(-1, 1, (1, 16, 64, 64, channels)).astype(np.float32))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str | Path) -> str:
    """What the job prints."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags)])
    predict.main()
    return capsys.readouterr().out


def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str | Path) -> tuple[int, str]:
    """Exit status and message of the job."""
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, *flags)
    if isinstance(stop.value.code, str):
        return 1, stop.value.code
    return int(stop.value.code or 0), " ".join(capsys.readouterr().err.replace("│", " ").split())


def stream_lines(text: str) -> dict[str, list[str]]:
    """Norm, logit, probability and name of each stream's top class."""
    table = text.split("\n\n")[1].splitlines()[1:]
    return {line.split(maxsplit=1)[0]: line.split(maxsplit=4)[1:] for line in table}


def top_lines(text: str) -> list[list[str]]:
    """Probability, logits (joint, flow, rgb) and name of the top classes."""
    return [line.split(maxsplit=4) for line in text.split("\n\n")[2].splitlines()[1:]]


@torch.no_grad()
def by_hand(files: Path, bound: float = BOUND) -> dict[str, torch.Tensor]:
    """Logits of both streams and their sum: decoded at 74 px, the central 64 × 64, the first 24 frames."""
    frames = np.stack(list(decode(files / "video.mp4", settings=DecodeSettings(short_side=74))))
    flow = tvl1.flow(np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]))
    left = (frames.shape[2] - 64) // 2
    window = np.s_[:24, 5:69, left : left + 64]
    clips = {"rgb": frames[window].astype(np.float32) / 127.5 - 1, "flow": np.clip(flow[window] / bound, -1, 1)}
    logits = {}
    for stream, clip in clips.items():
        model, _ = checkpoint.load(files / stream)
        logits[stream] = model.eval()(torch.from_numpy(clip).permute(3, 0, 1, 2)[None])[0]
    return {**logits, "joint": logits["rgb"] + logits["flow"]}


def assert_tables(text: str, expected: dict[str, torch.Tensor], names: tuple[str, ...]) -> None:
    """Both tables say what the logits say, to the fourth digit after the point."""
    lines = stream_lines(text)
    assert list(lines) == list(expected)
    for stream, row in expected.items():
        norm, logit, probability = map(float, lines[stream][:3])
        assert (norm, logit) == pytest.approx((row.norm().item(), row.max().item()), abs=3e-4)
        assert probability == pytest.approx(row.softmax(0).max().item(), abs=3e-4)
        assert lines[stream][3] == names[int(row.argmax())]
    total = expected["joint"]
    for line, index in zip(top_lines(text), total.argsort(descending=True), strict=False):
        values = [total.softmax(0)[index], total[index], expected["flow"][index], expected["rgb"][index]]
        assert [float(value) for value in line[:4]] == pytest.approx([v.item() for v in values], abs=3e-4)
        assert line[4] == names[int(index)]


def test_a_video_by_both_streams_equals_a_forward_pass_by_hand(files, monkeypatch, capsys) -> None:
    flags = (files / "video.mp4", "--rgb", files / "rgb", "--flow", files / "flow", "--top", "4")
    text = run(monkeypatch, capsys, *flags)
    expected = by_hand(files)
    assert (expected["flow"] - by_hand(files, bound=20)["flow"]).abs().max() > 0.1
    assert len(top_lines(text)) == 4
    assert_tables(text, expected, CLASSES)


def test_one_stream_is_enough(files, monkeypatch, capsys) -> None:
    text = run(monkeypatch, capsys, files / "video.mp4", "--flow", files / "flow")
    assert list(stream_lines(text)) == ["flow"]
    assert float(stream_lines(text)["flow"][1]) == pytest.approx(by_hand(files)["flow"].max().item(), abs=3e-4)


def test_bf16_is_close_but_not_the_same(files, monkeypatch, capsys) -> None:
    flags = (files / "video.mp4", "--rgb", files / "rgb")
    exact, rough = (run(monkeypatch, capsys, *flags, "--precision", name) for name in ("fp32", "bf16"))
    norms = [float(stream_lines(text)["rgb"][0]) for text in (exact, rough)]
    assert norms[0] != norms[1]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_released_files_score_the_clips_that_come_with_them(files, tmp_path, monkeypatch, capsys) -> None:
    variables = {"rgb": released_variables(3), "flow": released_variables(2, seed=1)}
    write_checkpoint(tmp_path / "model.ckpt", as_kinetics_400(variables["rgb"], "RGB"))
    torch.save(as_piergiaj(variables["flow"]), tmp_path / "flow_imagenet.pt")
    names = tuple(f"name of {index}" for index in range(400))
    (tmp_path / "label_map.txt").write_text("\n".join(names) + "\n")
    text = run(monkeypatch, capsys, "--clips", files / "flow.npy", files / "rgb.npy", "--rgb", tmp_path / "model.ckpt",
               "--flow", tmp_path / "flow_imagenet.pt", "--classes", tmp_path / "label_map.txt")  # fmt: skip
    clips = {s: torch.from_numpy(np.load(files / f"{s}.npy")).permute(0, 4, 1, 2, 3) for s in variables}
    logits = {stream: reference_logits(variables[stream], clips[stream])[0] for stream in variables}
    assert_tables(text, {**logits, "joint": logits["rgb"] + logits["flow"]}, names)
    assert len(top_lines(text)) == 5


def test_classes_without_names_are_numbered(files, tmp_path, monkeypatch, capsys) -> None:
    write_checkpoint(tmp_path / "model.ckpt", as_kinetics_400(released_variables(3), "RGB"))
    text = run(monkeypatch, capsys, "--clips", files / "rgb.npy", "--rgb", tmp_path)
    best = int(reference_logits(released_variables(3), predict.read_clip(str(files / "rgb.npy"))[1]).argmax())
    assert stream_lines(text)["rgb"][3] == f"class {best}"


def test_videos_clips_and_names_may_lie_on_s3(files, s3, monkeypatch, capsys) -> None:
    storage.put(f"{s3}/video.mp4", (files / "video.mp4").read_bytes())
    storage.put(f"{s3}/rgb.npy", (files / "rgb.npy").read_bytes())
    storage.put(f"{s3}/names.txt", "\n".join(CLASSES).encode())
    for flags in (["video.mp4"], ["--clips", "rgb.npy"]):
        here, there = ([*flags[:-1], f"{folder}/{flags[-1]}", "--rgb", files / "rgb"] for folder in (files, s3))
        expected = stream_lines(run(monkeypatch, capsys, *here))
        assert stream_lines(run(monkeypatch, capsys, *there, "--classes", f"{s3}/names.txt")) == expected
    status, message = fail(monkeypatch, capsys, f"{s3}/absent.mp4", "--rgb", files / "rgb")
    assert status == 1
    assert message.startswith(f"error: {s3}/absent.mp4: ")


@pytest.mark.parametrize(
    ("status", "flags", "words"),
    [
        (2, "video.mp4", "no network is given"),
        (2, "--rgb rgb", "either a video or --clips"),
        (2, "video.mp4 --clips rgb.npy --rgb rgb", "either a video or --clips"),
        (2, "video.mp4 --rgb rgb --top 0", "--top is 0"),
        (2, "ftp://host/video.mp4 --rgb rgb", "s3://bucket/key"),
        (1, "nowhere.mp4 --rgb rgb", "nowhere.mp4: there is no such file"),
        (1, "rgb/model.json --rgb rgb", "rgb/model.json: FFmpeg"),
        (1, "video.mp4 --rgb nowhere", "--rgb nowhere: no model.json"),
        (1, "video.mp4 --rgb videos", "--rgb videos: no model.json"),
        (1, "video.mp4 --rgb video.mp4", "--rgb video.mp4: video.mp4 is no file of plain PyTorch weights"),
        (1, "video.mp4 --rgb flow", "--rgb flow: this is a network of flow, needed is one of rgb"),
        (1, "video.mp4 --flow both", "--flow both: this is a network of rgb and flow, needed is one of flow"),
        (1, "video.mp4 --flow backward", "--flow backward: The model's flow has the direction 't+1_to_t'"),
        (1, "video.mp4 --rgb rgb --flow two", "--rgb knows 6 classes, --flow 2"),
        (1, "video.mp4 --rgb rgb --flow shuffled", "--rgb and --flow name the classes differently"),
        (
            1,
            "video.mp4 --rgb rgb --classes nowhere.txt",
            "--classes: [Errno 2] No such file or directory: 'nowhere.txt'",
        ),
        (1, "video.mp4 --rgb rgb --classes rgb.npy", "--classes rgb.npy is no UTF-8 text"),
        (1, "video.mp4 --rgb rgb --classes two.txt", "two.txt has 2 names, the networks 6 classes"),
        (1, "video.mp4 --rgb rgb --classes six.txt", "--rgb and --classes name the classes differently"),
        (1, "--clips rgb.npy --rgb rgb --flow flow", "no file of flow"),
        (1, "--clips rgb.npy flow.npy --rgb rgb", "flow.npy is flow, but no network is given by --flow"),
        (1, "--clips rgb.npy rgb.npy --rgb rgb", "two files of rgb"),
        (1, "--clips nowhere.npy --rgb rgb", "--clips: [Errno 2] No such file or directory: 'nowhere.npy'"),
        (1, "--clips two.txt --rgb rgb", "no whole .npy file"),
        (1, "--clips zip.npy --rgb rgb", "no whole .npy file"),
        (1, "--clips objects.npy --rgb rgb", "pickled objects are not read"),
        (1, "--clips grey.npy --rgb rgb", "float32 of shape (1, 16, 64, 64, 1)"),
        (1, "--clips pixels.npy --rgb rgb", "not scaled to [-1, 1]: it has values of 255"),
        (1, "--clips short.npy --rgb rgb", "--rgb: "),
    ],
)
def test_a_mistake_is_one_clear_error(files, monkeypatch, capsys, status, flags, words) -> None:
    monkeypatch.chdir(files)
    (files / "two.txt").write_text("a\nb\n")
    (files / "six.txt").write_text("\n".join("abcdef"))
    (files / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    np.save(files / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(files / "grey.npy", np.zeros((1, 16, 64, 64, 1), np.float32))
    np.save(files / "pixels.npy", np.full((1, 16, 64, 64, 3), 255, np.float32))
    np.save(files / "short.npy", np.zeros((1, 2, 64, 64, 3), np.float32))
    found, message = fail(monkeypatch, capsys, *flags.split())
    assert found == status
    assert words in message
    assert status == 2 or len(message.splitlines()) == 1


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_checkpoint_is_one_clear_error(files, tmp_path, monkeypatch, capsys, damage) -> None:
    shutil.copytree(files / "rgb", tmp_path / "rgb")
    if damage == "cut":
        weights = tmp_path / "rgb" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        (tmp_path / "rgb" / "model.json").write_text(json.dumps({"format": 1}))
    _, message = fail(monkeypatch, capsys, files / "video.mp4", "--rgb", tmp_path / "rgb")
    assert message.startswith(f"error: --rgb {tmp_path / 'rgb'}: the file is damaged")
    assert len(message.splitlines()) == 1


def test_a_video_of_one_frame_has_no_flow(files, tmp_path, monkeypatch, capsys) -> None:
    write_motion_videos(tmp_path, videos_per_class=1, seed=0, num_frames=1)
    video = next(tmp_path.rglob("*.mp4"))
    assert "down" in run(monkeypatch, capsys, video, "--rgb", files / "rgb", "--top", "6")
    assert fail(monkeypatch, capsys, video, "--flow", files / "flow")[1].endswith("at least two frames.")


def test_help_tells_the_published_scores(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["predict.py", "--help"])
    with pytest.raises(SystemExit):
        predict.main()
    text = sys.stdout.getvalue()
    assert all(word in text for word in ("41.8137", "138.468658", "87.108871", "63.252754", "VIDEO", "--clips"))


@torch.no_grad()
def test_scores_that_are_not_finite_are_no_prediction() -> None:
    model = models.build("two_stream", num_classes=2, stream="rgb", width=0.125, size=32)
    clips = torch.zeros(1, 3, 1, 32, 32)
    assert predict.score(Network(model=model), "rgb", clips, "fp32", torch.device("cpu")).isfinite().all()
    for weight in model.parameters():
        weight.fill_(torch.inf)
    with pytest.raises(predict.InputError, match="--rgb: its scores are infinite or not a number"):
        predict.score(Network(model=model), "rgb", clips, "fp32", torch.device("cpu"))
