"""The one error of this package; it is a whole sentence, and needs no traceback beside it."""

from __future__ import annotations


class WeightsError(Exception):
    """A checkpoint cannot be used; `str(error)` says what was found, what expected, what to do."""
