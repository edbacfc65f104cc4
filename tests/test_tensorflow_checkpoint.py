"""The reader of TensorFlow's checkpoint files, on files of the same format and on damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from tensorflow_checkpoint_writer import write_checkpoint

from models.tensorflow_checkpoint import find_prefix, read_tensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    named = {f"RGB/layer_{i:03d}/w": torch.randn(1 + i % 3, 200, 2) for i in range(90)}
    return {**named, "scalar": torch.tensor(2.5), "RGB/layer_000/b": torch.randn(5)}


@pytest.mark.parametrize("entries_per_block", [1, 17, 1000])
def test_every_tensor_comes_back(tmp_path, tensors, entries_per_block):
    write_checkpoint(tmp_path / "model.ckpt", tensors, entries_per_block=entries_per_block)
    found = read_tensors(tmp_path / "model.ckpt")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_path_means_its_prefix(tmp_path, tensors):
    write_checkpoint(tmp_path / "model.ckpt", tensors)
    for path in (tmp_path, tmp_path / "model.ckpt", tmp_path / "model.ckpt.index", str(tmp_path)):
        assert find_prefix(path) == tmp_path / "model.ckpt"
    assert find_prefix(tmp_path / "absent") is None
    write_checkpoint(tmp_path / "other", tensors)
    with pytest.raises(ValueError, match=r"2 checkpoints \(model.ckpt.index, other.index\)"):
        find_prefix(tmp_path)


def damaged(path: Path, change) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(bytes(content))


def test_damage_is_named(tmp_path, tensors):
    prefix = tmp_path / "model"
    index, data = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
    write_checkpoint(prefix, tensors)
    damaged(index, lambda content: content.__setitem__(slice(-8, None), b"notmagic"))
    with pytest.raises(ValueError, match="magic number"):
        read_tensors(prefix)
    write_checkpoint(prefix, tensors)
    damaged(data, lambda content: content.__delitem__(slice(-100, None)))
    with pytest.raises(ValueError, match="does not fit"):
        read_tensors(prefix)
    data.unlink()
    with pytest.raises(ValueError, match="data-00000-of-00001 is missing"):
        read_tensors(prefix)


def test_a_compressed_table_is_refused(tmp_path):
    write_checkpoint(tmp_path / "model", {"w": torch.zeros(2)})
    index = tmp_path / "model.index"
    compression = index.read_bytes().index(b"\0\xde\xad\xbe\xef")
    damaged(index, lambda content: content.__setitem__(compression, 1))
    with pytest.raises(ValueError, match="compressed"):
        read_tensors(tmp_path / "model")


def test_a_file_of_nothing_but_a_footer_is_refused(tmp_path):
    (tmp_path / "model.index").write_bytes(b"\x80" * 40 + struct.pack("<Q", 0xDB4775248B80FB57))
    (tmp_path / "model.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(ValueError, match="cut off"):
        read_tensors(tmp_path / "model")
