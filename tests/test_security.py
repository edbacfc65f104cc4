"""What hostile inputs try: to write elsewhere, to reach the network, to run code, to be echoed; see SECURITY.md."""

from __future__ import annotations

import csv
import io
import pickle
import re
import socket
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shard_rows import encode_shard
from test_decode import write_video

from jobs.evaluate import Evaluate
from jobs.extract_features import ExtractFeatures
from jobs.extract_flow import ExtractFlow
from jobs.predict import Predict, read_clip
from jobs.train import Train
from jobs.tune import Tune
from jobs.verify import Verify
from models.checkpoint import load_training_state
from pipelines import records
from pipelines.datasets import shards
from pipelines.datasets.annotations import is_id, make_id, read_annotations
from pipelines.datasets.records import ShardConvention, read_dataset
from pipelines.datasets.shards import ShardSettings
from pipelines.datasets.video_index import read_index
from pipelines.errors import CatalogError, DataError, InputError, NetworkError, VideoError
from pipelines.media import mp4
from pipelines.media.decode import DecodeSettings
from pipelines.media.decoder_process import ROOT, Decoder
from pipelines.training.settings import PRESETS
from pipelines.training.trained_network import load_network

EVIL_NAMES = [
    "../../x",
    "/etc/x",
    "..",
    ".",
    "a/../../../x",
    "..\\..\\x",
    "C:\\x",
    "x\0y",
    "~/x",
    "-rf",
    "x\ny",
    "é" * 500,
]


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_an_id_is_the_name_of_a_file_in_its_folder(name: str) -> None:
    made = make_id(name)
    assert is_id(made)
    assert made not in ("", ".", "..")
    assert not re.search(r"[/\\\0.\s]", made)
    assert len(made.encode()) <= 200


@pytest.mark.parametrize("path", ["../../x.mp4", "/etc/passwd", "a/../../x.mp4", "x\0.mp4", "s3://elsewhere/x.mp4", ""])
def test_a_path_that_leads_out_of_the_videos_folder_is_refused(tmp_path: Path, path: str) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), (path, "a")])
    with pytest.raises(CatalogError, match="1 path outside the videos folder"):
        read_annotations([str(tmp_path / "list.csv")])


@pytest.mark.parametrize("split", ["../../x", "/etc", "a/b", ".", "a\\b", "x\0y", "x" * 65, "é" * 64])
def test_a_split_that_is_no_name_of_a_file_is_refused(tmp_path: Path, split: str) -> None:
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), ("x.mp4", "a", split)])
    with pytest.raises(CatalogError, match="unusable split name"):
        read_annotations([str(tmp_path / "list.csv")])


