"""Whisper with the MAX encoder in it: `load_model` in place of `whisper.load_model`."""

from decoder_bridge.model import MaxAudioEncoder, load_model

__all__ = ["MaxAudioEncoder", "load_model"]
