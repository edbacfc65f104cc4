"""The five networks that the paper compares, by name; torch only, no data and no cluster.

model = models.build("i3d", num_classes=400, stream="flow")
logits = model(torch.zeros(1, 2, 64, 224, 224))
model.input_spec.train.streams["flow"].num_frames   # 64: what a loader must deliver
"""

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
