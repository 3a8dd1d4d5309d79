"""What the rounds of a benchmark say: medians, and ratios of medians with a bootstrap interval.

All systems take part in every round, one after the other, so that the rounds are what is drawn:
what slowed the machine in one of them slowed both sides of a ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from validation.findings_statistics import LEVEL, RESAMPLES

FEWEST_ROUNDS = 5  # fewer give no interval


@dataclass(frozen=True)
class Ratio:
    """Median of one side's seconds over the other's, and where the middle 95 % of the bootstrap
    samples lie; None with too few rounds for it."""

    value: float
    low: float | None
    high: float | None


def median(seconds: Sequence[float]) -> float:
    return float(np.median(seconds))


def ratio_of_medians(seconds: Sequence[float], base: Sequence[float], seed: int = 0) -> Ratio:
    """seconds[i] and base[i] are of the same round. Raises ValueError where they do not pair."""
    if len(seconds) != len(base) or not seconds:
        raise ValueError(f"{len(seconds)} and {len(base)} rounds do not pair")
    ours, theirs = np.asarray(seconds, float), np.asarray(base, float)
    value = float(np.median(ours) / np.median(theirs))
    if len(ours) < FEWEST_ROUNDS:
        return Ratio(value, None, None)
    drawn = np.random.default_rng(seed).integers(len(ours), size=(RESAMPLES, len(ours)))
    ratios = np.median(ours[drawn], axis=1) / np.median(theirs[drawn], axis=1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(value, float(low), float(high))
