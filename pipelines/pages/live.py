"""The page on which a person tries networks on videos, and what it is told of each video, which is also the JSON."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

import markupsafe
import numpy as np
import numpy.typing as npt

from pipelines.evaluation.over_time import Reading
from pipelines.pages.base import TEMPLATES, make_environment
from pipelines.pages.preview import encode_preview


def make_live_page(*, networks: Sequence[str], seconds: float, megabytes: int) -> str:
    """The page: `networks` in words, how much of a video is read, how large one may be."""
    script = (TEMPLATES / "live.js").read_text()
    environment = make_environment()
    environment.globals |= {
        "script": markupsafe.Markup(script),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    template = environment.get_template("live.html.j2")
    return template.render(networks=networks, seconds=seconds, megabytes=megabytes)


def describe_reading(reading: Reading, classes: Sequence[str], *, top: int) -> dict[str, Any]:
    """A video's scores as JSON: for each network its `top` classes by the whole video, with their scores over time."""
    return {
        "seconds": round(reading.seconds, 3),
        "cut": reading.cut,
        "clips": [[round(clip.start, 3), round(clip.end, 3)] for clip in reading.clips],
        "networks": {
            name: [
                {
                    "class": classes[label],
                    "probability": round(float(overall[label]), 4),
                    "over_time": [round(float(value), 4) for value in reading.over_time[name][:, label]],
                }
                for label in _first(overall, top)
            ]
            for name, overall in reading.overall.items()
        },
    }


def describe_preview(reading: Reading) -> dict[str, Any]:
    """The video beside its flow as an mp4 in base64, and how its colours are to be read."""
    preview = encode_preview(reading.frames[: len(reading.flow)], np.asarray(reading.flow), reading.fps)
    return {
        "mp4": base64.b64encode(preview.data).decode(),
        "width": preview.width,
        "height": preview.height,
        "full_colour_px": preview.full_colour_px,
    }


def _first(values: npt.NDArray[np.float64], count: int) -> list[int]:
    # Stable, so that of equal classes the first comes first, as in an evaluation.
    return [int(label) for label in np.argsort(-values, kind="stable")[:count]]
