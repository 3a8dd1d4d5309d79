"""Element-by-element error measures, accumulated in float64; no tolerance, no judgement.

Both sides must have one shape: a broadcast would compare what was never computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EDGE = 3  # frames at either end: a padded edge touches one of conv1's and one of conv2's


def _pair(candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(candidate.shape)} and {tuple(reference.shape)}")
    return candidate.detach().to(torch.float64), reference.detach().to(torch.float64)


def relative_l2(candidate: Tensor, reference: Tensor) -> float:
    """||candidate - reference|| / ||reference||, Euclidean norms over all elements; NaN stays NaN.

    Raises ValueError where the reference is zero everywhere: the ratio means nothing there.
    """
    a, b = _pair(candidate, reference)
    norm = torch.linalg.vector_norm(b)
    if norm == 0:
        raise ValueError("the reference is zero everywhere")
    return float(torch.linalg.vector_norm(a - b) / norm)


def max_abs(candidate: Tensor, reference: Tensor) -> float:
    """The largest |candidate - reference|; NaN if either side has one."""
    a, b = _pair(candidate, reference)
    return float((a - b).abs().max())


@dataclass(frozen=True)
class Error:
    """How far a candidate's tap is from the reference's; see `error`.

    `nonfinite` counts the candidate's NaN and infinite elements. With any, they count as infinitely
    far in worst_index and p999_abs, and the other measures are NaN or infinite.
    """

    relative_l2: float
    max_abs: float
    mean_abs: float
    p999_abs: float
    sqnr_db: float
    cosine: float
    worst_index: tuple[int, ...]
    worst_candidate: float
    worst_reference: float
    nonfinite: int
    edge_relative_l2: float
    candidate_mean: float
    candidate_std: float
    reference_mean: float
    reference_std: float


def error(candidate: Tensor, reference: Tensor, frame_axis: int = -2) -> Error:
    """All measures of one tap, (..., frames, channels) or mel (n_mels, frames) with frame_axis -1.

    p999_abs is the 99.9th percentile of |difference|, the smallest one that 99.9 % do not exceed;
    sqnr_db is 20 log10(1 / relative L2), inf where the two are equal; worst_index is the first of
    the largest |difference|; edge_relative_l2 is over the first and last EDGE frames alone, NaN
    where the reference is zero there; cosine is NaN for a candidate of zeros; std is that of the
    population.
    Raises ValueError on different shapes, or a reference that is zero or not finite.
    """
    a, b = _pair(candidate, reference)
    if not bool(torch.isfinite(b).all()):
        raise ValueError("the reference is not finite")
    norm = torch.linalg.vector_norm(b)
    if norm == 0:
        raise ValueError("the reference is zero everywhere")
    difference = (a - b).abs()
    relative = float(torch.linalg.vector_norm(difference) / norm)
    nonfinite = a.numel() - int(torch.isfinite(a).sum())
    ranked = difference.flatten()
    if nonfinite:
        ranked = torch.nan_to_num(ranked, nan=math.inf, posinf=math.inf)
    worst = int(ranked.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    frames = b.shape[frame_axis]
    ends = torch.tensor([i for i in range(frames) if i < EDGE or i >= frames - EDGE])
    edge_a, edge_b = (t.index_select(frame_axis, ends) for t in (a, b))
    edge_norm = float(torch.linalg.vector_norm(edge_b))
    edge = float(torch.linalg.vector_norm(edge_a - edge_b)) / edge_norm if edge_norm else math.nan
    rank = -(-999 * ranked.numel() // 1000)  # rounded up, from 1
    p999 = np.partition(ranked.numpy(), rank - 1)[rank - 1]  # torch's kthvalue takes six times that
    norms = torch.linalg.vector_norm(a) * norm
    return Error(
        relative_l2=relative,
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        p999_abs=float(p999),
        sqnr_db=math.inf if relative == 0 else -20 * math.log10(relative),
        cosine=float((a * b).sum() / norms) if norms else math.nan,
        worst_index=index,
        worst_candidate=float(a.flatten()[worst]),
        worst_reference=float(b.flatten()[worst]),
        nonfinite=nonfinite,
        edge_relative_l2=edge,
        candidate_mean=float(a.mean()),
        candidate_std=float(a.std(correction=0)),
        reference_mean=float(b.mean()),
        reference_std=float(b.std(correction=0)),
    )


def relative_error(candidate: Tensor, reference: Tensor, frame_axis: int = -2) -> Error:
    """What a verdict needs and no more, for many runs: `relative_l2` and `nonfinite`; all other
    measures are NaN, `worst_index` is empty. Raises ValueError as `error` does."""
    relative, nan = relative_l2(candidate, reference), math.nan
    # A float32 element that is not finite makes the norm so, and nothing else does.
    broken = 0 if math.isfinite(relative) else int((~torch.isfinite(candidate)).sum())
    return Error(
        relative_l2=relative,
        max_abs=nan,
        mean_abs=nan,
        p999_abs=nan,
        sqnr_db=nan,
        cosine=nan,
        worst_index=(),
        worst_candidate=nan,
        worst_reference=nan,
        nonfinite=broken,
        edge_relative_l2=nan,
        candidate_mean=nan,
        candidate_std=nan,
        reference_mean=nan,
        reference_std=nan,
    )
