"""The steps of a TV-L1 solve as Triton kernels, each over a batch of frame pairs at once.

Fields are float32 arrays (pair, plane, height, pitch) whose rows are padded to `pitch_of(width)`: flow has the planes
u, v, its duals u_x, u_y, v_x, v_y, and the data term grad x, grad y, rho. What the padding holds is never used.

A kernel computes each pixel by the same operations in the same order, whichever program it falls to, so that the flow
of a pair does not depend, to the last bit, on the batch that it is solved in.
"""

from __future__ import annotations

from dataclasses import dataclass

PITCH = 16  # floats: rows start where a GPU loads four at a time, and Triton knows it
# Multiply-add in one rounding: a third of the arithmetic. Triton's own default changes from version to version.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Machine:
    """What the launches are fitted to; the flow does not depend on it.

    units   multiprocessors to keep busy
    strips  strips, and warps, a program; with one, what is the same for a whole warp takes no register of a thread
    rows    rows of a strip that a warp stores, where it stores all that it reads but two
    pixels  pixels a program, in kernels that go by pixels
    """

    units: int
    strips: int = 1
    rows: int = 32
    pixels: int = 256


# Triton's interpreter takes a while for each operation, whatever its size: few programs, short walks.
INTERPRETED = Machine(units=1000, strips=32, rows=8, pixels=4096)


def pitch_of(width: int) -> int:
    """Floats from one row of a field to the next."""
    return -(-width // PITCH) * PITCH