def make_row(name: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(shards.ROW_SCHEMA.names)
    return {**row, "id": name, "label": 0, "class_name": "../../class", "split": "train", "rgb": b"r", "flow": b"f"}


def test_no_member_of_a_tar_leads_out_of_the_folder_that_it_is_unpacked_in(tmp_path: Path) -> None:
    with (tmp_path / "k.csv").open("w", newline="") as file:
        names = [name for name in EVIL_NAMES if "\0" not in name]
        rows = [(name, "../../class", 0, 10) for name in names]
        csv.writer(file).writerows([("youtube_id", "label", "time_start", "time_end"), *rows])
    ids = [row.id for row in read_annotations([str(tmp_path / "k.csv")]).rows]
    convention = ShardConvention(flow={}, members={"rgb": "rgb.mp4", "flow": "flow.mp4"})
    data = encode_shard([make_row(name) for name in ids], ShardSettings(format="webdataset"), convention)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert len(tar.getmembers()) == 3 * len(names)
        assert all(member.isfile() and not re.search(r"[/\\\0]|^\.", member.name) for member in tar)
        tar.extractall(tmp_path / "inner" / "out", filter="fully_trusted")
    assert {path.parent for path in tmp_path.rglob("*.mp4")} == {tmp_path / "inner" / "out"}


@pytest.mark.parametrize("spoil", ["id", "file"])
def test_a_data_set_whose_names_lead_elsewhere_is_not_read(motion_shards: str, tmp_path: Path, spoil: str) -> None:
    described = read_dataset(motion_shards)
    table = pq.read_table(f"{motion_shards}/videos.parquet")
    if spoil == "id":
        ids = pa.array(["../../x", *table["id"].to_pylist()[1:]])
        table = table.set_column(table.schema.get_field_index("id"), "id", ids)
    else:
        outside = replace(described.shards[0], file="shards/../../x.parquet")
        described = replace(described, shards=(outside, *described.shards[1:]))
    pq.write_table(table, tmp_path / "videos.parquet")
    (tmp_path / "dataset.json").write_bytes(records.encode(described))
    with pytest.raises(DataError, match="names of videos or shards are not as"):
        read_index(str(tmp_path))


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{url}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="0" bandwidth="1"><BaseURL>{url}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A server that answers nobody; whoever connects stays in its queue."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        yield server


def connected(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except TimeoutError:
        return False
    return True


def fill(kind: str, server: socket.socket, target: str) -> bytes:
    url = target.format(port=server.getsockname()[1])
    return PLAYLISTS[kind].format(url=url).encode()


def test_the_listener_notices_a_player_that_follows_playlists(listener: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "x.m3u8").write_bytes(fill("hls", listener, "http://127.0.0.1:{port}/x.ts"))
    follow = {"protocol_whitelist": "file,http,tcp"}
    with pytest.raises(av.FFmpegError):
        av.open(str(tmp_path / "x.m3u8"), timeout=1.0, options=follow)
    assert connected(listener)


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_is_not_followed(listener: socket.socket, tmp_path: Path, kind: str) -> None:
    targets = ["http://127.0.0.1:{port}/x.ts", "tcp://127.0.0.1:{port}", "file:///etc/passwd", f"{tmp_path}/good.mp4"]
    write_video(tmp_path / "good.mp4", frames=5)
    with Decoder(DecodeSettings(short_side=32, timeout_s=20)) as decoder:
        for target in targets:
            for extension in ("mp4", "m3u8", "ts"):
                (tmp_path / f"x.{extension}").write_bytes(fill(kind, listener, target))
                with pytest.raises(VideoError) as error:
                    list(decoder.frames(tmp_path / f"x.{extension}"))
                assert error.value.kind in ("unreadable", "no_video_stream", "no_frames")
    assert not connected(listener)


@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_blob_of_a_shard_is_no_playlist(listener: socket.socket, kind: str) -> None:
    for target in ("http://127.0.0.1:{port}/x.ts", "file:///etc/passwd"):
        for read in (mp4.read_frames, mp4.find_keyframes):
            with pytest.raises(av.FFmpegError):
                list(read(fill(kind, listener, target)))
    assert not connected(listener)


def test_the_decoder_s_processor_time_is_limited(tmp_path: Path) -> None:
    video = write_video(tmp_path / "long.mp4", frames=3000, size=(96, 64))
    endless = DecodeSettings(short_side=256, fps=1000, max_frames=10**7, cpu_limit_s=1)
    with Decoder(endless) as decoder:
        with pytest.raises(VideoError, match="more processor time than --decode-cpu-limit 1") as error:
            for _ in decoder.frames(video):
                pass
        assert error.value.kind == "too_slow"
        assert len(list(decoder.frames(video, start=0, end=0.1))) == 100


def test_the_kernel_holds_the_decoder_s_limits(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", frames=25, size=(96, 64))
    with Decoder(DecodeSettings(short_side=32)) as decoder:
        frames = decoder.frames(video)
        next(frames)
        limits = Path(f"/proc/{frames.pid}/limits").read_text()
        frames.close()
    soft = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()}
    assert soft["Max address space"] == str(3072 << 20)
    assert soft["Max file size"] == str(1 << 20)
    assert soft["Max core file size"] == "0"
    assert 3600 < int(soft["Max cpu time"]) < 3700


class Evil:
    """Unpickled, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that is there if anything was unpickled."""
    yield tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_the_trap_is_one(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "run")))
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("torch_made", [True, False])
@pytest.mark.parametrize("name", ["rgb_imagenet.pt", "model.ckpt", "weights.safetensors"])
def test_released_weights_run_no_code(tmp_path: Path, trap: Path, name: str, torch_made: bool) -> None:
    data = {"conv1": Evil(trap)}
    if torch_made:
        torch.save(data, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(data, protocol=2))
    with pytest.raises(NetworkError, match=r"pickled code run is not read|is something else"):
        load_network(str(tmp_path / name), stream="rgb")


