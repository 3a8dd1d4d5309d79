"""Whisper with the MAX encoder in it: `load_model` in place of `whisper.load_model`.

Both names are imported when they are asked for: the list of variants does not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decoder_bridge.model import MaxAudioEncoder, load_model

__all__ = ["MaxAudioEncoder", "load_model"]


def __getattr__(name: str) -> Any:
    """What `from decoder_bridge import load_model` asks for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import decoder_bridge.model

    return getattr(decoder_bridge.model, name)
