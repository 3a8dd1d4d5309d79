"""The measures themselves: known values, NaN, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from validation.metrics import max_abs, relative_l2

REFERENCE = torch.tensor([[3.0, 0.0], [0.0, 4.0]])


def test_known_values():
    other = REFERENCE + torch.tensor([[0.0, 0.3], [-0.4, 0.0]])
    assert relative_l2(other, REFERENCE) == pytest.approx(0.5 / 5, rel=1e-6)
    assert max_abs(other, REFERENCE) == pytest.approx(0.4, rel=1e-6)
    assert max_abs(REFERENCE, other) == pytest.approx(0.4, rel=1e-6)
    assert relative_l2(REFERENCE, REFERENCE) == max_abs(REFERENCE, REFERENCE) == 0


def test_accumulation_is_in_float64():
    """A million differences of 1e-4 on ones: a float32 sum of squares would be off."""
    ones = torch.ones(1_000_000, dtype=torch.float64)
    assert relative_l2(ones * (1 + 1e-4), ones) == pytest.approx(1e-4, rel=1e-9)


def test_nan_stays():
    bad = REFERENCE.clone()
    bad[0, 0] = math.nan
    assert math.isnan(relative_l2(bad, REFERENCE))
    assert math.isnan(max_abs(bad, REFERENCE))


@pytest.mark.parametrize("measure", [relative_l2, max_abs])
def test_a_broadcast_is_refused(measure):
    with pytest.raises(ValueError, match=r"shapes differ: \(2,\) and \(2, 2\)"):
        measure(torch.zeros(2), REFERENCE)


def test_a_reference_of_zeros_is_refused():
    with pytest.raises(ValueError, match="zero everywhere"):
        relative_l2(REFERENCE, torch.zeros(2, 2))
