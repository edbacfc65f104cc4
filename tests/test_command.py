"""How a job ends: a sentence for what the user can mend, a traceback for our own faults, a promise for a Ctrl-C."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.command import as_given, run_command
from pipelines import errors, storage
from pipelines.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if "def main()" in path.read_text())


@dataclass(frozen=True, kw_only=True)
class Settings:
    count: int = 1
    """How many."""


def run(error: BaseException | None = None, result: object = None) -> None:
    def work(settings: Settings) -> object:
        if error:
            raise error
        return result

    run_command(Settings, work, "A job.", args=[], stopped="nothing is lost")


def test_paths_are_shown_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("out/run", "./out/run/", str(tmp_path / "out" / "run"), "s3://b/run"):
        page = f"{storage.absolute(given)}/report.html"
        assert as_given(page, given) == f"{given.rstrip('/')}/report.html"


def test_what_the_user_can_mend_is_one_sentence() -> None:
    file, disk, store = (2, "No such file", "x.csv"), (28, "No space left on device"), ("s3://bucket/x.csv",)
    for error in (
        DataError("out holds no data set"),
        FileNotFoundError(*file),
        OSError(*disk),
        PermissionError(*store),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{re.escape(str(error)[:10])}"):
            run(error)


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("shapes (2,) (3,)"), RuntimeError("NaN"), KeyError("x"), TypeError("y")),
        *(OSError("handle is closed"), OSError(9, "Bad file descriptor"), ProcessLookupError(3, "No such process")),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(error)


def test_ctrl_c_says_what_it_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(KeyboardInterrupt())
    assert stop.value.code == 130
    assert capsys.readouterr().out == "\nstopped; nothing is lost\n"


def test_a_number_is_the_exit_status() -> None:
    with pytest.raises(SystemExit) as stop:
        run(result=3)
    assert stop.value.code == 3
    run(result=0)
    run(result=["a finding that the job has printed"])


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_a_command_that_runs_anywhere(tmp_path: Path, job: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(rf"usage: \S*{job}\.py", done.stdout)


def test_there_is_one_tree() -> None:
    found = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert {error for error in found if not issubclass(error, UserError)} == {errors.VideoError}
