"""docs/scale.md says what its script computes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from scale import KINETICS, Prices, Scale, extraction_figures, tables  # noqa: E402

PAGE = (ROOT / "docs" / "scale.md").read_text()


def test_the_page_holds_the_tables_that_the_script_prints() -> None:
    for table in tables(Scale()):
        assert table in PAGE.replace("\n    ", "\n"), table


@pytest.mark.parametrize("part", ["measured", "prices", "assumed"])
def test_the_page_states_every_input(part: str) -> None:
    for name, value in dataclasses.asdict(getattr(Scale(), part)).items():
        assert f"| `{name}` | {value:.4g} |" in PAGE, name


def test_a_price_changes_what_it_is_the_price_of() -> None:
    dear = Scale(prices=Prices(cpu_hour=2 * Prices().cpu_hour))
    before, after = (extraction_figures(KINETICS[0], config) for config in (Scale(), dear))
    assert {name for name in before if before[name] != after[name]} == {"dollars, CPUs on demand"}
