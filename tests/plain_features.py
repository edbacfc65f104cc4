"""What each preset's features are, written down plainly: whole videos in memory, one window at a time, no Ray.

A function takes RGB frames (n, H, W, 3) uint8 at the preset's rate and size, flow (n - 1, H, W, 2) in pixels, and for
each stream a function from a clip (T, 224, 224, C) in [-1, 1] to its vector. It gives the arrays by their file's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from models.i3d import I3D

Array = npt.NDArray[np.floating]
Networks = Mapping[str, Callable[[Array], Array]]


def see_with(model: I3D) -> Callable[[Array], Array]:
    """The vector of one clip, by a network as it was built."""

    @torch.no_grad()
    def see(clip: Array) -> Array:
        tensor = torch.tensor(clip.copy(), dtype=torch.float32).permute(3, 0, 1, 2)
        return model.eval().pooled_features(tensor[None])[0].numpy()

    return see


def scale(frames: npt.NDArray[np.uint8], flow: Array) -> tuple[Array, Array]:
    """RGB as (x - 127.5) / 127.5; flow clipped at 20 px, in 1023 levels, over 20."""
    return (frames - 127.5) / 127.5, np.rint(np.clip(flow, -20, 20) * (511 / 20)) / 511


def centre(x: Array) -> Array:
    top, left = (x.shape[1] - 224) // 2, (x.shape[2] - 224) // 2
    return x[:, top : top + 224, left : left + 224]


def thumos14(frames: npt.NDArray[np.uint8], flow: Array, see: Networks) -> dict[str, Array]:
    assert frames.shape[1:] == (256, 340, 3)
    rgb, uv = map(centre, scale(frames, np.concatenate([flow, flow[-1:]])))
    starts = [4 * k for k in range((len(frames) - 16) // 4 + 1)]
    return {
        "ID.npy": np.stack([np.concatenate([see["rgb"](rgb[t : t + 16]), see["flow"](uv[t : t + 16])]) for t in starts])
    }


def thumos14_25fps(frames: npt.NDArray[np.uint8], flow: Array, see: Networks) -> dict[str, Array]:
    rgb, uv = map(centre, scale(frames, np.concatenate([flow, flow[-1:]])))
    chunks = range(len(frames) // 16)
    return {
        "rgb/ID.npy": np.stack([see["rgb"](rgb[16 * k : 16 * k + 16]) for k in chunks]),
        "flow/ID.npy": np.stack([see["flow"](uv[16 * k : 16 * k + 16]) for k in chunks]),
    }


def ms_tcn(frames: npt.NDArray[np.uint8], flow: Array, see: Networks) -> dict[str, Array]:
    rgb, uv = map(centre, scale(frames, flow))
    rgb = np.pad(rgb, ((10, 10), (0, 0), (0, 0), (0, 0)))
    uv = np.pad(uv, ((10, 11), (0, 0), (0, 0), (0, 0)))
    columns = [np.concatenate([see["rgb"](rgb[t : t + 21]), see["flow"](uv[t : t + 21])]) for t in range(len(frames))]
    return {"ID.npy": np.stack(columns, axis=1)}


def video_features(frames: npt.NDArray[np.uint8], flow: Array, see: Networks) -> dict[str, Array]:
    rgb, uv = map(centre, scale(frames, flow))
    stacks: dict[str, list[Array]] = {"rgb": [], "flow": []}
    # Frame by frame as there: with one frame more than a stack has, its flow is known.
    for last in range(64, len(frames), 64):
        stacks["rgb"].append(see["rgb"](rgb[last - 64 : last]))
        stacks["flow"].append(see["flow"](uv[last - 64 : last]))
    return {f"ID_{stream}.npy": np.stack(vectors) for stream, vectors in stacks.items()}


def ten_crop(frames: npt.NDArray[np.uint8], flow: Array, see: Networks) -> dict[str, Array]:
    rgb, uv = scale(frames, np.concatenate([flow, flow[-1:]]))
    bottom, right = rgb.shape[1] - 224, rgb.shape[2] - 224
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    vectors = []
    for k in range(len(frames) // 16):
        for turn in (1, -1):
            for top, left in places:
                window = slice(16 * k, 16 * k + 16), slice(top, top + 224), slice(left, left + 224)
                # A mirrored picture moves the other way.
                clips = rgb[window][:, :, ::turn], uv[window][:, :, ::turn] * (turn, 1)
                vectors.append(np.concatenate([see["rgb"](clips[0]), see["flow"](clips[1])]))
    return {"ID.npy": np.stack(vectors).reshape(-1, 10, len(vectors[0]))}


PLAIN = {
    "thumos14": thumos14,
    "thumos14-25fps": thumos14_25fps,
    "ms-tcn": ms_tcn,
    "video-features": video_features,
    "ten-crop": ten_crop,
}
