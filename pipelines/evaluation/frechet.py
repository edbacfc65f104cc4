"""The Fréchet distance between two sets of feature vectors, each taken for a normal distribution, in float64.

    d² = |μ₁ - μ₂|² + tr(Σ₁) + tr(Σ₂) - 2 tr((Σ₁ Σ₂)^½)        (Dowson and Landau 1982)

A set is kept as its count, mean and covariance, which is all that the distance needs, so that it is computed once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from pipelines import storage
from pipelines.errors import InputError

Vector = npt.NDArray[np.float64]  # (features,)
Matrix = npt.NDArray[np.float64]  # (features, features)
ARRAYS = ("count", "mean", "covariance", "embedding", "source")


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """The mean (D,) and covariance (D, D) of `count` vectors.

    `embedding` is all that decides what a vector is, for two sets can be compared only where it is the same; `source`
    is where the videos are from, for people.
    """

    count: int
    mean: Vector
    covariance: Matrix
    embedding: Mapping[str, object] = field(default_factory=dict)
    source: Mapping[str, object] = field(default_factory=dict)


def describe_features(
    vectors: npt.NDArray[np.floating],
    *,
    unbiased: bool = True,
    embedding: Mapping[str, object] | None = None,
    source: Mapping[str, object] | None = None,
) -> FeatureStatistics:
    """The statistics of (N, D) vectors; the covariance is over N - 1 where `unbiased`, else over N.

    Raises ValueError for fewer than two vectors, and for values that are infinite or not a number.
    """
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"a covariance needs (N, D) vectors, at least 2 of them; got the shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError(f"{(~np.isfinite(rows).all(axis=1)).sum()} of {len(rows)} vectors are not finite")
    mean = rows.mean(axis=0)
    centred = rows - mean  # before the product: of large means little would be left after a subtraction
    covariance = centred.T @ centred / (len(rows) - unbiased)
    return FeatureStatistics(
        count=len(rows), mean=mean, covariance=covariance, embedding=embedding or {}, source=source or {}
    )


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """d² as above, at least 0; of two equal sets 0 up to rounding, also where there are fewer vectors than features.

    Raises ValueError where the vectors are of different lengths.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"the vectors have {len(first.mean)} numbers in one set, {len(second.mean)} in the other")
    # tr((AB)^½) is the sum of the singular values of A^½ B^½. A root of their product would take the root of rounding
    # errors as well, which in the hundreds of directions without variance of a small set add up.
    roots = _factor(first.covariance).T @ _factor(second.covariance)
    overlap = np.linalg.svd(roots, compute_uv=False).sum() if roots.size else 0.0
    offset = first.mean - second.mean
    distance = offset @ offset + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap
    return max(0.0, float(distance))


def _factor(covariance: Matrix) -> npt.NDArray[np.float64]:
    """F (D, rank) with F Fᵀ the covariance; directions whose variance is rounding are left out."""
    variances, directions = np.linalg.eigh((covariance + covariance.T) / 2)
    real = variances > variances.max(initial=0.0) * len(variances) * np.finfo(np.float64).eps
    return directions[:, real] * np.sqrt(variances[real])


def write_statistics(uri: str, statistics: FeatureStatistics) -> None:
    """One .npz file, written atomically; numpy alone reads it."""
    sink = io.BytesIO()
    np.savez(
        sink,
        count=np.int64(statistics.count),
        mean=statistics.mean,
        covariance=statistics.covariance,
        embedding=np.array(json.dumps(dict(statistics.embedding), sort_keys=True)),
        source=np.array(json.dumps(dict(statistics.source), sort_keys=True)),
    )
    storage.put(uri, sink.getvalue())


def read_statistics(uri: str) -> FeatureStatistics:
    """What `write_statistics` wrote. Raises OSError where there is no file, InputError for another one; pickled objects
    are not read."""
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as archive:
            count, mean, covariance, embedding, source = (archive[name] for name in ARRAYS)
        statistics = FeatureStatistics(
            count=int(count),
            mean=mean.astype(np.float64),
            covariance=covariance.astype(np.float64),
            embedding=json.loads(str(embedding)),
            source=json.loads(str(source)),
        )
    except (ValueError, TypeError, KeyError, EOFError, AttributeError, BadZipFile) as error:
        raise InputError(f"{uri} holds no statistics of jobs/fvd.py, or is damaged: {error}") from error
    _check(uri, statistics)
    return statistics


def _check(uri: str, statistics: FeatureStatistics) -> None:
    size, covariance = len(statistics.mean), statistics.covariance
    if statistics.mean.ndim != 1 or covariance.shape != (size, size) or statistics.count < 2:
        raise InputError(f"{uri}: a mean {statistics.mean.shape} and a covariance {covariance.shape} are no statistics")
    if not (np.isfinite(statistics.mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"{uri} has values that are infinite or not a number")
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-9 * np.abs(covariance).max(initial=0):
        raise InputError(f"{uri}: its covariance is not symmetric")


def check_comparable(first: FeatureStatistics, second: FeatureStatistics, names: tuple[str, str]) -> None:
    """Raises InputError, naming every difference, where the two sets are of different embeddings."""
    keys = sorted(first.embedding.keys() | second.embedding.keys())
    absent = "not given"
    differing = [
        f"{key} is {first.embedding.get(key, absent)} in {names[0]}, {second.embedding.get(key, absent)} in {names[1]}"
        for key in keys
        if first.embedding.get(key) != second.embedding.get(key)
    ]
    if differing:
        raise InputError(f"the two sets cannot be compared: {'; '.join(differing)}")
