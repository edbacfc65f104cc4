"""What several test files share: where real data lies, when it is there."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._common.utils import get_ray_address_file

pytest_plugins = ["fixtures_browser", "fixtures_jobs", "fixtures_motion", "fixtures_s3"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell starts with & inherits that, and so would the jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Where there is no GPU, Triton's kernels are interpreted; it decides when a module with kernels is first imported.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked gpu need one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch sees")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first: where two processes take turns, neither waits for the other at the end."""
    weights = {"slow": 20, "soak": 0}  # a slow test takes as long as some twenty others
    cost = Counter[Path]()
    for item in items:
        cost[item.path] += next((weight for mark, weight in weights.items() if item.get_closest_marker(mark)), 1)
    items.sort(key=lambda item: -cost[item.path])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real clips, broken files, flow ground truth and annotations beside the checkout, or a skip."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real data beside this checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True, scope="session")
def _no_address_left() -> Iterator[None]:
    """The tests leave no dead cluster's address in Ray's folder: the next ray.init() of anybody would wait for it."""
    file = Path(get_ray_address_file(None))
    before = file.read_text() if file.exists() else None
    yield
    assert not file.exists() or file.read_text() == before  # another process may have taken its own away meanwhile


@pytest.fixture(autouse=True, scope="module")
def _no_real_time() -> Iterator[None]:
    """An encoder that a test starts as root must not leave this process, and all that it starts, real-time priority."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) == os.SCHED_OTHER
