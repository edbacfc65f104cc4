"""The five networks that the paper compares, by name; torch only, no data and no cluster.

model = models.build("i3d", num_classes=400, stream="flow")
logits = model(torch.zeros(1, 2, 64, 224, 224))
model.input_spec.train.streams["flow"].num_frames   # 64: what a loader must deliver
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.outputs import clip_scores, cross_entropies, video_scores
    from models.registry import (
        CONFIGS,
        NETWORKS,
        build,
        build_from,
        configure,
        input_spec_of,
        name_of,
        setting_names,
    )

__all__ = [
    "CONFIGS",
    "NETWORKS",
    "build",
    "build_from",
    "clip_scores",
    "configure",
    "cross_entropies",
    "input_spec_of",
    "name_of",
    "setting_names",
    "video_scores",
]
_HOMES = dict.fromkeys(__all__, "models.registry")
_HOMES |= dict.fromkeys(("clip_scores", "cross_entropies", "video_scores"), "models.outputs")


def __getattr__(name: str) -> Any:
    # When it is asked for: whoever wants an input spec alone, as a process that cuts clips does, imports no torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
