"""The settings of TV-L1 flow and the three presets, each with its source.

Zach, Pock & Bischof, "A Duality Based Approach for Realtime TV-L1 Optical Flow" (DAGM 2007) give the equations, and
Sánchez, Meinhardt-Llopis & Facciolo, "TV-L1 Optical Flow Estimation" (IPOL 2013) the scheme that OpenCV follows. The
settings refer to these four, with rho(u) = I1(x + u0) + grad I1 . (u - u0) - I0, and p the dual of a component:

    energy   sum |grad u| + |grad v| + lambda |I1(x + (u, v)) - I0|
    relaxed  sum |grad u| + |grad v| + |(u, v) - (u', v')|^2 / (2 theta) + lambda |rho(u', v')|
    primal   u <- u + clamp(-rho(u) / |grad I1|^2, +-lambda theta) grad I1 + theta div p
    dual     p <- (p + tau / theta grad u) / (1 + tau / theta |grad u|)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

FlowPreset = Literal["faithful", "quality", "fast"]


@dataclass(frozen=True, kw_only=True)
class TVL1Params:
    """Settings of one TV-L1 solver; images are in grey levels 0-255, flow and its thresholds in pixels of their scale.

    tau: step of the dual equation (Zach et al.); at most 1/4, above which it diverges.
    lambda_: weight of the data term in the energy (Zach et al.).
    theta: tightness of the coupling in the relaxed energy (Zach et al.).
    num_scales: at most so many pyramid scales (Sánchez et al., N_scales); fewer where min_size is reached.
    scale_step: size of a scale relative to the finer one, 0.3 to 0.95 (Sánchez et al., eta).
    min_size: no scale has a side shorter than this, except the finest, in pixels (ours).
    num_warps: linearisations rho around the current flow, per scale (Sánchez et al., N_warps).
    num_iterations: primal and dual steps per warp, before any early stop (Sánchez et al., N_maxiter).
    median: side of the median filter on u and v after each warp, 1 (none) or 3 (Wedel et al., "An Improved Algorithm
        for TV-L1 Optical Flow", 2009).
    first_check, check_every: after which iterations of a warp the change is measured, per tile of 16x16 pixels (ours).
    freeze_below: a tile rests until the next warp when the RMS change of one iteration, in it and in the eight tiles
        around it, is below this many pixels; 0 never (the epsilon of Sánchez et al., on tiles instead of the frame).
    drop_below: a tile whose change at the first check, taken likewise, is below this many pixels is left out of the
        further warps of its scale; 0 never (ours).

    Raises ValueError for values outside of these ranges.
    """

    tau: float = 0.25
    lambda_: float = 0.15
    theta: float = 0.3
    num_scales: int = 10
    scale_step: float = 0.8
    min_size: int = 16
    num_warps: int = 4
    num_iterations: int = 25
    median: int = 3
    first_check: int = 10
    check_every: int = 5
    freeze_below: float = 0.010
    drop_below: float = 0.025

    def __post_init__(self) -> None:
        for name in ("lambda_", "theta"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name in ("num_scales", "min_size", "num_warps", "num_iterations", "first_check", "check_every"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("freeze_below", "drop_below"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 (never) or above")
        _require(0 < self.tau <= 0.25, "tau", self.tau, "above 0 and at most 0.25")
        _require(0.3 <= self.scale_step <= 0.95, "scale_step", self.scale_step, "from 0.3 to 0.95")
        _require(self.median in (1, 3), "median", self.median, "1 (none) or 3")


def _require(holds: bool, name: str, value: float, allowed: str) -> None:
    if not holds:
        raise ValueError(f"TVL1Params.{name} is {value}; it must be {allowed}")


PRESETS: Mapping[str, TVL1Params] = MappingProxyType(
    {
        "faithful": TVL1Params(),
        "quality": TVL1Params(num_iterations=40),
        "fast": TVL1Params(num_warps=3, num_iterations=15, theta=0.25, first_check=8, check_every=4),
    }
)


def preset_params(preset: str) -> TVL1Params:
    """The settings a preset stands for; ValueError for a name that is none."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}, or pass params")
    return PRESETS[preset]
