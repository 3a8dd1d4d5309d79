"""A checkpoint as a CTranslate2 model, and faster-whisper, which runs it.

Written through CTranslate2's own specification of Whisper:
https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/specs/whisper_spec.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from validation.peers import Heard

if TYPE_CHECKING:
    from whisper.model import ModelDimensions

    from weights import Checkpoint

Tensors = dict[str, np.ndarray]


def convert(checkpoint: Checkpoint, folder: Path) -> None:
    """model.bin, config.json, vocabulary.json, tokenizer.json and preprocessor_config.json, in
    float32: the compute type is chosen when the model is loaded."""
    from ctranslate2.specs.whisper_spec import WhisperSpec

    from validation.peers.vocabulary import (
        byte_alphabet,
        encoding_of,
        plain_tokens,
        special_tokens,
        spelled,
    )

    checkpoint.require_decoder()
    dims = checkpoint.dims
    encoding = encoding_of(dims)
    alphabet = byte_alphabet()
    tensors = {name: t.float().numpy() for name, t in checkpoint.tensors.items()}

    spec = WhisperSpec(dims.n_audio_layer, dims.n_audio_head, dims.n_text_layer, dims.n_text_head)
    set_encoder(spec.encoder, tensors)
    set_decoder(spec.decoder, tensors)
    plain = [spelled(token, alphabet) for token in plain_tokens(encoding)]
    spec.register_vocabulary([*plain, *special_tokens(encoding)])
    for name, value in config_of(dims).items():
        setattr(spec.config, name, value)
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))
    fast_tokenizer(dims).save(str(folder / "tokenizer.json"))
    preprocessor = {"feature_size": dims.n_mels}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def set_norm(spec: Any, tensors: Tensors, name: str) -> None:
    spec.gamma, spec.beta = tensors[f"{name}.weight"], tensors[f"{name}.bias"]


def set_linear(spec: Any, tensors: Tensors, *names: str) -> None:
    """One layer of several projections of the same input; the key, which has no bias, gets 0."""
    weights = [tensors[f"{name}.weight"] for name in names]
    biases = [
        tensors.get(f"{name}.bias", np.zeros(len(weight), np.float32))
        for name, weight in zip(names, weights, strict=True)
    ]
    spec.weight, spec.bias = np.concatenate(weights), np.concatenate(biases)


def set_block(spec: Any, tensors: Tensors, name: str) -> None:
    """What encoder and decoder have in common: self attention and the MLP."""
    attn = f"{name}.attn"
    set_norm(spec.self_attention.layer_norm, tensors, f"{name}.attn_ln")
    projections = (f"{attn}.query", f"{attn}.key", f"{attn}.value")
    set_linear(spec.self_attention.linear[0], tensors, *projections)
    set_linear(spec.self_attention.linear[1], tensors, f"{attn}.out")
    set_norm(spec.ffn.layer_norm, tensors, f"{name}.mlp_ln")
    set_linear(spec.ffn.linear_0, tensors, f"{name}.mlp.0")
    set_linear(spec.ffn.linear_1, tensors, f"{name}.mlp.2")


def set_encoder(spec: Any, tensors: Tensors) -> None:
    for conv, name in ((spec.conv1, "encoder.conv1"), (spec.conv2, "encoder.conv2")):
        conv.weight, conv.bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    spec.position_encodings.encodings = tensors["encoder.positional_embedding"]
    for layer, block in enumerate(spec.layer):
        set_block(block, tensors, f"encoder.blocks.{layer}")
    set_norm(spec.layer_norm, tensors, "encoder.ln_post")


def set_decoder(spec: Any, tensors: Tensors) -> None:
    embedding = tensors["decoder.token_embedding.weight"]
    spec.embeddings.weight = spec.projection.weight = embedding
    spec.position_encodings.encodings = tensors["decoder.positional_embedding"]
    for layer, block in enumerate(spec.layer):
        name = f"decoder.blocks.{layer}"
        cross = f"{name}.cross_attn"
        set_block(block, tensors, name)
        set_norm(block.attention.layer_norm, tensors, f"{name}.cross_attn_ln")
        set_linear(block.attention.linear[0], tensors, f"{cross}.query")
        set_linear(block.attention.linear[1], tensors, f"{cross}.key", f"{cross}.value")
        set_linear(block.attention.linear[2], tensors, f"{cross}.out")
    set_norm(spec.layer_norm, tensors, "decoder.ln")


def config_of(dims: ModelDimensions) -> dict[str, list[Any]]:
    """What openai-whisper's tokenizer says of tokens that are not to be sampled, and where times
    of words come from: all heads of the last half of the layers, CTranslate2's own default."""
    from validation.peers.vocabulary import is_multilingual, tokenizer_of

    tokenizer = tokenizer_of(dims)
    special = [
        tokenizer.transcribe,
        tokenizer.translate,
        tokenizer.sot,
        tokenizer.sot_prev,
        tokenizer.sot_lm,
        tokenizer.no_speech,
    ]
    heads = range(dims.n_text_head)
    layers = range(dims.n_text_layer // 2, dims.n_text_layer)
    return {
        "suppress_ids": sorted({*tokenizer.non_speech_tokens, *special}),
        "suppress_ids_begin": [*tokenizer.encode(" "), tokenizer.eot],
        "lang_ids": sorted(tokenizer.all_language_tokens) if is_multilingual(dims) else [],
        "alignment_heads": [[layer, head] for layer in layers for head in heads],
    }


def fast_tokenizer(dims: ModelDimensions) -> Any:
    """Whisper's tokenizer as one of Hugging Face's `tokenizers`, as faster-whisper reads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from validation.peers.vocabulary import (
        byte_alphabet,
        encoding_of,
        merges,
        plain_tokens,
        special_tokens,
        spelled,
    )

    encoding, alphabet = encoding_of(dims), byte_alphabet()
    plain = plain_tokens(encoding)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={spelled(token, alphabet): i for i, token in enumerate(plain)},
            merges=[(spelled(a, alphabet), spelled(b, alphabet)) for a, b in merges(plain)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = special_tokens(encoding)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


class FasterWhisper:
    """faster-whisper on the CPU; compute_type is CTranslate2's: "float32", "int8"."""

    def __init__(self, folder: Path, threads: int, compute_type: str):
        from faster_whisper import WhisperModel

        self._model = WhisperModel(
            str(folder), device="cpu", compute_type=compute_type, cpu_threads=threads
        )

    def encoder(self, mel: np.ndarray) -> np.ndarray:
        """mel (batch, n_mels, 2 * n_audio_ctx) -> (batch, n_audio_ctx, n_audio_state)."""
        return np.array(self._model.encode(mel))

    def transcribe(self, audio: np.ndarray, language: str) -> Heard:
        """Greedy, at temperature 0 alone, window after window with the text before it."""
        segments, _ = self._model.transcribe(audio, language=language, beam_size=1, temperature=0.0)
        said = list(segments)  # they are decoded as they are asked for
        tokens = [token for segment in said for token in segment.tokens]
        return Heard("".join(segment.text for segment in said), tokens)
