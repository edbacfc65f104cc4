"""When Python looks for garbage in a process of this project: at its start and at its end there is none to find."""

from __future__ import annotations

import atexit
import gc
import sys


def collect_seldom() -> None:
    """Look for it less often, from before the large imports on.

    Importing torch and ray makes hundreds of thousands of objects that live as long as the process. Looking through
    them again and again, as Python does by itself, takes a quarter of the time of these imports.
    """
    gc.set_threshold(20_000, 10, 10)


def collect_nothing_at_exit() -> None:
    """Have Python end without looking through all that torch and ray have made, which takes a second and more."""
    atexit.register(_freeze)


def _freeze() -> None:
    if "triton" not in sys.modules:  # whose bindings would list on stderr what nobody collected
        gc.freeze()
