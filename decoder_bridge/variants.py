"""The variants: whether MAX or PyTorch computes a part of Whisper; none stands in for another.

What loads a model, and with it max, is imported when a variant is loaded: the list does not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import whisper

    from weights import Checkpoint

DEFAULT = "max"


class VariantError(Exception):
    """A variant is none, or cannot run here; the message is one sentence."""


@dataclass(frozen=True)
class Variant:
    """
    name : of the command line and of `load_model`
    what : what runs, in one phrase
    load : (checkpoint, device) -> the model; device is "auto", "cpu" or "gpu". Raises `EngineError`
        or `VariantError` where that cannot be done after all
    cannot_run : device -> why it cannot run here, in one sentence; None: it can
    fp16 : whether it computes in float16 where that is asked for, as openai-whisper does
    """

    name: str
    what: str
    load: Callable[[Checkpoint, str], whisper.Whisper]
    cannot_run: Callable[[str], str | None]
    fp16: bool = False


def load_cpu(checkpoint: Checkpoint, device: str) -> whisper.Whisper:
    """Stock openai-whisper."""
    from decoder_bridge.model import stock_model

    return stock_model(checkpoint)


def load_gpu(checkpoint: Checkpoint, device: str) -> whisper.Whisper:
    """Stock openai-whisper on CUDA; as in `whisper.load_model` the weights are float32 there, and
    are cast where fp16=True asks for it."""
    from decoder_bridge.model import stock_model

    model = stock_model(checkpoint)
    try:
        return model.to("cuda")
    except RuntimeError as error:  # no memory, or a driver that does not fit
        reason = str(error).strip().splitlines()[0]
        raise VariantError(f"PyTorch cannot put the model on CUDA: {reason}") from error


def load_attention(checkpoint: Checkpoint, device: str) -> whisper.Whisper:
    """The stock model, MAX in each block's attention."""
    from decoder_bridge.model import attention_model

    return attention_model(checkpoint)


def load_max(checkpoint: Checkpoint, device: str) -> whisper.Whisper:
    """The MAX encoder in the stock model."""
    from decoder_bridge.model import bridged_model

    return bridged_model(checkpoint, device)


def load_max_fast(checkpoint: Checkpoint, device: str) -> whisper.Whisper:
    """Both by MAX."""
    from decoder_bridge.model import fast_model

    return fast_model(checkpoint, device)


def on_cpu(device: str) -> str | None:
    """Why a variant of the CPU alone cannot run on `device`."""
    return "it runs on the CPU alone; use --device cpu" if device == "gpu" else None


def on_cuda(device: str) -> str | None:
    """Why a variant of CUDA alone cannot run on `device`."""
    if device == "cpu":
        return "it runs on CUDA alone; leave --device out"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device here; use another --variant"
    return None


def where_max_runs(device: str) -> str | None:
    """Why MAX cannot run on `device`; max is imported only where an accelerator is asked for."""
    if device != "gpu":
        return None
    from encoder.engine import EngineError, select_device

    try:
        select_device(device)
    except EngineError as error:
        return str(error)
    return None


# fmt: off
REGISTRY = (
    Variant("cpu", "stock openai-whisper, PyTorch on the CPU: the reference", load_cpu, on_cpu),
    Variant("gpu", "stock openai-whisper, PyTorch on CUDA", load_gpu, on_cuda, fp16=True),
    Variant("max-attention", "stock, with MAX for the encoder's attention", load_attention, on_cpu),
    Variant("max", "the encoder by MAX, the stock decoder by PyTorch", load_max, where_max_runs),
    Variant("max-fast", "the encoder and the decoder by MAX", load_max_fast, on_cpu),
)
# fmt: on
VARIANTS = {variant.name: variant for variant in REGISTRY}


def reason_against(variant: str, device: str) -> str | None:
    """Why `variant` cannot run on `device` here, a sentence that names it; None: it can."""
    if variant not in VARIANTS:
        return f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}"
    if device not in ("auto", "cpu", "gpu"):
        return f"device is {device!r}, expected one of auto, cpu, gpu"
    reason = VARIANTS[variant].cannot_run(device)
    return f"variant {variant} cannot run: {reason}" if reason else None


def what_ran(model: Any, fp16: bool = False) -> str:
    """Who computes the encoder of `model`, and the decoder if that is MAX, as its modules say."""
    dims, engine = model.dims, getattr(model.encoder, "engine", None)
    if engine is not None:
        by = f"MAX {version('max')} on {engine.device}"
    else:
        by = f"PyTorch {torch.__version__} on {model.device.type}{' in float16' if fp16 else ''}"
        engines = [getattr(block.attn, "engine", None) for block in model.encoder.blocks]
        if count := sum(engine is not None for engine in engines):
            by += f", attention in {count} of its layers: MAX {version('max')}"
    line = f"encoder: {by}, {dims.n_audio_layer} layers of {dims.n_audio_state}"
    if decoder := getattr(model, "max_decoder", None):
        line += (
            f" · decoder: MAX {version('max')} on {decoder.device}, "
            f"{dims.n_text_layer} layers of {dims.n_text_state}"
        )
    return line
