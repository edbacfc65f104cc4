"""What is shared: a folder that rebuilds the network or the data set, its card, and what reaches the hub of it."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from fixtures_jobs import run_here, succeed
from hub_server import Hub, running_hub
from huggingface_hub import constants
from safetensors.torch import load_file

import models
from models import checkpoint
from models.checkpoint import Metadata
from pipelines import records, storage
from pipelines.clips.sampling import ClipSettings
from pipelines.datasets.motion_videos import CLASSES
from pipelines.datasets.records import read_dataset
from pipelines.evaluation.records import Accuracy, Evaluation, NetworkAccuracy
from pipelines.media.codec import CodecSettings
from pipelines.sharing import cards
from pipelines.training.records import RunRecord, RunResult
from pipelines.training.trained_network import hash_weights, load_network
from pipelines.training.weights_files import Which


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of a flow network, whose last checkpoint is not its best, and an evaluation of the last one."""
    folder = tmp_path / "run"
    metadata = Metadata(
        classes=CLASSES,
        flow_convention=CodecSettings().flow_convention(),
        clips=ClipSettings(short_side=40, flow_bound=8).to_json(),
        extra={"run": {"data": "s3://secret/shards"}},
    )
    for seed, name in enumerate(("last", "best")):
        torch.manual_seed(seed)
        model = models.build("i3d", num_classes=6, stream="flow", width=0.0625, size=32, frames=16, test_frames=24)
        checkpoint.save(folder / "checkpoints" / name, model, metadata)
    described = RunRecord(
        model={}, data="s3://secret/shards", train_videos=12, validation_videos=6, initial="kinetics /home/me/flow.pt",
        optimisation={"batch": 4, "precision": "fp32"}, seed=3,
    )  # fmt: skip
    records.write(str(folder / "run.json"), described)
    result = RunResult(last="checkpoints/last", best="checkpoints/best", metrics={"step": 20})
    records.write(str(folder / "result.json"), result)
    write_evaluation(tmp_path / "evaluation", folder)
    return folder


def hash_of(run: Path, which: Which) -> str:
    return hash_weights(load_network(str(run), which=which).model)


