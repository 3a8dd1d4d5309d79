"""Mistakes that ports of Whisper made, or could make, and yardsticks, each with where it must show
first and what it must be called. `FAULTS` has them all, by `Fault.key`; to add one, a `Fault` in
the module of its group.
"""

from __future__ import annotations

from validation.faults import blocks, bridge, input, stem, unseen, weights
from validation.faults.fault import ALL_LAYERS, Fault, Twin, not_run

__all__ = ["ALL_LAYERS", "FAULTS", "Fault", "Twin", "not_run"]

FAULTS: dict[str, Fault] = {
    fault.key: fault
    for module in (input, stem, blocks, weights, bridge, unseen)
    for fault in module.FAULTS
}
