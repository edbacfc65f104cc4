"""Which of a cluster's processor families makes the shards; on real nodes: tests/test_nodes.py."""

from __future__ import annotations

import pytest

from pipelines.extraction.fleet import CPU_FLOW, NODE_ID, Fleet, _choose, select_nodes

KERNELS = {"a": "zen4", "b": "icelake", "c": "icelake"}


@pytest.mark.parametrize(
    ("planned", "cpus", "chosen", "others"),
    [
        (None, {"a": 64, "b": 8, "c": 8}, "zen4", {"b", "c"}),
        (None, {"a": 8, "b": 8, "c": 8}, "icelake", {"a"}),
        (None, {"a": 16, "b": 8, "c": 8}, "icelake", {"a"}),  # of equals, always the same
        ("zen4", {"a": 8, "b": 8, "c": 8}, "zen4", {"b", "c"}),
        ("haswell", {"a": 64, "b": 8, "c": 8}, "zen4", {"b", "c"}),  # refused by name when the output is begun
    ],
)
def test_an_output_keeps_its_family_and_a_new_one_takes_that_of_most_cpus(
    planned: str | None, cpus: dict[str, float], chosen: str, others: set[str]
) -> None:
    fleet = _choose(KERNELS, cpus, planned)
    assert fleet == Fleet(kernel=chosen, others={node: KERNELS[node] for node in others})


def test_nodes_are_selected_by_what_they_are_not() -> None:
    assert select_nodes() == {CPU_FLOW: "!no"}
    assert select_nodes(["y", "x"]) == {CPU_FLOW: "!no", NODE_ID: "!in(x, y)"}
