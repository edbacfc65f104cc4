"""Which mistakes of an evaluation are shown, and what is said of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipelines.pages.mistakes import NUM_CLASSES, NUM_VIDEOS, choose_mistakes, list_guesses


def score_table(*rows: tuple[str, int, list[float]], status: str = "ok") -> pa.Table:
    """A table of scores of one network, from ids, labels and logits."""
    table = []
    for name, label, logits in rows:
        rank = int((np.array(logits) > logits[label]).sum())
        facts = {"id": name, "label": label, "class_name": "abcdef"[label], "status": status}
        table.append(facts | {"rank": rank, "predicted": int(np.argmax(logits)), "logits_rgb": logits})
    return pa.Table.from_pylist(table)


def test_the_worst_class_comes_first_and_in_it_the_surest_mistake() -> None:
    scores = score_table(
        ("right", 0, [5.0, 0.0]),
        ("unsure", 0, [0.0, 0.1]),
        ("b~sure", 1, [9.0, 0.0]),
        ("a~sure", 1, [9.0, 0.0]),
        ("unsure too", 1, [1.0, 0.0]),
    )
    assert [row["id"] for row in choose_mistakes(scores, 2)] == ["a~sure", "b~sure", "unsure too", "unsure"]


def test_a_few_of_a_few_classes_are_chosen_and_lost_videos_never() -> None:
    wrong = [
        (f"{label}~{number}", label, np.eye(6)[(label + 1) % 6].tolist()) for label in range(6) for number in range(5)
    ]
    chosen = choose_mistakes(score_table(*wrong), 6)
    assert [row["label"] for row in chosen] == [label for label in range(NUM_CLASSES) for _ in range(NUM_VIDEOS)]
    assert choose_mistakes(score_table(*wrong, status="failed"), 6) == []


def test_the_true_class_is_among_the_guesses_however_far_behind() -> None:
    scores = score_table(("x", 5, [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    guesses = list_guesses(choose_mistakes(scores, 6)[0], "abcdef")
    assert [(guess.name, guess.is_true) for guess in guesses] == [("a", False), ("b", False), ("c", False), ("f", True)]
    assert guesses[0].first_of == ["rgb"]
    assert guesses[0].probabilities["rgb"] == pytest.approx(0.6337, abs=1e-4)  # e⁶ over the sum of e¹ to e⁶
