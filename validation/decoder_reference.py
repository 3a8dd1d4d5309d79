"""The reference decoders: stock openai-whisper's in float32, and its float64 twin (noise floor).

Teacher forcing: both sides read the same tokens on the same features. As in `validation.reference`
neither is ever replaced, and `DecoderReference.check` raises where the stock decoder does not agree
with a second path of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import whisper
from torch import Tensor, nn
from whisper.decoding import DecodingOptions, DecodingTask
from whisper.model import TextDecoder, disable_sdpa

from decoder_bridge.model import stock_model
from validation import stages
from validation.metrics import relative_l2
from validation.reference import ReferenceBroken, SelfCheck, in_float64, self_check
from validation.semantic import knows_timestamps
from validation.stages import Stage
from weights import Checkpoint

Taps = dict[str, Tensor]  # tap name -> (1, positions or audio frames, channels)


def decoder_stages(n_text_layer: int) -> list[Stage]:
    """What each tap is computed from, in the order of `decoder_bridge.graph.tap_names`.

    Kinds as in `validation.stages`, and two more: embedding (of `tokens`) and causal_attention.
    `audio_features` are the encoder's output.
    """

    def linear(name: str, x: str, bias: bool = True) -> Stage:
        weights = (f"{name}.weight", *([f"{name}.bias"] if bias else []))
        return Stage(name, "linear", (x,), weights)

    def norm(name: str, x: str) -> Stage:
        return Stage(name, "layer_norm", (x,), (f"{name}.weight", f"{name}.bias"))

    found = []
    for layer in range(n_text_layer):
        name = f"blocks.{layer}.cross_attn"
        found.append(linear(f"{name}.key", "audio_features", bias=False))
        found.append(linear(f"{name}.value", "audio_features"))
    embedding, positions = "token_embedding", "positional_embedding"
    found.append(Stage(embedding, "embedding", ("tokens",), (f"{embedding}.weight",)))
    found.append(Stage(positions, "positions", (embedding,), (positions,)))
    x = positions
    for layer in range(n_text_layer):
        b = f"blocks.{layer}"
        for branch, kind in (("attn", "causal_attention"), ("cross_attn", "attention")):
            name = f"{b}.{branch}"
            found += [norm(f"{name}_ln", x), linear(f"{name}.query", f"{name}_ln")]
            if branch == "attn":
                found.append(linear(f"{name}.key", f"{name}_ln", bias=False))
                found.append(linear(f"{name}.value", f"{name}_ln"))
            read = (f"{name}.query", f"{name}.key", f"{name}.value")
            found += [
                Stage(f"{name}.qkv_attention", kind, read),
                linear(f"{name}.out", f"{name}.qkv_attention"),
                Stage(f"{name}.residual", "residual", (x, f"{name}.out")),
            ]
            x = f"{name}.residual"
        found += [
            norm(f"{b}.mlp_ln", x),
            linear(f"{b}.mlp.0", f"{b}.mlp_ln"),
            Stage(f"{b}.mlp.1", "gelu", (f"{b}.mlp.0",)),
            linear(f"{b}.mlp.2", f"{b}.mlp.1"),
            Stage(b, "residual", (x, f"{b}.mlp.2")),
        ]
        x = b
    logits = Stage("logits", "linear", ("ln",), (f"{embedding}.weight",))
    return [*found, norm("ln", x), logits]


def compute(
    stage: Stage, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor], n_head: int
) -> Tensor:
    """What `stage` gives for `inputs` (by tap name), in their dtype; `tensors` are the decoder's.

    tokens (B, T) int64, from the first position on: their embedding is in the dtype of the tensor.
    """
    x = inputs[stage.inputs[0]]
    match stage.kind:
        case "embedding":
            return F.embedding(x, tensors[stage.weights[0]])
        case "positions":
            return x + tensors[stage.weights[0]][: x.shape[1]].to(x.dtype)
        case "causal_attention":
            q, k, v = (stages.heads(inputs[name], n_head) for name in stage.inputs)
            wv = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return wv.transpose(1, 2).reshape(x.shape)
    return stages.compute(stage, inputs, tensors, n_head)


def own_output(
    stage: Stage, taps: Mapping[str, Tensor], tensors: Mapping[str, Tensor], n_head: int
) -> Tensor:
    """`compute` in float64 on the taps that one side itself had; tokens are tokens."""
    inputs = {name: taps[name] for name in stage.inputs}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return compute(stage, exact, tensors, n_head)


def float64_decoder(checkpoint: Checkpoint) -> TextDecoder:
    """The stock decoder in float64, but for its last line, which rounds the logits."""
    return in_float64(stock_model(checkpoint).decoder)


def record(module: TextDecoder, tokens: Tensor, features: Tensor) -> Taps:
    """Run a stock decoder once and return what passed through it, by tap name, in the order of
    computation: outputs and inputs of its modules by hooks, and the logits that it returns.

    tokens (1, T), features (1, n_audio_ctx, n_audio_state) in the module's dtype. Raises
    ReferenceBroken where the module did not pass through a tap exactly once.
    """
    found: Taps = {}

    def see(name: str, x: Tensor) -> None:
        if name in found:
            raise ReferenceBroken(f"the stock decoder passed {name} twice in one run")
        found[name] = x.detach().contiguous()

    handles = []

    def output(part: nn.Module, name: str) -> None:
        handles.append(part.register_forward_hook(lambda _, inputs, y: see(name, y)))

    def input_(part: nn.Module, name: str) -> None:
        handles.append(part.register_forward_pre_hook(lambda _, inputs: see(name, inputs[0])))

    blocks: list[Any] = list(module.blocks)
    output(module.token_embedding, "token_embedding")
    input_([*blocks, module.ln][0], "positional_embedding")
    output(module.ln, "ln")
    for layer, block in enumerate(blocks):
        b = f"blocks.{layer}"
        for name in ("attn_ln", "cross_attn_ln", "mlp_ln"):
            output(getattr(block, name), f"{b}.{name}")
        for branch in ("attn", "cross_attn"):
            for name in ("query", "key", "value", "out"):
                output(getattr(getattr(block, branch), name), f"{b}.{branch}.{name}")
            input_(getattr(block, branch).out, f"{b}.{branch}.qkv_attention")
        input_(block.cross_attn_ln, f"{b}.attn.residual")
        input_(block.mlp_ln, f"{b}.cross_attn.residual")
        for i, part in enumerate(block.mlp):
            output(part, f"{b}.mlp.{i}")
        output(block, b)
    try:
        with torch.no_grad():
            see("logits", module(tokens, features))
    finally:
        for handle in handles:
            handle.remove()
    names = [stage.name for stage in decoder_stages(len(blocks))]
    if missed := sorted(set(names) ^ found.keys()):
        raise ReferenceBroken(f"the stock decoder did not pass through {', '.join(missed)}")
    return {name: found[name] for name in names}


@dataclass(frozen=True)
class Forced:
    """One window, as both sides get it.

    features : (1, n_audio_ctx, n_audio_state) float32, the stock encoder's
    tokens : (1, T) int64, what the stock model says by greedy search, after its start sequence
    n_prompt : how many tokens the start sequence has
    """

    features: Tensor
    tokens: Tensor
    n_prompt: int


class DecoderReference:
    """The stock model and its decoder's float64 twin with a checkpoint's weights, each built once.

    One window at a time. Attention is the eager one of Whisper in float32, PyTorch's fused one in
    float64, since the eager one rounds the scores to float32.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.dims = checkpoint.dims
        self.model = stock_model(checkpoint)
        self.tensors = dict(self.model.decoder.named_parameters())
        self.stages = decoder_stages(self.dims.n_text_layer)
        self._checkpoint = checkpoint

    @cached_property
    def twin(self) -> TextDecoder:
        return float64_decoder(self._checkpoint)

    @torch.no_grad()
    def forced(self, mel: Tensor) -> Forced:
        """mel (1, n_mels, 2 * n_audio_ctx) -> what both sides are given for it."""
        features = self.model.encoder(mel)
        language = "en"
        if self.model.is_multilingual:
            _, probabilities = self.model.detect_language(features)
            language = max(probabilities[0], key=probabilities[0].get)
        timestamps = knows_timestamps(self.model)
        options = DecodingOptions(language=language, without_timestamps=not timestamps, fp16=False)
        begin = DecodingTask(self.model, options).initial_tokens
        said = whisper.decode(self.model, features, options)[0].tokens
        return Forced(features, torch.tensor([[*begin, *said]]), len(begin))

    def logits(self, forced: Forced) -> Tensor:
        """The stock decoder's logits of all tokens without any hook, (1, T, n_vocab)."""
        with torch.no_grad(), disable_sdpa():
            return self.model.decoder(forced.tokens, forced.features)

    def taps(self, forced: Forced) -> Taps:
        """Every tap of the stock decoder, float32, in the order of computation."""
        with disable_sdpa():
            return record(self.model.decoder, forced.tokens, forced.features)

    def exact(self, forced: Forced) -> Taps:
        """Every tap of the float64 twin, float64. The stock decoder's last line rounds its logits
        to float32: here they are its product of `ln` and the embedding without that."""
        taps = record(self.twin, forced.tokens, forced.features.double())
        with torch.no_grad():
            logits = taps["ln"] @ self.twin.token_embedding.weight.T
        if not torch.equal(logits.float(), taps["logits"]):
            raise ReferenceBroken("the float64 decoder's logits are not its ln times the embedding")
        return taps | {"logits": logits}

    def check(self, forced: Forced, taps: Taps, exact: Taps) -> SelfCheck:
        """Run the stock decoder again, and by other paths, and compare; the figures are those of
        `logits`. `taps` and `exact` are what the methods of these names gave for this window.

        Raises ReferenceBroken, with all that is wrong, where the reference does not agree with
        itself.
        """
        with torch.no_grad():
            fused = self.model.decoder(forced.tokens, forced.features)
            plain = self._functional_distances(forced, taps)
        return self_check(
            "decoder", "logits", lambda: self.logits(forced), taps, exact, fused, plain
        )

    def _functional_distances(self, forced: Forced, taps: Taps) -> dict[str, float]:
        """The formulas of the stages one after the other in float32, on their own results: relative
        L2 of each from `taps`. No stock module has a part in it."""
        running = {"tokens": forced.tokens, "audio_features": forced.features}
        for stage in self.stages:
            running[stage.name] = compute(stage, running, self.tensors, self.dims.n_text_head)
        return {s.name: relative_l2(running[s.name], taps[s.name]) for s in self.stages}

    def own_output(self, stage: Stage, forced: Forced, taps: Taps) -> Tensor:
        """What `stage` should have given, in float64, for the taps that one side itself had."""
        inputs = {"tokens": forced.tokens, "audio_features": forced.features, **taps}
        with torch.no_grad():
            return own_output(stage, inputs, self.tensors, self.dims.n_text_head)

    def own_floor(self, forced: Forced, taps: Taps) -> dict[str, float]:
        """What float32 costs in each stage alone: its formula in float32 from the one in float64,
        both on the reference's float32 inputs."""
        inputs = {"tokens": forced.tokens, "audio_features": forced.features, **taps}
        found = {}
        for stage in self.stages:
            with torch.no_grad():
                single = compute(stage, inputs, self.tensors, self.dims.n_text_head)
            found[stage.name] = relative_l2(single, self.own_output(stage, forced, taps))
        return found
