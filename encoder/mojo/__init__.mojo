"""The encoder's products and its attention, for the CPU in float32.

MAX's own are written for every shape; these know Whisper's: whole panels of 16 channels, heads of
a multiple of 16, no mask. `encoder/kernels.py` says where the graph uses them.
"""

from .attention import QKVAttention
from .linear import Conv1d, Linear
