"""What goes wrong, in two trees: what a user can mend, and what is wrong with one video.

UserError                    a job prints it as `error: …` and exits with 1; anything else keeps its traceback
├── SettingsError            a flag or a setting that cannot be, or cannot be together with another
├── CatalogError             videos or annotation files
├── DataError                shards, or another folder that a job wrote: absent, unfinished, damaged, of other classes
│   ├── RecordError          a JSON file of a job is damaged, or is something else
│   └── ConventionError      shards that store their flow or RGB in a way that this version does not know
├── NetworkError             a network or its weights: absent, damaged, or another one than needed
├── InputError               a file given to a job is not what it should be
├── OutputError              an output that cannot be written
│   ├── OutputLockedError    another run is writing it
│   └── SettingsChangedError it was begun with other settings
├── RunError                 a training, search or extraction was given up
│   └── DivergedError        the weights of a training are not finite any more
├── BackendError             a flow backend where what it needs is not there
├── OutageError              a store that does not answer, or refuses everything; an OSError as well
└── SubmitError              a job that cannot be submitted

VideoError                   one video yields no usable frames: a row of the quarantine table, never the end of a run
"""

from __future__ import annotations

from typing import Literal, get_args


class UserError(ValueError):
    """Something that the user can mend; the message says what was given, what is allowed and what to do."""


class SettingsError(UserError):
    """A flag or a setting that cannot be, or cannot be together with another, on the cluster at hand."""


class CatalogError(UserError):
    """The videos or their annotations cannot be read or do not fit; the message names the file and what to do."""


class DataError(UserError):
    """Shards, or another folder that a job wrote, are absent, unfinished, damaged, or not the ones that are needed."""


class RecordError(DataError):
    """A file that should hold a record is damaged, or is something else; the message names it."""


class ConventionError(DataError):
    """Flow or RGB is stored in a way that this version does not know."""


class NetworkError(UserError):
    """A network that was named is not there, is damaged, or is another one than needed."""


class InputError(UserError):
    """A file given is not there, not what it should be, or does not go with another one."""


class OutputError(UserError):
    """This output cannot be written to."""


class OutputLockedError(OutputError):
    """Another run works on this output."""


class SettingsChangedError(OutputError):
    """The output was begun with other settings; the message names every one that differs."""


class RunError(UserError):
    """A training, a search or an extraction was given up."""


class DivergedError(RunError):
    """The weights are not finite any more: this run cannot go on, only be begun anew with other settings."""


class BackendError(UserError):
    """A flow backend is asked for where what it needs is not there; the message says what to do."""


class OutageError(UserError, OSError):
    """The store itself does not answer, or refuses everything: no fault of the one file that was asked for.

    It ends a run, which goes on where it stopped once the store is back; it never becomes a broken video or a score.
    """


class SubmitError(UserError):
    """This cannot be submitted."""


Kind = Literal[
    "bad_shape",
    "changed",
    "corrupt",
    "decoder_crashed",
    "decoder_hung",
    "empty_span",
    "encrypted",
    "long_gap",
    "no_frames",
    "no_room",
    "no_video_stream",
    "out_of_memory",
    "too_long",
    "too_short",
    "too_slow",
    "truncated",
    "unreadable",
]
KINDS: tuple[str, ...] = get_args(Kind)


class VideoError(Exception):
    """A video that yields no usable frames; `kind` is a stable word for tables, `message` a sentence for people.

    `stage` is where it came up: "decode", fetching included, where nobody said otherwise.
    """

    stage = "decode"

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(kind, message)
        self.kind: Kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message
