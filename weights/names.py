"""The names and shapes of every tensor of a Whisper; it refuses any name that it does not know.

OpenAI's names are the attribute paths of `whisper.model.Whisper`, so `expected_shapes` can be read
beside https://github.com/openai/whisper/blob/v20250625/whisper/model.py. Hugging Face's names are
those of `WhisperForConditionalGeneration` in transformers
(https://github.com/huggingface/transformers/blob/v4.57.1/src/transformers/models/whisper/modeling_whisper.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from whisper.model import ModelDimensions

Shape = tuple[int, ...]

MLP_RATIO = 4  # hidden width of a block's MLP / n_state
KERNEL = 3  # taps of both convolutions of the stem


def expected_shapes(dims: ModelDimensions, *, decoder: bool = True) -> dict[str, Shape]:
    """Every tensor of a Whisper of `dims` under OpenAI's name, with its shape.

    This is the only table of names in the project: what it does not list is an unknown tensor, and
    what it lists and a file does not hold is a missing one. Linear weights are (out, in),
    convolution weights (out, in, taps). The keys of attention have no bias. `decoder=False` gives
    the encoder alone and looks at no text field of `dims`.
    """
    state = dims.n_audio_state
    shapes: dict[str, Shape] = {
        "encoder.positional_embedding": (dims.n_audio_ctx, state),
        "encoder.conv1.weight": (state, dims.n_mels, KERNEL),
        "encoder.conv1.bias": (state,),
        "encoder.conv2.weight": (state, state, KERNEL),
        "encoder.conv2.bias": (state,),
    }
    for i in range(dims.n_audio_layer):
        shapes |= _block(f"encoder.blocks.{i}", state, cross=False)
    shapes |= _layer_norm("encoder.ln_post", state)
    if decoder:
        state = dims.n_text_state
        shapes["decoder.token_embedding.weight"] = (dims.n_vocab, state)
        shapes["decoder.positional_embedding"] = (dims.n_text_ctx, state)
        for i in range(dims.n_text_layer):
            shapes |= _block(f"decoder.blocks.{i}", state, cross=True)
        shapes |= _layer_norm("decoder.ln", state)
    return shapes


def _block(at: str, state: int, *, cross: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for attention in ("attn", "cross_attn") if cross else ("attn",):
        for projection in ("query", "key", "value", "out"):
            shapes[f"{at}.{attention}.{projection}.weight"] = (state, state)
            if projection != "key":
                shapes[f"{at}.{attention}.{projection}.bias"] = (state,)
        shapes |= _layer_norm(f"{at}.{attention}_ln", state)
    hidden = MLP_RATIO * state
    shapes[f"{at}.mlp.0.weight"] = (hidden, state)
    shapes[f"{at}.mlp.0.bias"] = (hidden,)
    shapes[f"{at}.mlp.2.weight"] = (state, hidden)
    shapes[f"{at}.mlp.2.bias"] = (state,)
    return shapes | _layer_norm(f"{at}.mlp_ln", state)


def _layer_norm(at: str, state: int) -> dict[str, Shape]:
    return {f"{at}.weight": (state,), f"{at}.bias": (state,)}


# The output projection of `WhisperForConditionalGeneration`: tied to the token embedding, so it has
# no name of its own in OpenAI's model.
TIED_OUTPUT = "proj_out.weight"
TOKEN_EMBEDDING = "decoder.token_embedding.weight"

_HF_OUTSIDE_LAYERS = {
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "encoder.conv1": "encoder.conv1",
    "encoder.conv2": "encoder.conv2",
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.embed_tokens": "decoder.token_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.layer_norm": "decoder.ln",
}
_HF_IN_LAYER = {
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn.q_proj": "cross_attn.query",
    "encoder_attn.k_proj": "cross_attn.key",
    "encoder_attn.v_proj": "cross_attn.value",
    "encoder_attn.out_proj": "cross_attn.out",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
_HF_LAYER = re.compile(r"(encoder|decoder)\.layers\.(0|[1-9][0-9]*)\.(.+)\.(weight|bias)")
_HF_PREFIX = "model."


def is_hugging_face(names: Iterable[str]) -> bool:
    """Whether a file's names are those of transformers. It is asked of the file as a whole: one
    that mixes both conventions keeps names that no table knows, and is refused for them."""
    marks = (
        "encoder.layers.",
        "decoder.layers.",
        "encoder.embed_positions.",
        "decoder.embed_tokens.",
    )
    return any(name.startswith((_HF_PREFIX, *marks)) for name in names)


def from_hugging_face(name: str) -> str | None:
    """OpenAI's name of the tensor that `transformers` calls `name`, with or without its `model.`
    prefix; None where there is none (`proj_out.weight` included)."""
    name = name.removeprefix(_HF_PREFIX)
    if name in _HF_OUTSIDE_LAYERS:
        return _HF_OUTSIDE_LAYERS[name]
    if match := _HF_LAYER.fullmatch(name):
        side, layer, inner, kind = match.groups()
        ours = _HF_IN_LAYER.get(inner)
        return ours and f"{side}.blocks.{layer}.{ours}.{kind}"
    module, _, kind = name.rpartition(".")
    if kind in ("weight", "bias") and module in _HF_OUTSIDE_LAYERS:
        return f"{_HF_OUTSIDE_LAYERS[module]}.{kind}"
    return None
