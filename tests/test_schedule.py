"""Learning rates against the published tables, and what scaling leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.training.schedule import Schedule, drop_at
from pipelines.training.settings import PRESETS


def schedule_of(name: Any) -> Schedule:
    return PRESETS[name].schedule.resolve(384)


@pytest.mark.parametrize(
    ("name", "steps", "rates"),
    [
        ("kinetics400_rgb", 115_000, {0: 0.1, 96_999: 0.1, 97_000: 0.01, 107_999: 0.01, 108_000: 0.001}),
        ("kinetics400_flow", 155_000, {96_999: 0.1, 97_000: 0.01, 104_500: 0.001, 115_000: 0.1, 140_000: 0.01,
                                       150_000: 0.001, 154_999: 0.001}),
        ("mini_kinetics", 35_000, {0: 0.1}),
        ("ucf101", 5_000, {0: 0.05}),
        ("hmdb51", 5_000, {0: 0.05}),
    ],
)  # fmt: skip
def test_presets_are_what_was_published(name: Any, steps: int, rates: dict[int, float]) -> None:
    schedule = schedule_of(name)
    batch = schedule.reference_batch
    assert schedule.steps(batch) == steps
    assert {step: schedule.learning_rate(step * batch, batch) for step in rates} == pytest.approx(rates)
    optimisation = PRESETS[name].optimisation
    assert (optimisation.batch, optimisation.weight_decay) == (6, 1e-7)
    assert PRESETS[name].network.defaults["dropout"] == 0.5


def test_a_smaller_batch_takes_more_steps_at_a_smaller_rate() -> None:
    schedule = schedule_of("kinetics400_rgb")
    assert schedule.steps(48) == 8 * 115_000
    assert schedule.learning_rate(0, 48) == pytest.approx(0.1 / 8)
    assert schedule.learning_rate(97_000 * 384, 48) == pytest.approx(0.01 / 8)


def test_the_rate_rises_linearly_in_the_first_steps() -> None:
    schedule = Schedule(phases=((10, 1.0),), reference_batch=4, warmup_steps=5)
    rates = [schedule.learning_rate(4 * step, 4) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


@pytest.mark.parametrize("batch", [4, 12, 16, 32, 400])
def test_the_rise_never_leads_beyond_the_rate(batch: int) -> None:
    schedule = Schedule(phases=((100, 1.0),), reference_batch=4, warmup_steps=5)
    rates = [schedule.learning_rate(clips, batch) for clips in range(0, 400, batch)]
    assert rates == sorted(rates)
    assert max(rates) == pytest.approx(batch / 4)


def test_drops_divide_by_ten_at_their_shares() -> None:
    assert drop_at(100, 0.5, (0.6, 0.85)) == ((60, 0.5), (25, 0.05), (15, pytest.approx(0.005)))
    assert drop_at(100, 0.5, ()) == ((100, 0.5),)
    assert drop_at(2, 0.5, (0.6, 0.85)) == ((1, 0.5), (1, 0.05))


@pytest.mark.parametrize("shares", [(0.9, 0.5), (0.0,), (1.0,), (1.5,)])
def test_impossible_drops_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending shares"):
        drop_at(100, 0.1, shares)


@pytest.mark.parametrize(
    "wrong",
    [{"phases": ()}, {"phases": ((0, 0.1),)}, {"phases": ((5, -1.0),)}, {"warmup_steps": 6}, {"reference_batch": 0}],
)
def test_impossible_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"phases|warmup|batch"):
        Schedule(**{"phases": ((5, 0.1),), "reference_batch": 4, **wrong})  # type: ignore[arg-type]
