"""Element-by-element error measures, accumulated in float64; no summary statistics, no tolerance.

Both sides must have one shape: a broadcast would compare what was never computed.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
