"""The limits of the verdict: how far a tap may be from the reference before it counts as different.

A limit is the larger of a multiple of the noise floor at that tap, on that input, and an absolute
one. Both were set from the calibration in docs/parity/calibration-*.json (`python -m validation
calibrate`), and a test holds them against it: every clean error is at most four fifths of a limit.
"""

from __future__ import annotations

FREE_MULTIPLE = 25.0  # times the reference's own distance from float64, at this tap
FREE_ABSOLUTE = 4e-6  # relative L2: below, a multiple of a very small floor means nothing
OWN_MULTIPLE = 12.0  # times what float32 costs the reference in this stage alone
OWN_ABSOLUTE = 4e-6

OBSERVER_LIMIT = 1e-4  # relative L2 between the graph with taps and production: else no verdict


def free_limit(floor: float) -> float:
    """Relative L2 that the free-running candidate may have where the noise floor is `floor`."""
    return max(FREE_MULTIPLE * floor, FREE_ABSOLUTE)


def own_limit(own_floor: float) -> float:
    """Relative L2 that one stage alone may add: injected, or on the candidate's own inputs."""
    return max(OWN_MULTIPLE * own_floor, OWN_ABSOLUTE)
