"""What several test files share: where real data lies, when it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["fixtures_browser", "fixtures_motion", "fixtures_s3"]

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips, broken files, flow ground truth and annotations beside the checkout, or a skip."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside this checkout")
    return SHARED_DATA
