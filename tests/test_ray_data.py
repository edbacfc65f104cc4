"""What Ray puts around an error is taken off again."""

from __future__ import annotations

import pytest
import ray

from pipelines.errors import RunError
from pipelines.ray_data import plain_errors


def test_a_users_error_is_found_in_what_ray_puts_around_it() -> None:
    account = RuntimeError("Task Map(extract) failed ten times")
    account.__cause__ = ray.exceptions.RayTaskError("extract", "Traceback …", RunError("the shard has changed"))
    with pytest.raises(RunError, match=r"^the shard has changed$"), plain_errors():
        raise account


@pytest.mark.parametrize("error", [ValueError("shapes"), RunError("as it was raised")])
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, plain_errors():
        raise error
    assert caught.value is error
