"""How a job is run: flags become settings, an error one sentence, a Ctrl-C a promise that can be kept."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

Settings = TypeVar("Settings")


def run_command(settings: type[Settings], run: Callable[[Settings], object], description: str | None) -> None:
    """Parse the flags and run; exits with 1 after an error that is the user's to mend, with 130 when stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop` is a Ctrl-C
    config = tyro.cli(settings, description=description)
    try:
        run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", flush=True)
        sys.exit(130)
