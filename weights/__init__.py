"""Raw checkpoints in, one checked set of named tensors out; it refuses whatever is not whole.

checkpoint = weights.load("tiny.en")
checkpoint.tensors["encoder.conv1.weight"]      # (384, 80, 3)
"""

from .checkpoint import Checkpoint, Source
from .errors import WeightsError
from .hub import MODELS
from .names import expected_shapes
from .resolve import load

__all__ = ["MODELS", "Checkpoint", "Source", "WeightsError", "expected_shapes", "load"]
