"""TV-L1 optical flow: one front door for a CPU kernel, a torch kernel (CUDA and CPU) and OpenCV as reference.

Flow is from frame t to t+1, in pixels, u to the right and v down. Importing this package loads no compiler and no
framework; a backend is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator
from types import ModuleType

import numpy as np

from pipelines.tvl1.params import PRESETS, TVL1Params, preset_params

__all__ = [
    "BACKENDS",
    "PRESETS",
    "TVL1Params",
    "flow",
    "is_compiled",
    "iter_flow",
    "kernel_target",
    "prewarm",
    "resolve_backend",
]

BACKENDS = ("auto", "cpu", "torch", "opencv")
_MODULES = {"cpu": "cpu", "torch": "torch_backend", "opencv": "opencv"}


def flow(
    frames: np.ndarray, *, preset: str = "faithful", params: TVL1Params | None = None, backend: str = "auto"
) -> np.ndarray:
    """TV-L1 flow of (T, H, W) uint8 grey frames as (T-1, H, W, 2) float32; empty for T = 0 and T = 1.

    `params` overrides `preset`. ValueError for frames of another shape or dtype, an unknown preset or backend.
    """
    if not isinstance(frames, np.ndarray) or frames.ndim != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {_describe(frames)}; pass a uint8 array of shape (T, H, W)")
    num_frames, height, width = frames.shape
    flows = np.empty((max(num_frames - 1, 0), height, width, 2), np.float32)
    for index, field in enumerate(iter_flow(frames, preset=preset, params=params, backend=backend)):
        flows[index] = field
    return flows


def iter_flow(
    frames: Iterable[np.ndarray],
    *,
    preset: str = "faithful",
    params: TVL1Params | None = None,
    backend: str = "auto",
    batch_size: int = 16,
) -> Iterator[np.ndarray]:
    """Flow (H, W, 2) float32 of each (H, W) uint8 grey frame to the next, as the frames come.

    Holds two frames, however long the video; the torch backend holds and solves batch_size pairs at once, with the
    same result for any size. The arguments are checked at once, the frames when they are reached: ValueError for one
    that is not uint8, not 2-D, empty, or unlike the first in shape.
    """
    settings = params or preset_params(preset)
    backend = resolve_backend(backend)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    module = _load(backend)
    if backend == "opencv":
        settings = module.settings_of(params) if params else module.PRESET_SETTINGS[preset]
    if backend == "torch":
        return module.iter_flow(_checked(frames), settings, batch_size)
    return module.iter_flow(_checked(frames), settings)


def resolve_backend(backend: str) -> str:
    """The backend that `backend` means on this worker: "auto" is torch where it has a CUDA device, else cpu."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    import torch

    return "torch" if torch.cuda.is_available() else "cpu"


def kernel_target(backend: str = "auto") -> str:
    """What computes the flow and for which processor family it is compiled; part of a data set's fingerprint.

    Float results are the same bit for bit within one target, and differ in the last digits between targets.
    """
    return _load(resolve_backend(backend)).describe_target()


def is_compiled(backend: str = "auto") -> bool:
    """Whether `prewarm` is quick on this machine; else it compiles for some 15 s."""
    backend = resolve_backend(backend)
    return backend != "cpu" or bool(_load(backend).is_compiled())


def prewarm(backend: str = "auto") -> None:
    """Compile, or load from this node's cache, what `flow` will run; every worker of the node then starts at once."""
    still = np.zeros((2, 32, 32), np.uint8)
    flow(still, backend=backend)


def _load(backend: str) -> ModuleType:
    """The module of a backend, which has iter_flow(frames, settings) and describe_target()."""
    return importlib.import_module(f"pipelines.tvl1.{_MODULES[backend]}")


def _checked(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        return
    for frame in itertools.chain([first], iterator):
        if not isinstance(frame, np.ndarray) or frame.ndim != 2 or frame.dtype != np.uint8 or frame.size == 0:
            raise ValueError(f"a frame is {_describe(frame)}; pass uint8 arrays of shape (H, W), not empty")
        if frame.shape != first.shape:
            raise ValueError(f"a frame has shape {frame.shape} after {first.shape}; resize all frames to one shape")
        yield frame


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"
