"""How a job is run: flags become settings, an error one sentence, a Ctrl-C a promise that can be kept.

Exit status of every job: 0 done, 1 an error or findings, 2 flags that do not parse, 130 stopped.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from pipelines import storage
from pipelines.errors import SettingsError, UserError

Settings = TypeVar("Settings")
GOES_ON = "the same command goes on"


def run_command(
    settings: Callable[..., Settings],
    run: Callable[[Settings], object],
    description: str | None,
    *,
    args: Sequence[str] | None = None,
    stopped: str = GOES_ON,
) -> None:
    """Parse the flags and run; where `run` returns a whole number above 0, the process ends with that.

    A UserError, or an OSError of a file that was named, is printed as one sentence; any other error is a fault of ours
    and keeps its traceback. `stopped` is what a Ctrl-C, or SIGTERM as of `ray job stop`, leaves behind.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config = tyro.cli(settings, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))
    try:
        status = run(config)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", flush=True)
        status = 130
    if isinstance(status, int) and status:
        sys.exit(status)


def locate_output(output: str) -> str:
    """The absolute URI of what --output names. Raises SettingsError where a submitted job would lose what it writes."""
    here = Path.cwd()
    if not storage.is_remote(output) and not Path(output).is_absolute() and "working_dir_files" in here.parts:
        raise SettingsError(
            f"--output is {output}: a submitted job stands in a copy of the project that the cluster deletes after it; "
            "give s3://… or an absolute path that all nodes share"
        )
    return storage.absolute(output)
