"""The numbers that the compiled solver takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """What the solver needs of TVL1Params, with thresholds squared."""

    coupling: np.float32  # theta
    data_step: np.float32  # lambda * theta
    dual_step: np.float32  # tau / theta
    num_warps: int
    num_iterations: int
    median: int
    first_check: int
    check_every: int
    freeze_below: np.float32  # squared pixels
    drop_below: np.float32  # squared pixels
