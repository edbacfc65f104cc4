"""The page on which networks are tried: what it answers, what it refuses, and a person's way through it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import queue
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from aiohttp import web
from fixtures_browser import DESKTOP, PHONE, Browser, wait_until
from test_predict import build_small

from jobs import predict, serve
from models import checkpoint
from models.checkpoint import Metadata
from pipelines.clips.sampling import EvaluationProtocol
from pipelines.clips.tensors import cut_test_clips
from pipelines.datasets.motion_videos import CLASSES, write_motion_videos
from pipelines.errors import InputError, SettingsError
from pipelines.evaluation.raw_video import compute_flow, read_video
from pipelines.media.codec import CodecSettings
from pipelines.media.decode import DecodeSettings

AUDIT = (Path(__file__).parent / "page_audit.js").read_text()
HOSTILE = b"ffconcat version 1.0\nfile '/etc/passwd'\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rgb, flow: networks of clips of 16 frames; video.mp4 of 40 frames."""
    folder = tmp_path_factory.mktemp("serve")
    write_motion_videos(folder / "videos", videos_per_class=1, seed=3, num_frames=40)
    next(folder.rglob("right_0000.mp4")).rename(folder / "video.mp4")
    for stream in ("rgb", "flow"):
        convention = CodecSettings().flow_convention() if stream == "flow" else None
        checkpoint.save(folder / stream, build_small(stream), Metadata(classes=CLASSES, flow_convention=convention))
    return folder


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[str]:
    """HOST:PORT of a server that reads 1.2 s of videos of at most 1 MB; its temporary files lie in files/temporary."""
    torch.set_num_threads(1)
    (files / "temporary").mkdir()
    before, tempfile.tempdir = tempfile.tempdir, str(files / "temporary")
    config = serve.Serve(rgb=str(files / "rgb"), flow=str(files / "flow"), port=0, max_seconds=1.2, max_upload=1)
    app, said = serve.make_app(config), queue.Queue[str]()
    loop = asyncio.new_event_loop()
    task = loop.create_task(serve.listen(app, 0, on_up=said.put))

    def work() -> None:
        asyncio.set_event_loop(loop)
        with contextlib.closing(loop), contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=work)
    thread.start()
    yield said.get(timeout=60).partition("http://")[2]
    loop.call_soon_threadsafe(task.cancel)
    thread.join()
    tempfile.tempdir = before


