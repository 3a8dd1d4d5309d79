"""The measures themselves: known values, naive numpy, NaN and Inf, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from validation.metrics import EDGE, Error, error, max_abs, relative_l2

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


@pytest.mark.parametrize("measure", [relative_l2, max_abs, error])
def test_a_broadcast_is_refused(measure):
    with pytest.raises(ValueError, match=r"shapes differ: \(2,\) and \(2, 2\)"):
        measure(torch.zeros(2), REFERENCE)


@pytest.mark.parametrize("measure", [relative_l2, error])
def test_a_reference_of_zeros_is_refused(measure):
    with pytest.raises(ValueError, match="zero everywhere"):
        measure(REFERENCE, torch.zeros(2, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        error(REFERENCE, torch.tensor([[1.0, value], [0.0, 4.0]]))


def pair(*shape: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A candidate 1e-3 away from a reference, both float32."""
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal(shape).astype(np.float32) * 2 + 1
    noise = rng.standard_normal(shape).astype(np.float32) * 1e-3
    return torch.from_numpy(reference + noise), torch.from_numpy(reference)


def percentile_999(values: np.ndarray) -> float:
    """By the definition: the smallest value that at least 99.9 % do not exceed."""
    ranked = np.sort(values.ravel())
    return next(float(x) for i, x in enumerate(ranked, 1) if 1000 * i >= 999 * ranked.size)


def edge_rows(frames: int) -> list[int]:
    return sorted({*range(min(EDGE, frames)), *range(max(frames - EDGE, 0), frames)})


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((50, 7), -2),
        ((1, 40, 5), -2),
        ((40, 50), -1),
        ((1, 40, 50), -1),
        ((4, 3), -2),
        ((2, 3), -2),
    ],
    ids=str,
)
def test_every_measure_against_naive_numpy(shape, axis):
    candidate, reference = pair(*shape)
    found = error(candidate, reference, axis)
    a, b = candidate.numpy().astype(np.float64), reference.numpy().astype(np.float64)
    d = np.abs(a - b)
    relative = math.sqrt((d**2).sum()) / math.sqrt((b**2).sum())
    worst = np.unravel_index(d.argmax(), d.shape)
    rows = edge_rows(shape[axis])
    edge_d, edge_b = np.take(d, rows, axis), np.take(b, rows, axis)
    expected = {
        "relative_l2": relative,
        "max_abs": d.max(),
        "mean_abs": d.mean(),
        "p999_abs": percentile_999(d),
        "sqnr_db": 10 * math.log10((b**2).sum() / (d**2).sum()),
        "cosine": (a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum()),
        "worst_candidate": a[worst],
        "worst_reference": b[worst],
        "edge_relative_l2": math.sqrt((edge_d**2).sum() / (edge_b**2).sum()),
        "candidate_mean": a.mean(),
        "candidate_std": a.std(),
        "reference_mean": b.mean(),
        "reference_std": b.std(),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert found.worst_index == tuple(int(i) for i in worst)
    assert found.nonfinite == 0
    assert expected.keys() | {"worst_index", "nonfinite"} == {f.name for f in fields(Error)}


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 2500, 4321])
def test_p999_is_the_percentile(count):
    candidate, reference = pair(count, 1)
    d = np.abs(candidate.double().numpy() - reference.double().numpy())
    found = error(candidate, reference).p999_abs
    assert found == percentile_999(d)
    if count % 1000:  # at whole thousands, numpy's 0.999 * count is rounded either way
        assert found == np.percentile(d, 99.9, method="inverted_cdf")


def test_equal_tensors():
    _, reference = pair(20, 4)
    found = error(reference, reference)
    assert found.relative_l2 == found.max_abs == found.p999_abs == found.edge_relative_l2 == 0
    assert found.sqnr_db == math.inf
    assert found.cosine == pytest.approx(1, abs=1e-15)
    assert found.worst_index == (0, 0)


def test_edge_frames_are_apart_from_the_interior():
    """What differs in the interior alone is not seen at the edge, and the other way round."""
    _, reference = pair(1, 20, 4)
    inside, first, last = reference.clone(), reference.clone(), reference.clone()
    inside[:, EDGE:-EDGE] += 1
    first[:, EDGE - 1] += 1
    last[:, -EDGE] += 1
    assert error(inside, reference).edge_relative_l2 == 0
    assert error(first, reference).edge_relative_l2 > 0
    assert error(last, reference).edge_relative_l2 > error(last, reference).relative_l2


def test_frames_of_mel_are_its_last_axis():
    _, reference = pair(80, 20)
    other = reference.clone()
    other[0, 10] += 1  # the first row, a frame in the middle
    assert error(other, reference, -1).edge_relative_l2 == 0
    assert error(other, reference, -2).edge_relative_l2 > 0


def test_an_edge_of_zeros_has_no_ratio():
    """A window that is padded to 30 s ends in zeros on the mel side; here on both ends."""
    _, reference = pair(20, 4)
    reference[:EDGE] = reference[-EDGE:] = 0
    found = error(reference + 1e-3, reference)
    assert math.isnan(found.edge_relative_l2)
    assert found.relative_l2 > 0


def test_a_candidate_of_zeros():
    _, reference = pair(20, 4)
    found = error(torch.zeros(20, 4), reference)
    assert found.relative_l2 == 1
    assert found.sqnr_db == 0
    assert math.isnan(found.cosine)
    assert found.candidate_std == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_elements_are_counted_and_the_first_one_is_the_worst(value):
    candidate, reference = pair(20, 4)
    candidate[7, 2] = candidate[9, 1] = value
    candidate[1, 1] += 100
    found = error(candidate, reference)
    assert found.nonfinite == 2
    assert found.worst_index == (7, 2)
    assert found.worst_candidate == pytest.approx(value, nan_ok=True)
    assert found.worst_reference == float(reference[7, 2])
    for name in ("relative_l2", "max_abs", "mean_abs", "candidate_mean", "sqnr_db"):
        assert not math.isfinite(getattr(found, name)), name
    assert math.isnan(found.cosine)
    assert math.isfinite(found.reference_std)
    assert math.isfinite(found.edge_relative_l2)  # both are in the interior


def test_nan_and_inf_together_are_both_infinitely_far():
    candidate, reference = pair(20, 4)
    candidate[3, 0], candidate[5, 0] = math.inf, math.nan
    found = error(candidate, reference)
    assert found.nonfinite == 2
    assert found.worst_index == (3, 0)
    assert found.p999_abs == math.inf


def test_few_nonfinite_elements_leave_p999():
    candidate, reference = pair(5000, 1)
    candidate[4000] = math.nan
    found = error(candidate, reference)
    assert found.p999_abs < 0.01
    assert math.isnan(found.max_abs)


def test_float16_is_compared_in_float64():
    """60000 * 60000 is infinite in float16."""
    reference = torch.full((10, 2), 60000.0, dtype=torch.float16)
    found = error(reference - 32, reference)
    assert found.relative_l2 == pytest.approx(32 / 60000, rel=1e-12)
    assert found.reference_mean == 60000


def test_an_empty_tap_is_refused():
    with pytest.raises(ValueError, match="zero everywhere"):
        error(torch.zeros(1, 0, 4), torch.zeros(1, 0, 4))
