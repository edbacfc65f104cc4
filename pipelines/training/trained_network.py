"""Networks as users name them: a run's folder, a checkpoint directory or released weights, on disk or s3://."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from models import checkpoint
from models.pretrained import load_released
from models.tensorflow_checkpoint import find_prefix
from models.video_model import VideoModel
from pipelines import storage
from pipelines.clips.sampling import ClipSettings, settings_of
from pipelines.errors import NetworkError
from pipelines.training.weights_files import Which, find_checkpoint, local_checkpoint

# What readers of foreign files raise: a user may name any file at all.
LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, struct.error, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as loaded; `classes` where its file names them, `settings` of how its clips are cut."""

    model: VideoModel
    classes: tuple[str, ...] | None = None
    settings: ClipSettings = field(default_factory=ClipSettings)

    @property
    def streams(self) -> list[str]:
        return list(self.model.input_spec.test.streams)


def load_network(uri: str, *, stream: str | None = None, which: Which = "last") -> Network:
    """The network of a run (its last or best checkpoint), of a checkpoint, or of released weights.

    With `stream` it must be a network of that stream alone; released weights need it. Raises NetworkError.
    """
    with plain_loading(uri):
        network = _load(find_checkpoint(uri, which), stream)
    if stream is not None and network.streams != [stream]:
        raise NetworkError(f"{uri}: this is a network of {' and '.join(network.streams)}, needed is one of {stream}")
    return network


@contextlib.contextmanager
def plain_loading(uri: str) -> Iterator[None]:
    """What reading the file that a user has named raises, as a NetworkError of one sentence."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise NetworkError(f"{uri}: {_explain(error)}") from error


def _load(uri: str, stream: str | None) -> Network:
    if any(storage.exists(storage.join(uri, layout.description)) for layout in checkpoint.LAYOUTS):
        with local_checkpoint(uri) as path:
            model, metadata = checkpoint.load(path)
        check_finite(model)
        return Network(
            model=model, classes=metadata.classes, settings=settings_of(metadata.clips, metadata.flow_convention)
        )
    with local_checkpoint(uri) as path:
        if not Path(path).is_file() and find_prefix(path) is None:
            raise ValueError("no model.json lies in it, no PREFIX.index is there, and it is no file")
        return Network(model=load_released(path, stream=stream))


def check_finite(model: VideoModel) -> None:
    """ValueError for values that are no numbers: the scores would look like those of a network that is merely bad."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are infinite or not a number: its training has diverged")


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of a network's tensors with their names: the same weights from any kind of file give the same."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _explain(error: Exception) -> str:
    """The message of an error in a file as one text; with its type where it comes from the depths of a library."""
    if isinstance(error, OSError | ValueError):
        return str(error)
    message = " ".join(str(error).split())[:300]
    return f"the file is damaged, or is something else ({type(error).__name__}: {message or 'no more is known'})"