def ask(server: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer; the path goes out as it is."""
    connection = http.client.HTTPConnection(server, timeout=120)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if isinstance(body, bytes):
        headers = {"Content-Length": str(len(body)), **headers}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
        connection.send(body or b"")
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def predict_video(server: str, video: bytes, query: str = "") -> dict[str, Any]:
    status, text = ask(server, "POST", f"/api/predict{query}", video)
    assert status == 200, text
    return dict(json.loads(text))


@torch.no_grad()
def test_the_scores_are_those_of_the_networks_on_clips_along_the_video(server: str, files: Path) -> None:
    answer = predict_video(server, (files / "video.mp4").read_bytes())
    frames = read_video(str(files / "video.mp4"), DecodeSettings(short_side=74)).frames[:30]  # 64 px of 224, in 256
    video = {"rgb": frames[:29], "flow": compute_flow(frames, "faithful")}
    protocol = EvaluationProtocol(num_clips=3)  # 29 frames of flow are 1.8 clips, and each part is seen twice
    logits = {}
    for stream, network in predict.load_networks({"rgb": str(files / "rgb"), "flow": str(files / "flow")}).items():
        network.model.eval()
        logits[stream] = network.model(
            cut_test_clips(video, network.model.input_spec, network.settings, protocol)[stream]
        )
    logits["joint"] = logits["rgb"] + logits["flow"]
    assert list(answer["networks"]) == ["rgb", "flow", "joint"]
    assert (answer["seconds"], answer["cut"]) == (1.2, True)
    assert answer["clips"] == [[0.0, 0.64], [0.24, 0.88], [0.52, 1.16]]
    for name, rows in logits.items():
        overall, shown = rows.mean(dim=0).softmax(dim=0), answer["networks"][name]
        order = overall.argsort(descending=True).tolist()[:5]
        assert [one["class"] for one in shown] == [CLASSES[label] for label in order]
        for label, one in zip(order, shown, strict=True):
            assert one["probability"] == pytest.approx(float(overall[label]), abs=2e-3)
            assert one["over_time"] == pytest.approx(rows.softmax(dim=1)[:, label].tolist(), abs=2e-3)


def test_a_preview_comes_only_where_it_is_asked_for(server: str, files: Path) -> None:
    video = (files / "video.mp4").read_bytes()
    assert "preview" not in predict_video(server, video)
    preview = predict_video(server, video, "?preview=1")["preview"]
    with av.open(io.BytesIO(base64.b64decode(preview["mp4"]))) as shown:
        stream = shown.streams.video[0]
        assert (stream.width, stream.height) == (preview["width"], preview["height"]) == (196, 74)
        assert sum(1 for _ in shown.decode(stream)) == 29


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 422, "no video was sent"),
        (b"no video at all" * 100, 422, ""),
        (HOSTILE, 422, ""),
        (b'{"path": "/etc/passwd"}', 422, ""),
        (bytes(1_000_001), 413, "larger than 1 MB"),
    ],
)
def test_what_is_no_video_is_refused_in_a_sentence_without_paths(
    server: str, files: Path, body: bytes, status: int, said: str
) -> None:
    got, text = ask(server, "POST", "/api/predict", body)
    error = json.loads(text)["error"]
    assert (got, said in error) == (status, True), text
    assert error
    assert "/" not in error, "no path of this machine"
    assert os.listdir(files / "temporary") == []  # noqa: PTH208


def test_a_body_in_chunks_is_measured_too(server: str, files: Path) -> None:
    piece = b"%x\r\n%s\r\n" % (600_000, bytes(600_000))

    class Pieces:
        def __iter__(self) -> Iterator[bytes]:
            return iter([piece, piece, b"0\r\n\r\n"])

    status, text = ask(server, "POST", "/api/predict", Pieces(), **{"Transfer-Encoding": "chunked"})
    assert (status, json.loads(text)["error"]) == (413, "the video is larger than 1 MB")
    assert os.listdir(files / "temporary") == []  # noqa: PTH208


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/../../../../etc/passwd", "//etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/style.css"]
)
def test_no_file_of_the_machine_is_served(server: str, path: str) -> None:
    status, text = ask(server, "GET", path)
    assert status in (400, 404)
    assert "root:" not in text


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"}])
def test_the_pages_of_other_sites_are_not_answered(server: str, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/"), ("POST", "/api/predict")):
        status, text = ask(server, method, path, b"", **headers)
        assert (status, "pages of its own only" in text) == (403, True)


def test_a_port_that_is_taken_is_said() -> None:
    app = web.Application()
    app[serve.HOSTS] = set()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=f"^--port is {port}: .* in use. Give another"):
            asyncio.run(serve.listen(app, port))


def test_at_port_80_browsers_leave_the_port_out() -> None:
    assert {"127.0.0.1", "localhost", "localhost:80"} <= serve.name_hosts(80)
    assert serve.name_hosts(8000) == {"127.0.0.1:8000", "localhost:8000"}


def test_more_than_a_few_do_not_wait(server: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "MOST_WAITING", -1)
    status, text = ask(server, "POST", "/api/predict", (files / "video.mp4").read_bytes())
    assert (status, "try again" in text) == (503, True)


def test_networks_that_do_not_go_together_are_refused(files: Path, tmp_path: Path) -> None:
    longer = build_small("flow", frames=32)
    checkpoint.save(tmp_path, longer, Metadata(classes=CLASSES, flow_convention=CodecSettings().flow_convention()))
    with pytest.raises(InputError, match=r"clips of different lengths: (16 and 32|32 and 16) frames"):
        serve.make_app(serve.Serve(rgb=str(files / "rgb"), flow=str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "no network is given"),
        ({"rgb": "x", "port": -1}, "--port is -1"),
        ({"rgb": "x", "max_seconds": 0}, "--max-seconds is 0"),
        ({"rgb": "x", "max_upload": 0}, "--max-upload is 0"),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        serve.Serve(**flags)


DROP = """
const data = new DataTransfer();
data.items.add(new File(["no video at all"], "broken.mp4"));
const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
document.querySelector("#drop").dispatchEvent(drop);
"""


def choose(browser: Browser, path: Path) -> None:
    """Give the page a file, as its dialog does."""
    found = browser.ask("/element", {"using": "css selector", "value": "#file"})
    browser.ask(f"/element/{next(iter(found.values()))}/value", {"text": str(path)})


def test_a_person_chooses_a_video_and_sees_what_happens_in_it(server: str, files: Path, browser: Browser) -> None:
    browser.change(size=PHONE)
    browser.ask("/url", {"url": f"http://{server}/"})
    browser.errors()
    choose(browser, files / "video.mp4")
    wait_until(lambda: browser.run("return document.querySelector('video').readyState >= 2"))
    wait_until(lambda: browser.run("return document.querySelector('video').currentTime > 0"))
    assert browser.run("return Math.round(100 * document.querySelector('video').duration)") == 116
    assert browser.run("return document.querySelector('video').videoWidth") == 196  # two of 74 × 98 px
    titles = browser.run("return [...document.querySelectorAll('h3')].map((title) => title.textContent)")
    assert titles == ["RGB", "Flow", "RGB and flow added"]
    bars = browser.run("return [...document.querySelectorAll('.bars')].map((bars) => bars.children.length)")
    assert bars == [3] * 15
    answer = predict_video(server, (files / "video.mp4").read_bytes())
    names = browser.run("return [...document.querySelectorAll('.seen .data')].map((name) => name.textContent)")
    assert names == [one["class"] for classes in answer["networks"].values() for one in classes]
    heights = browser.run(
        "return [...document.querySelector('.bars').children].map((bar) => parseFloat(bar.style.height))"
    )
    assert heights == pytest.approx([100 * value for value in answer["networks"]["rgb"][0]["over_time"]], abs=0.01)
    browser.run("const video = document.querySelector('video'); video.pause(); video.currentTime = 1.1")
    wait_until(
        lambda: "clip 3 of 3: 0.5 s to 1.2 s of the first 1.2 s" in browser.run("return document.body.innerText")
    )
    assert browser.run("return document.querySelector('.bars').children[2].className") == "on"
    for size, dark in ((PHONE, False), (DESKTOP, True), (DESKTOP, False)):
        browser.change(size=size, dark=dark)
        assert browser.run(AUDIT) == [f"fetched http://{server}/api/predict?preview=1"]
    assert browser.errors() == []


def test_a_dropped_file_that_is_no_video_is_said_on_the_page(server: str, browser: Browser) -> None:
    browser.ask("/url", {"url": f"http://{server}/"})
    browser.run(DROP)
    wait_until(lambda: browser.run("return document.querySelector('#state').className === 'bad'"))
    assert browser.run("return document.querySelector('#state').textContent").startswith("broken.mp4: ")
    assert browser.run("return document.querySelector('#result').hidden")
