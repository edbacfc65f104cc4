"""The size of pictures. What becomes of a frame's pixels and rotation is seen in whole videos: test_decode.py."""

from __future__ import annotations

import pytest

from pipelines.errors import VideoError
from pipelines.media.resize import output_size


@pytest.mark.parametrize(
    ("source", "expected"),
    [((240, 320), (256, 342)), ((320, 240), (342, 256)), ((1, 1), (256, 256)), ((1080, 1920), (256, 456))],
)
def test_output_size(source: tuple[int, int], expected: tuple[int, int]) -> None:
    assert output_size(*source, 256) == expected


@pytest.mark.parametrize("source", [(10, 81), (1, 4000), (0, 10)])
def test_output_size_refuses_slivers(source: tuple[int, int]) -> None:
    with pytest.raises(VideoError) as caught:
        output_size(*source, 256)
    assert caught.value.kind == "bad_shape"