def write_evaluation(folder: Path, run: Path) -> None:
    flow = NetworkAccuracy(of_expected=Accuracy(top1=0.5, top5=0.75), of_evaluated=Accuracy(top1=2 / 3, top5=1.0))
    settings = {
        "data": "shards", "split": "test",
        "protocol": {"name": "paper", "num_clips": None, "num_crops": 1, "flip": False},
        "networks": [
            {"name": "flow", "uri": str(run), "stream": "flow", "which": "last", "weights_sha256": hash_of(run, "last")}
        ],
    }  # fmt: skip
    found = Evaluation(
        expected=8, evaluated=6, missing=1, quarantined=1, failed=0, ignore_missing=False, top1=0.1, top5=None,
        top1_interval_95=None, mean_per_class=None, figures={"flow": flow}, per_class={}, confusion=(), classes=CLASSES,
        settings=settings,
    )  # fmt: skip
    records.write(str(folder / "evaluation.json"), found)


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def run_blocks(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """What each block of Python on a card prints, in the folder that it lies in."""
    monkeypatch.chdir(folder)
    printed = []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert len(block.strip().splitlines()) <= 10
        with redirect_stdout(io.StringIO()) as out:
            exec(block, {})
        printed.append(out.getvalue())
    return printed


def test_a_network_is_rebuilt_from_what_is_shared(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    flags = ["--evaluation", tmp_path / "evaluation", "--dataset", "Motion", "--license", "cc-by-4.0"]
    succeed("export", run, out, *flags)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    own, shared = (load_network(str(folder)) for folder in (run, out))
    assert (shared.classes, shared.settings, shared.model.config) == (own.classes, own.settings, own.model.config)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, own.model.state_dict()[name]), name
    written = "".join((out / name).read_text() for name in ("README.md", "config.json"))
    assert not [place for place in ("s3://", "/home/me", str(tmp_path)) if place in written]
    metadata, text = read_card(out)
    printed = run_blocks(text, monkeypatch, out)
    assert [line.strip() in CLASSES for line in printed] == [True]
    assert metadata["license"] == "cc-by-4.0"


def test_the_card_says_of_what_its_accuracy_is(run: Path, tmp_path: Path) -> None:
    succeed("export", run, tmp_path / "out", "--evaluation", tmp_path / "evaluation", "--dataset", 'Mo"tion: 1')
    metadata, text = read_card(tmp_path / "out")
    assert metadata["model-index"][0]["results"][0] == {
        "task": {"type": "video-classification"},
        "dataset": {"name": 'Mo"tion: 1', "type": 'mo"tion:-1', "split": "test"},
        "metrics": [
            {"type": "accuracy", "name": "top-1 of 8 expected videos", "value": 0.5},
            {"type": "accuracy", "name": "top-5 of 8 expected videos", "value": 0.75},
        ],
    }
    assert "|  | of 8 expected videos | of 6 evaluated videos |" in text
    assert "| top-1 | 50.0% (21.5% to 78.5%) | 66.7% (30.0% to 90.3%) |" in text
    assert "1 missing, 1 undecodable and 0 failed ones are wrong" in text
    assert "Protocol paper: the network's own test clips, centre crop." in text
    assert f"| bound_px | {CodecSettings().flow_convention()['bound_px']} |" in text
    assert "flow is clipped to ± 8 px" in text
    assert "| initial weights | kinetics |" in text
    assert "Not stated. Without one" in text


@pytest.mark.parametrize("which", ["last", "best"])
def test_without_an_evaluation_no_accuracy_is_claimed(run: Path, tmp_path: Path, which: str) -> None:
    succeed("export", run, tmp_path / "out", "--which", which)
    metadata, text = read_card(tmp_path / "out")
    assert "model-index" not in metadata
    assert "no accuracy is claimed" in text
    own = load_file(run / "checkpoints" / which / "weights.safetensors")
    shared = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, shared[name]) for name, tensor in own.items())


