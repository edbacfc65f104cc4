"""The folder of a run, and the lines that its workers send, without starting any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from training_runs import make_model, make_run

from models import checkpoint
from pipelines.errors import SettingsChangedError
from pipelines.training import trainer
from pipelines.training.config import Reporting, Run
from pipelines.training.weights_files import find_checkpoint


def begin(output: Path, run: Run) -> bool:
    run = trainer.keep_interval(run, str(output))
    return trainer.begin_run(run, make_model(), str(output))


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """It wrote down the checkpoint interval that its number of workers gave, and named checkpoints by steps."""
    old = make_run(reporting=Reporting(checkpoint_every=100))
    assert not begin(tmp_path, old)
    assert trainer.keep_interval(make_run(), str(tmp_path)) == old
    assert not begin(tmp_path, make_run())
    checkpoint.save(tmp_path / "checkpoints" / "step-0000100", make_model(), old.metadata())
    result = dict.fromkeys(("last", "best"), "checkpoints/step-0000100") | {"metrics": {}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert begin(tmp_path, make_run())
    assert checkpoint.load(find_checkpoint(str(tmp_path)))[1].classes == ("left", "right")


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    begin(tmp_path, make_run())
    for other in (make_run(batch=2), make_run(reporting=Reporting(checkpoint_every=7))):
        with pytest.raises(SettingsChangedError, match=r"\n  (optimisation.batch: 4 there|reporting.checkpoint_every)"):
            begin(tmp_path, other)


@pytest.mark.parametrize("error", [ray.exceptions.GetTimeoutError(), ray.exceptions.RayActorError()])
def test_a_mailbox_that_is_gone_at_the_end_costs_no_run(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = SimpleNamespace(remote=lambda: SimpleNamespace(fetch=SimpleNamespace(remote=lambda: None)))

    def fail(*given: Any, **settings: Any) -> list[dict[str, Any]]:
        raise error

    fakes: dict[str, Callable[..., Any]] = {"remote": lambda **_: lambda _: actor, "get": fail, "kill": lambda _: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(ray, name, fake)
    seen: list[dict[str, Any]] = []
    with trainer._mailbox(seen.append):
        pass
    assert seen == []
