"""Jobs as they are told by flags, but in this process: on a Ray that stays up, where starting one takes seconds."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import ray

from jobs.cluster import start_here

NO_GPUS = ("--num-gpus", "0")  # those of `ray_here` are pretended ones


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """A Ray of 3 CPUs and 2 pretended GPUs in this process, which jobs find instead of starting their own."""
    with patch.dict(os.environ):
        start_here({"num_cpus": 3, "num_gpus": 2, "log_to_driver": False}, dashboard=False)
    yield
    ray.shutdown()


def run_here(name: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """What jobs/NAME.py does, prints and ends with when it is given these flags; our own faults are raised."""
    job, out, err = importlib.import_module(f"jobs.{name}"), io.StringIO(), io.StringIO()
    words, on_stop, status = [f"jobs/{name}.py", *map(str, flags)], signal.getsignal(signal.SIGTERM), 0
    with patch.dict(os.environ), patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            job.main()
        except SystemExit as stop:  # with a sentence, as a process ends with it: on stderr, status 1
            status = stop.code if isinstance(stop.code, int) else 1
            err.write("" if isinstance(stop.code, int) else f"{stop.code}\n")
        finally:
            signal.signal(signal.SIGTERM, on_stop)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def succeed(name: str, *flags: str | Path) -> str:
    """What a job prints that comes to its end."""
    done = run_here(name, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