def test_the_accuracy_of_weights_that_were_replaced_since_is_refused(run: Path, tmp_path: Path) -> None:
    model, metadata = checkpoint.load(run / "checkpoints" / "best")
    checkpoint.save(run / "checkpoints" / "last", model, metadata)
    done = run_here("export", run, tmp_path / "out", "--evaluation", tmp_path / "evaluation")
    assert "not of the last checkpoint" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_would_be_wrong_to_share_is_refused(run: Path, tmp_path: Path) -> None:
    """The accuracy of another network; a folder with other files; no licence of the hub's; no network at all."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("private")
    refusals = {
        "not of the best checkpoint": (run, "out", "--evaluation", tmp_path / "evaluation", "--which", "best"),
        "is not empty": (run, "full"),
        "--license is 'Apache 2.0'": (run, "out", "--license", "Apache 2.0"),
        "no model.json lies in it": (tmp_path / "evaluation", "out"),
        "--public says who": (run, "out", "--public"),
        "give a folder on this disk": (run, "s3://bucket/out"),
    }
    for reason, (source, out, *flags) in refusals.items():
        target = out if "://" in str(out) else tmp_path / str(out)
        done = run_here("export", source, target, *flags)
        assert done.returncode in (1, 2)
        assert reason in re.sub(r"[│\s]+", " ", done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with running_hub() as hub:
        yield hub


def test_a_network_that_is_pushed_can_be_fetched(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = succeed("export", run, tmp_path / "out", "--push", "me/net")
    assert f"pushed      {hub.url}/me/net" in printed
    assert hub.created == [{"name": "net", "organization": "me", "visibility": "private", "type": "model"}]
    sent = hub.repos["models/me/net"]
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.tokens == {"Bearer hf_of_the_test"}
    # As the reader of the card does, from another folder.
    (tmp_path / "elsewhere").mkdir()
    _, text = read_card(tmp_path / "out")
    assert "snapshot_download('me/net')" in text
    assert [line.strip() in CLASSES for line in run_blocks(text, monkeypatch, tmp_path / "elsewhere")] == [True]


def test_a_card_that_was_completed_is_pushed_as_it_lies(hub: Hub, run: Path, tmp_path: Path) -> None:
    succeed("export", run, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")
    assert "kept" in succeed("export", run, tmp_path / "out", "--push", "me/net", "--public")
    assert hub.repos["models/me/net"]["README.md"].endswith(b"Mine.\n")
    assert hub.created[0]["visibility"] == "public"


def test_a_folder_that_only_has_a_card_is_not_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    """Such as one's own project, or an export of another kind."""
    for name in ("project", "dataset"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("Mine.")
    (tmp_path / "dataset" / "dataset.json").write_text("{}")
    for name in ("project", "dataset"):
        done = run_here("export", run, tmp_path / name, "--push", "me/net")
        assert (done.returncode, "it is no exported model" in done.stderr) == (1, True)
    assert not hub.created


NOBODY = "http://127.0.0.1:1"  # a port at which nobody listens


@pytest.mark.parametrize(
    ("status", "name", "endpoint", "reason"),
    [
        (403, "me/net", None, "--push me/net: .*403"),
        (None, "no such name", None, "--push is 'no such name': give NAMESPACE/NAME"),
        (None, "me/net", NOBODY, "--push me/net: .*refused.* is whole"),
    ],
)
def test_a_hub_that_does_not_take_it_is_one_error(
    hub: Hub, run: Path, tmp_path: Path, status: int | None, name: str, endpoint: str | None, reason: str
) -> None:
    hub.refuse = status
    with patch.object(constants, "ENDPOINT", endpoint or hub.url):
        done = run_here("export", run, tmp_path / "out", "--push", name)
    assert done.returncode == 1
    assert re.search(rf"^error: {reason}", done.stderr, re.MULTILINE), done.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_shards_are_shared_with_their_card(
    hub: Hub, motion_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    succeed("export", motion_shards, out, "--dataset", "Motion", "--license", "cc0-1.0", "--push", "me/data")
    dataset = read_dataset(motion_shards)
    files = {shard.file for shard in dataset.shards} | {"videos.parquet", "dataset.json", "README.md"}
    assert {file.path for file in storage.list_files(str(out))} == files == set(hub.repos["datasets/me/data"])
    assert read_dataset(str(out)) == dataset
    assert {name: (out / name).read_bytes() for name in files} == hub.repos["datasets/me/data"]
    metadata, text = read_card(out)
    assert metadata["configs"][0]["data_files"] == [
        {"split": "train", "path": "shards/train-[0-9]*.parquet"},
        {"split": "test", "path": "shards/test-[0-9]*.parquet"},
    ]
    assert metadata["size_categories"] == ["n<1K"]
    assert "| test | 6 of 8 | 1 | 1 |" in text
    # The card of a folder that was not pushed names the folder.
    succeed("export", motion_shards, tmp_path / "alone")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    printed = run_blocks(read_card(tmp_path / "alone")[1], monkeypatch, tmp_path / "alone")
    assert "'rgb'" in printed[0]
    assert re.search(r"\(25, 40, \d+, 3\) \(24, 40, \d+, 2\)", printed[1])


def test_metadata_survives_any_name() -> None:
    hostile = {"license": "other", "pretty_name": 'a: "b"\n---\n# no', "tags": ["- x", "é"], "empty": []}
    found = yaml.safe_load(cards.front_matter(hostile).strip("-\n"))
    assert found == {key: value for key, value in hostile.items() if value}
    assert cards.table([("a|b", "<script>"), ("c\nd", "`e`")]).splitlines()[0] == r"| a\|b | \<script> |"