def test_a_checkpoint_runs_no_code(tmp_path: Path, trap: Path) -> None:
    torch.save({"optimizer": Evil(trap)}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="pickled code run is not read"):
        load_training_state(tmp_path)


def test_an_array_runs_no_code(tmp_path: Path, trap: Path) -> None:
    np.save(tmp_path / "clip.npy", np.array([Evil(trap)], object), allow_pickle=True)
    with pytest.raises(InputError, match="pickled objects are not read"):
        read_clip(str(tmp_path / "clip.npy"))


def test_the_source_unpickles_nothing() -> None:
    forbidden = re.compile(
        r"pickle\.loads?\(|Unpickler|allow_pickle=True|weights_only=False|torch\.load\((?!.*weights_only=True)|"
        r"\bnp\.load\((?!.*allow_pickle=False)|joblib|yaml\.load\(|\bshelve|\bmarshal|(?<!\.)\b(eval|exec)\(|Tuner\.restore"
    )
    paths = [path for folder in ("pipelines", "models", "jobs") for path in (ROOT / folder).rglob("*.py")]
    found = [f"{path}: {line}" for path in paths for line in path.read_text().splitlines() if forbidden.search(line)]
    assert len(paths) > 60
    assert found == []


KEYED = "s3://AKIAHIDDEN:t0pSecret@bucket/x"
DEBUG = PRESETS["debug"]
TRAIN = {"data": "d", "output": "o", "settings": DEBUG}


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        (ExtractFlow, {"videos": KEYED, "output": "o"}),
        (ExtractFlow, {"videos": "v", "output": KEYED}),
        (ExtractFlow, {"videos": "v", "output": "o", "annotations": (KEYED,)}),
        *[(Train, {**TRAIN, name: KEYED}) for name in ("data", "output", "from_sweep")],
        (Train, {**TRAIN, "annotations": (KEYED,)}),
        (Train, {**TRAIN, "settings": DEBUG.change(initial={"source": "kinetics", "weights": KEYED})}),
        (Tune, {**TRAIN, "data": KEYED}),
        *[
            (Evaluate, {"data": "d", "output": "o", "rgb": "r", name: KEYED})
            for name in ("data", "output", "rgb", "flow")
        ],
        (Evaluate, {"data": "d", "output": "o", "model": KEYED}),
        (Predict, {"video": KEYED, "rgb": "r"}),
        *[(Predict, {"video": "v", "rgb": "r", name: KEYED}) for name in ("rgb", "flow", "classes")],
        (Predict, {"clips": (KEYED,), "rgb": "r"}),
        (ExtractFeatures, {"videos": KEYED, "output": "o", "rgb": "r"}),
        *[
            (ExtractFeatures, {"data": "d", "output": "o", "rgb": "r", name: KEYED})
            for name in ("data", "output", "rgb", "flow")
        ],
        (Verify, {"data": KEYED}),
        (Verify, {"data": "d", "videos": KEYED}),
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(job: type, flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Credentials and endpoint belong into the store's own variables") as error:
        job(**flags)
    assert not re.search("AKIAHIDDEN|t0pSecret", str(error.value))
