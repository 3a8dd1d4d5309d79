"""Rank statistics with weights, and their bootstrap over whole fault ids.

`weights` (..., n) say how much each of n points counts, one row of them for a bootstrap sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95  # of an interval
FEWEST_IDS = 5  # fewer give no interval
ALIKE = 1e-12  # of the largest possible sum of squares of ranks: less is rounding


def votes(ids: Sequence[str]) -> np.ndarray:
    """One vote for each id, which its points share."""
    counted = Counter(ids)
    return np.array([1 / counted[each] for each in ids])


def ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean ranks (..., n) among the points as much as they count; the lowest of one is at 0.5."""
    distinct, which = np.unique(values, return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[order], np.arange(len(distinct)))
    taken = np.add.reduceat(weights[..., order], starts, axis=-1)
    at: np.ndarray = np.cumsum(taken, axis=-1) - taken / 2
    return at[..., which]


def spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each sample; NaN where one side is all alike."""
    n = weights.sum(-1, keepdims=True)
    a, b = ranks(x, weights), ranks(y, weights)
    a -= (weights * a).sum(-1, keepdims=True) / n
    b -= (weights * b).sum(-1, keepdims=True) / n
    both, own_a, own_b = ((weights * p * q).sum(-1) for p, q in ((a, b), (a, a), (b, b)))
    norm = np.sqrt(own_a * own_b)
    varies = np.minimum(own_a, own_b) > ALIKE * n[..., 0] ** 3
    return np.divide(both, norm, out=np.full_like(norm, np.nan), where=varies)


def auc(values: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often a positive point has the larger value of two, ties half; NaN without either."""
    yes, no = (weights * positive).sum(-1), (weights * ~positive).sum(-1)
    above = (weights * positive * ranks(values, weights)).sum(-1) - yes * yes / 2
    return np.divide(above, yes * no, out=np.full_like(above, np.nan), where=yes * no > 0)


def samples(ids: Sequence[str], seed: int) -> Iterator[np.ndarray]:
    """How often each point is drawn in RESAMPLES bootstrap samples, some samples at a time. What is
    drawn is whole ids: the strengths of one sweep and the recordings of one fault are not
    independent."""
    distinct, which = np.unique(ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    at_once = max(1, 1_000_000 // len(ids))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start), len(distinct)
        drawn = rng.integers(len(distinct), size=size)
        counts = np.zeros(size)
        np.add.at(counts, (np.arange(size[0])[:, None], drawn), 1)
        yield counts[:, which]


def interval(values: list[np.ndarray]) -> dict[str, float | None]:
    """The percentile interval of the samples that define the statistic, at least half of them."""
    known = np.concatenate(values) if values else np.empty(0)
    known = known[np.isfinite(known)]
    if 2 * len(known) < RESAMPLES:
        return {"low": None, "high": None}
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}


def defined(value: np.ndarray) -> float | None:
    return float(value) if np.isfinite(value) else None
