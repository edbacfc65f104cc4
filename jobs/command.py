"""How a job is run: flags become settings, an error one sentence, a Ctrl-C a promise that can be kept."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import tyro

from pipelines import storage

Settings = TypeVar("Settings")


class FlagError(ValueError):
    """A flag asks for what the cluster does not have, or would lose."""


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


def locate_output(output: str) -> str:
    """The absolute URI of what --output names. Raises FlagError where a submitted job would lose what it writes."""
    here = Path.cwd()
    if not storage.is_remote(output) and not Path(output).is_absolute() and "working_dir_files" in here.parts:
        raise FlagError(
            f"--output is {output}: a submitted job stands in a copy of the project that the cluster deletes after it; "
            "give s3://… or an absolute path that all nodes share"
        )
    return storage.absolute(output)
