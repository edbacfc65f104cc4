"""The Fréchet distance against closed forms, and its statistics on their way to a file and back."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.evaluation.frechet import (
    FeatureStatistics,
    check_comparable,
    describe_features,
    frechet_distance,
    read_statistics,
    write_statistics,
)


def normal(mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(count=1000, mean=mean.astype(np.float64), covariance=covariance.astype(np.float64))


def rotation(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def test_normals_of_one_dimension() -> None:
    """(μ₁ - μ₂)² + (σ₁ - σ₂)²."""
    first, second = normal(np.array([1.0]), np.array([[4.0]])), normal(np.array([-2.0]), np.array([[25.0]]))
    assert frechet_distance(first, second) == pytest.approx(9 + 9, rel=1e-14)


@pytest.mark.parametrize("zeros", [0, 30])
def test_covariances_that_commute(zeros: int) -> None:
    """|μ₁ - μ₂|² + Σ (√λ₁ - √λ₂)², whatever the common axes, and with directions in which nothing varies."""
    rng, size = np.random.default_rng(0), 40
    axes = rotation(size, 1)
    first, second = rng.uniform(0.1, 9, size), rng.uniform(0.1, 9, size)
    first[:zeros], second[zeros // 2 : zeros // 2 + zeros] = 0, 0
    means = rng.normal(size=(2, size))
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    found = frechet_distance(normal(means[0], axes * first @ axes.T), normal(means[1], axes * second @ axes.T))
    assert found == pytest.approx(expected, rel=1e-12)


def test_disjoint_directions_add_up() -> None:
    """Where no direction varies in both sets nothing is subtracted: |μ₁ - μ₂|² + tr Σ₁ + tr Σ₂."""
    axes = rotation(20, 2)
    first, second = axes[:, :8] @ axes[:, :8].T, 3 * axes[:, 8:] @ axes[:, 8:].T
    assert frechet_distance(normal(np.zeros(20), first), normal(np.ones(20), second)) == pytest.approx(20 + 8 + 36)


def test_general_covariances_of_two_dimensions() -> None:
    """tr((AB)^½) = √(tr AB + 2 √det AB) for 2 × 2."""
    first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[1.5, -0.4], [-0.4, 3.0]])
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(normal(np.zeros(2), first), normal(np.zeros(2), second)) == pytest.approx(
        expected, rel=1e-13
    )


@pytest.mark.parametrize("count", [3, 60, 2000])
def test_equal_sets_have_no_distance(count: int) -> None:
    """Also 3 vectors of 200 numbers far from the origin, of whose covariance nearly all is zero."""
    vectors = np.random.default_rng(count).normal(50, 4, (count, 200)) @ rotation(200, 3)
    statistics = describe_features(vectors.astype(np.float32))
    again = describe_features(vectors.astype(np.float32)[::-1])
    assert frechet_distance(statistics, again) < 1e-9 * np.trace(statistics.covariance)


def test_a_shift_of_few_vectors_is_its_square() -> None:
    vectors = np.random.default_rng(4).normal(size=(10, 100))
    moved = describe_features(vectors + 0.5)
    assert frechet_distance(describe_features(vectors), moved) == pytest.approx(100 * 0.25, rel=1e-10)


def test_the_covariance_is_numpys() -> None:
    vectors = np.random.default_rng(5).normal(1e4, 1, (50, 7))
    for unbiased in (True, False):
        found = describe_features(vectors, unbiased=unbiased).covariance
        np.testing.assert_allclose(found, np.cov(vectors, rowvar=False, bias=not unbiased), rtol=1e-9, atol=1e-12)


def test_what_has_no_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        describe_features(np.ones((1, 4)))
    with pytest.raises(ValueError, match="1 of 3 vectors are not finite"):
        describe_features(np.array([[1.0], [np.nan], [2.0]]))
    with pytest.raises(ValueError, match="2 numbers in one set, 3 in the other"):
        frechet_distance(normal(np.zeros(2), np.eye(2)), normal(np.zeros(3), np.eye(3)))


def test_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    vectors = np.random.default_rng(6).normal(size=(9, 5))
    statistics = describe_features(vectors, embedding={"dialect": "videogpt"}, source={"videos": "é"})
    write_statistics(str(tmp_path / "a.npz"), statistics)
    found = read_statistics(str(tmp_path / "a.npz"))
    assert (found.count, found.embedding, found.source) == (9, {"dialect": "videogpt"}, {"videos": "é"})
    assert frechet_distance(statistics, found) < 1e-12
    other = describe_features(vectors, embedding={"dialect": "features", "frames": 16})
    with pytest.raises(InputError, match="dialect is videogpt in a, features in b; frames is not given in a, 16 in b"):
        check_comparable(found, other, ("a", "b"))


@pytest.mark.parametrize("kind", ["text", "pickle", "other", "asymmetric", "infinite"])
def test_a_file_that_holds_no_statistics_is_one_error(tmp_path: Path, kind: str) -> None:
    path, sink = tmp_path / "a.npz", io.BytesIO()
    arrays = {"count": np.int64(3), "mean": np.zeros(2), "covariance": np.eye(2), "embedding": "{}", "source": "{}"}
    broken = {
        "pickle": arrays | {"mean": np.array([{}, {}], dtype=object)},
        "other": {"mean": np.zeros(2)},
        "asymmetric": arrays | {"covariance": np.array([[1.0, 1.0], [0.0, 1.0]])},
        "infinite": arrays | {"mean": np.array([np.inf, 0])},
    }
    np.savez(sink, **broken.get(kind, {}))
    path.write_bytes(b"text" if kind == "text" else sink.getvalue())
    with pytest.raises(InputError, match=str(path)):
        read_statistics(str(path))
