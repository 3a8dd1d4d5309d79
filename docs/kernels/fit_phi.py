"""The two polynomials of `encoder/kernels.py`'s GELU: python docs/kernels/fit_phi.py

erf(z) = z P(z^2) / Q(z^2) on [0, LIMIT], both of degree 5, so that the largest error is small:
least squares of z P - erf Q, linear in the factors, again and again, each point weighted by the
last denominator and by its last error (Lawson, "Contributions to the theory of linear least maximum
approximations", 1961). Then z = x / sqrt(2) and half of it, for Phi(x) - 1/2. Of the LIMITs from
3.74 to 3.99 in steps of 0.01 this one rounds best in float32.
"""

from __future__ import annotations

import numpy as np
import torch

LIMIT, DEGREE, POINTS, ROUNDS = 3.92, 5, 4000, 120


def erf(z: np.ndarray) -> np.ndarray:
    return torch.erf(torch.from_numpy(z)).numpy()


def fit() -> tuple[np.ndarray, np.ndarray, float]:
    """The factors of P and Q in z^2, from the constant on, and the largest error of erf."""
    z = LIMIT * (np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS) + 1) / 2
    s, f = (z / LIMIT) ** 2, erf(z) / z
    up, down = np.arange(DEGREE + 1), np.arange(1, DEGREE + 1)
    columns = np.concatenate([s[:, None] ** up, -f[:, None] * s[:, None] ** down], axis=1)
    q, weight, best = np.ones(POINTS), np.ones(POINTS), np.inf
    for _ in range(ROUNDS):
        scale = weight / q * np.maximum(z, 0.3)
        found = np.linalg.lstsq(columns * scale[:, None], f * scale, rcond=None)[0]
        upper, lower = found[: DEGREE + 1], np.concatenate([[1.0], found[DEGREE + 1 :]])
        q = np.polyval(lower[::-1], s)
        error = np.abs(z * np.polyval(upper[::-1], s) / q - erf(z))
        weight = weight * (1 + error / error.max()) ** 0.5
        weight /= weight.mean()
        if error.max() < best:
            best, kept = error.max(), (upper, lower)
    return kept[0] / LIMIT ** (2 * up), kept[1] / LIMIT ** (2 * up), best


def main() -> None:
    p, q, error = fit()
    halving = 0.5 ** np.arange(DEGREE + 1)
    print("erf within", error)
    print("SATURATED", float(np.float32(LIMIT * np.sqrt(2))))
    print("PHI_P", [float(np.float32(x)) for x in p * halving / np.sqrt(8)])
    print("PHI_Q", [float(np.float32(x)) for x in q * halving])


if __name__ == "__main__":
    main()
