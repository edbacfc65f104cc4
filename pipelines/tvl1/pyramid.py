"""The sizes of a pyramid's scales, the same for every backend."""

from __future__ import annotations

from pipelines.tvl1.params import TVL1Params


def pyramid_sizes(height: int, width: int, params: TVL1Params) -> list[tuple[int, int]]:
    """(height, width) of each scale, finest first: each scale_step of the one before, none too small."""
    sizes = [(height, width)]
    while len(sizes) < params.num_scales:
        height, width = (round(side * params.scale_step) for side in sizes[-1])
        if min(height, width) < params.min_size:
            break
        sizes.append((height, width))
    return sizes
