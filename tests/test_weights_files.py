"""Weights by URI: what lies on S3 is read like what lies on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorflow_checkpoint_writer import write_checkpoint

import models
from models import checkpoint
from models.checkpoint import Metadata
from models.pretrained import read_released
from pipelines import storage
from pipelines.errors import NetworkError
from pipelines.training.trained_network import load_network
from pipelines.training.weights_files import local_checkpoint


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.put(f"{uri}/{path.relative_to(folder)}", path.read_bytes())


@pytest.mark.parametrize("name", ["w.pt", "model.ckpt", "model.ckpt.index", ""])
def test_released_weights_on_s3_are_those_on_disk(s3: str, tmp_path: Path, name: str) -> None:
    tensors = {"a/w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
    torch.save(tensors, tmp_path / "w.pt")
    write_checkpoint(tmp_path / "model.ckpt", tensors)
    upload(tmp_path, f"{s3}/weights")
    storage.put(f"{s3}/weights/model.ckpt-old/x", b"another one's")
    with local_checkpoint(f"{s3}/weights/{name}".rstrip("/")) as path:
        found = read_released(path)
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert not Path(path).exists()


def test_a_run_and_a_checkpoint_on_s3_are_networks(s3: str, tmp_path: Path) -> None:
    model = models.build("i3d", stream="rgb", num_classes=2, width=0.125, size=32, frames=16)
    checkpoint.save(tmp_path / "checkpoints" / "step-1", model, Metadata(classes=("a", "b")))
    (tmp_path / "result.json").write_text(json.dumps(dict.fromkeys(("last", "best"), "checkpoints/step-1")))
    upload(tmp_path, f"{s3}/run")
    for uri in (f"{s3}/run", f"{s3}/run/checkpoints/step-1"):
        assert load_network(uri, stream="rgb").classes == ("a", "b")


def test_what_is_not_on_s3_is_said(s3: str) -> None:
    for uri in (f"{s3}/absent.pt", f"{s3}/absent/model.ckpt"):
        with pytest.raises(NetworkError, match=rf"{uri}: no model.json lies in it, no PREFIX.index is there"):
            load_network(uri, stream="rgb")
