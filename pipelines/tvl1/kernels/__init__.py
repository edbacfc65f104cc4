"""The compiled TV-L1 solver in plain numba, run from a per-user copy (kernel_cache.py).

The equations are those of pipelines/tvl1/params.py.
"""

from pipelines.tvl1.kernels.field import LANES, TILE, field_size, read_flow
from pipelines.tvl1.kernels.resampling import downscale, pad_image, upsample
from pipelines.tvl1.kernels.schedule import Schedule
from pipelines.tvl1.kernels.solver import solve_scale
from pipelines.tvl1.kernels.vectors import prefers_512

__all__ = [
    "LANES",
    "TILE",
    "Schedule",
    "downscale",
    "field_size",
    "pad_image",
    "prefers_512",
    "read_flow",
    "solve_scale",
    "upsample",
]
