"""How a job is run: flags become settings, an error one sentence, a Ctrl-C a promise that can be kept.

Exit status of every job: 0 done, 1 an error or findings, 2 flags that do not parse, 130 stopped.
"""

from __future__ import annotations

import errno
import itertools
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from pipelines import storage
from pipelines.errors import SettingsError, UserError
from pipelines.garbage import collect_nothing_at_exit

Settings = TypeVar("Settings")
Job = TypeVar("Job")
GOES_ON = "the same command goes on"
# Stores raise these without the file's name.
OUTSIDE = (FileNotFoundError, FileExistsError, PermissionError, ConnectionError, TimeoutError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def run_command(
    settings: Callable[..., Settings],
    run: Callable[[Settings], object],
    description: str | None,
    *,
    args: Sequence[str] | None = None,
    stopped: str = GOES_ON,
) -> None:
    """Parse the flags and run; where `run` returns a whole number above 0, the process ends with that.

    A UserError, or an OSError of a file or of the machine, is printed as one sentence; any other error is a fault of
    ours and keeps its traceback. `stopped` is what a Ctrl-C, or SIGTERM as of `ray job stop`, leaves behind.
    """
    collect_nothing_at_exit()
    # As a KeyboardInterrupt it unwinds locks and actors; by itself SIGTERM ends Python on the spot.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Flags by their own names: --steps, and not --settings.schedule.steps.
    config = tyro.cli(settings, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))
    try:
        status = run(config)
    except (UserError, OSError) as error:
        if not isinstance(error, UserError) and not is_outside(error):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", flush=True)
        status = 130  # what shells report of SIGINT: 128 + 2
    if isinstance(status, int) and status:
        sys.exit(status)


def is_outside(error: OSError) -> bool:
    """Whether an OSError is of a file, the network or the machine, which the user can mend, rather than of our code."""
    return error.filename is not None or isinstance(error, OUTSIDE) or error.errno in FULL


def with_preset(job: type[Job], presets: Mapping[Any, object]) -> type[Job]:
    """The job's settings with those of the preset on the command line, if there is one, for defaults of its flags.

    So a flag wins over the preset, whatever its value, and --help shows what the preset means. `job` has a field
    `settings` that a preset replaces as a whole.
    """
    # Read here, because the preset decides on the defaults with which the flags are parsed.
    words = sys.argv[1:]
    named = [after for word, after in itertools.pairwise(words) if word == "--preset"]
    named += [word.removeprefix("--preset=") for word in words if word.startswith("--preset=")]
    if not named or named[-1] not in presets:  # what is no preset is refused when the flags are parsed
        return job
    default = presets[named[-1]]
    # As a subclass, because tyro reads the default of a flag from its field.
    return make_dataclass(job.__name__, [("settings", type(default), default)], bases=(job,), frozen=True, kw_only=True)


def as_given(uri: str, given: str) -> str:
    """A path at or in what a flag names, as it was given there: users know `out/run`, and not where that lies."""
    return given.rstrip("/") + uri.removeprefix(storage.absolute(given))


def locate_output(output: str) -> str:
    """The absolute URI of what --output names. Raises SettingsError where a submitted job would lose what it writes."""
    # Ray unpacks what was uploaded to working_dir_files, and runs the job there.
    here = Path.cwd()
    if not storage.is_remote(output) and not Path(output).is_absolute() and "working_dir_files" in here.parts:
        raise SettingsError(
            f"--output is {output}: a submitted job stands in a copy of the project that the cluster deletes after it; "
            "give s3://… or an absolute path that all nodes share"
        )
    return storage.absolute(output)
