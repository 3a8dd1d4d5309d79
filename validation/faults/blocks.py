"""Mistakes in the blocks and in ln_post."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions

from validation.faults.fault import (
    EARLIER_PORT,
    GITHUB,
    UNRECORDED,
    Fault,
    Formula,
    Tensors,
    every,
    not_run,
    projections,
    swept,
)
from validation.stages import LAYER_NORM_EPSILON, Stage, attend, compute, heads, stages

Formulas = Callable[[ModelDimensions, list[int]], dict[str, Formula]]

EPSILONS = (1e-12, 1e-6, 1e-3, 1e-2, 1e-1)


# ---- weights


def zeros(tensors: Tensors, names: Iterable[str]) -> Tensors:
    return {name: torch.zeros_like(tensors[name]) for name in names}


def no_attention_biases(tensors: Tensors, layers: list[int]) -> Tensors:
    names = projections(layers, "query", "value", "out")
    return zeros(tensors, (f"{name}.bias" for name in names))


def no_mlp_biases(tensors: Tensors, layers: list[int]) -> Tensors:
    return zeros(tensors, (f"blocks.{i}.mlp.{n}.bias" for i in layers for n in (0, 2)))


def square_weights_transposed(tensors: Tensors, layers: list[int]) -> Tensors:
    names = projections(layers, "query", "key", "value", "out")
    return {f"{n}.weight": tensors[f"{n}.weight"].T for n in names}


def query_and_key_exchanged(tensors: Tensors, layers: list[int]) -> Tensors:
    """The key's place has no bias, and needs none: to all scores of a query it adds one number,
    which softmax does not see."""
    changed = zeros(tensors, (f"{name}.bias" for name in projections(layers, "query")))
    for attn in (f"blocks.{layer}.attn" for layer in layers):
        changed[f"{attn}.query.weight"] = tensors[f"{attn}.key.weight"]
        changed[f"{attn}.key.weight"] = tensors[f"{attn}.query.weight"]
    return changed


def query_and_value_exchanged(tensors: Tensors, layers: list[int]) -> Tensors:
    changed = {}
    for attn in (f"blocks.{layer}.attn" for layer in layers):
        for of in ("weight", "bias"):
            changed[f"{attn}.query.{of}"] = tensors[f"{attn}.value.{of}"]
            changed[f"{attn}.value.{of}"] = tensors[f"{attn}.query.{of}"]
    return changed


def taken_from(source: dict[int, int]) -> Callable[[Tensors, list[int]], Tensors]:
    """The fault in which a block has the weights of another: {block: of which block}."""

    def weights(tensors: Tensors, layers: list[int]) -> Tensors:
        return {
            name: tensors[name.replace(f"blocks.{block}.", f"blocks.{other}.", 1)]
            for block, other in source.items()
            for name in tensors
            if name.startswith(f"blocks.{block}.")
        }

    return weights


# ---- attention


def attention(mix: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Formulas:
    """The fault of which attention is `mix(q, k, v, n_head)`, each (B, T, n_state)."""

    def formulas(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
        def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
            q, k, v = (x[name] for name in stage.inputs)
            return mix(q, k, v, dims.n_audio_head)

        return dict.fromkeys(projections(layers, "qkv_attention"), formula)

    return formulas


def causal(q: Tensor, k: Tensor, v: Tensor, n_head: int) -> Tensor:
    wv = F.scaled_dot_product_attention(
        heads(q, n_head), heads(k, n_head), heads(v, n_head), is_causal=True
    )
    return wv.transpose(1, 2).reshape(q.shape)


def heads_reversed(q: Tensor, k: Tensor, v: Tensor, n_head: int) -> Tensor:
    return attend(q, k, v, n_head).unflatten(2, (n_head, -1)).flip(2).flatten(2)


def heads_not_merged(q: Tensor, k: Tensor, v: Tensor, n_head: int) -> Tensor:
    return heads(attend(q, k, v, n_head), n_head).reshape(q.shape)


def key_bias(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """As `torch.nn.Linear` initialises a bias that no checkpoint fills."""
    bound = dims.n_audio_state**-0.5
    noise = torch.rand(dims.n_audio_state, generator=torch.Generator().manual_seed(0))
    bias = (2 * noise - 1) * bound

    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return compute(stage, x, tensors, dims.n_audio_head) + bias

    return dict.fromkeys(projections(layers, "key"), formula)


# ---- GELU and layer norm


def gelu_table(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """The table has one entry, itself a float16, for each float16."""
    return F.gelu(x[stage.inputs[0]].half().float(), approximate="tanh").half().float()


def layer_norm(epsilon: float) -> Formula:
    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        weight, bias = (tensors[name] for name in stage.weights)
        return F.layer_norm(x[stage.inputs[0]], weight.shape, weight, bias, epsilon)

    return formula


def post_norm(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """x = attn_ln(x + attention(x)), then x = mlp_ln(x + mlp(x)). The norms are not where their
    taps are; the taps of the residual stream, attn.residual and the block's, hold what they give.
    """
    found: dict[str, Formula] = {}
    for layer in layers:
        block = f"blocks.{layer}"
        before = f"blocks.{layer - 1}" if layer else "positional_embedding"

        def reading(name: str) -> Formula:
            return lambda stage, x, tensors: compute(
                replace(stage, inputs=(name,)), x, tensors, dims.n_audio_head
            )

        def normed(norm: str) -> Formula:
            def formula(
                stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
            ) -> Tensor:
                y = compute(stage, x, tensors, dims.n_audio_head)
                weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
                return F.layer_norm(y, weight.shape, weight, bias, LAYER_NORM_EPSILON)

            return formula

        found |= dict.fromkeys((f"{block}.attn_ln", f"{block}.mlp_ln"), not_run)
        found |= dict.fromkeys(projections([layer], "query", "key", "value"), reading(before))
        found[f"{block}.attn.residual"] = normed(f"{block}.attn_ln")
        found[f"{block}.mlp.0"] = reading(f"{block}.attn.residual")
        found[block] = normed(f"{block}.mlp_ln")
    return found


# ---- blocks left out


def without(gone: Callable[[int], Iterable[int]]) -> Formulas:
    """The fault in which the blocks `gone(n_audio_layer)` are not there: what reads the output of
    one of them reads what came before it."""

    def formulas(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
        left_out = set(gone(dims.n_audio_layer))
        instead: dict[str, str] = {}
        last = "positional_embedding"
        for layer in range(dims.n_audio_layer):
            if layer in left_out:
                instead[f"blocks.{layer}"] = last
            else:
                last = f"blocks.{layer}"

        def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
            inputs = tuple(instead.get(name, name) for name in stage.inputs)
            return compute(replace(stage, inputs=inputs), x, tensors, dims.n_audio_head)

        inside = tuple(f"{block}." for block in instead)
        found: dict[str, Formula] = {}
        for stage in stages(dims):
            if f"{stage.name}.".startswith(inside):
                found[stage.name] = not_run
            elif instead.keys() & set(stage.inputs):
                found[stage.name] = formula
        return found

    return formulas


FAULTS = [
    Fault(
        id="S14",
        group="blocks",
        sentence="The biases of query, value and out are not loaded.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.query",
        cause="bias-missing",
        how="weights",
        weights=no_attention_biases,
    ),
    Fault(
        id="S15",
        group="blocks",
        sentence="The biases of the MLP are not loaded.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.mlp.0",
        cause="bias-missing",
        how="weights",
        weights=no_mlp_biases,
    ),
    Fault(
        id="S16",
        group="blocks",
        sentence="The square weights of attention are used without their transpose.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.query",
        cause="weight-transposed",
        how="weights",
        weights=square_weights_transposed,
    ),
    Fault(
        id="S17",
        group="blocks",
        sentence="Attention has one head, and the scale that goes with it.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="one-head",
        how="code",
        formulas=attention(lambda q, k, v, n_head: attend(q, k, v, 1)),
    ),
    Fault(
        id="S18",
        group="blocks",
        sentence="Scores are scaled by 1/sqrt(n_state) in place of 1/sqrt(n_head_state).",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="attention-scale",
        how="code",
        formulas=attention(
            lambda q, k, v, n_head: attend(q, k, v, n_head, scale=q.shape[2] ** -0.5)
        ),
    ),
    Fault(
        id="S19",
        group="blocks",
        sentence="Scores are scaled by 1/sqrt(n_head_state) twice.",
        seen=EARLIER_PORT,
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="attention-scaled-twice",
        how="code",
        formulas=attention(
            lambda q, k, v, n_head: attend(q, k, v, n_head, scale=n_head / q.shape[2])
        ),
    ),
    Fault(
        id="S21",
        group="blocks",
        sentence="ReLU is used in place of GELU.",
        seen=EARLIER_PORT,
        first_tap="conv1.gelu",
        cause="gelu-relu",
        how="code",
        formulas=lambda dims, layers: every(dims, "gelu", lambda s, x, t: F.relu(x[s.inputs[0]])),
    ),
    Fault(
        id="E09",
        group="blocks",
        sentence="GELU is computed in its tanh form in place of the exact one.",
        seen=f"{GITHUB}/huggingface/candle, {GITHUB}/tinygrad/tinygrad, "
        f"{GITHUB}/ggml-org/whisper.cpp; the reverse in {GITHUB}/kyutai-labs/pocket-tts/pull/278",
        first_tap="conv1.gelu",
        cause="gelu-tanh",
        how="code",
        formulas=lambda dims, layers: every(
            dims, "gelu", lambda s, x, t: F.gelu(x[s.inputs[0]], approximate="tanh")
        ),
    ),
    Fault(
        id="E10",
        group="blocks",
        sentence="GELU, in its tanh form, is read from a table of float16.",
        seen=f"{GITHUB}/ggml-org/whisper.cpp",
        first_tap="conv1.gelu",
        cause="gelu-float16-table",
        how="code",
        formulas=lambda dims, layers: every(dims, "gelu", gelu_table),
    ),
    Fault(
        id="S22",
        group="blocks",
        sentence="Half of the layers are run.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="blocks-skipped",
        how="code",
        formulas=without(lambda n: range(n // 2, n)),
    ),
    Fault(
        id="S22-one",
        group="blocks",
        sentence="The first layer alone is run.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="blocks-skipped",
        how="code",
        formulas=without(lambda n: range(1, n)),
    ),
    Fault(
        id="S22-none",
        group="blocks",
        sentence="No layer is run; ln_post reads the stem.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="blocks-skipped",
        how="code",
        formulas=without(range),
    ),
    Fault(
        id="E22",
        group="blocks",
        sentence="The first layer is left out, all others are run.",
        seen=UNRECORDED,
        first_tap="blocks.1.attn_ln",
        cause="blocks-skipped",
        how="code",
        formulas=without(lambda n: [0]),
    ),
    Fault(
        id="E22-twice",
        group="blocks",
        sentence="The first layer is run twice, the second time in place of the second layer.",
        seen=UNRECORDED,
        first_tap="blocks.1.attn_ln",
        cause="block-other-weights",
        how="weights",
        weights=taken_from({1: 0}),
    ),
    Fault(
        id="E22-swapped",
        group="blocks",
        sentence="The first two layers are run in the wrong order.",
        seen=f"{GITHUB}/arcee-ai/mergekit/issues/143, for another model",
        first_tap="blocks.0.attn_ln",
        cause="block-other-weights",
        how="weights",
        weights=taken_from({0: 1, 1: 0}),
    ),
    Fault(
        id="S23",
        group="blocks",
        sentence="The last layer norm, ln_post, is missing.",
        seen=EARLIER_PORT,
        first_tap="ln_post",
        cause="norm-missing",
        how="code",
        formulas=lambda dims, layers: {"ln_post": lambda s, x, t: x[s.inputs[0]]},
    ),
    Fault(
        id="E18",
        group="blocks",
        sentence="The layer norms stand after the residual sums, not before the branches.",
        seen=f"{GITHUB}/k2-fsa/snowfall/pull/184, for another model",
        first_tap="blocks.{layer}.attn.query",
        cause="other-input",
        how="code",
        formulas=post_norm,
    ),
    *swept(
        EPSILONS,
        lambda epsilon: Fault(
            id="S24",
            group="blocks",
            sentence=f"The layer norms have epsilon {epsilon:g} in place of 1e-05.",
            seen=f"{EARLIER_PORT}; {GITHUB}/keras-team/keras-hub/pull/133",
            first_tap="blocks.0.attn_ln",
            cause="norm-epsilon",
            how="code",
            formulas=lambda dims, layers: every(dims, "layer_norm", layer_norm(epsilon)),
        ),
    ),
    Fault(
        id="E16",
        group="blocks",
        sentence="Attention has a causal mask: no frame sees a later one.",
        seen=f"a default that never ran: {GITHUB}/OpenNMT/CTranslate2/pull/2083; for other models "
        f"{GITHUB}/sgl-project/sglang/pull/35434",
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="causal-mask",
        how="code",
        formulas=attention(causal),
    ),
    Fault(
        id="E17",
        group="blocks",
        sentence="The key has a bias, which no checkpoint fills and the softmax does not see.",
        seen=f"{GITHUB}/vllm-project/vllm/pull/12342",
        first_tap="blocks.{layer}.attn.key",
        cause="bias-added",
        how="code",
        formulas=key_bias,
    ),
    Fault(
        id="E20",
        group="blocks",
        sentence="The heads are put together in reverse order.",
        seen=UNRECORDED,
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="heads-permuted",
        how="code",
        formulas=attention(heads_reversed),
    ),
    Fault(
        id="E20-merge",
        group="blocks",
        sentence="The heads are put together by a reshape, without the transpose before it.",
        seen=f"{GITHUB}/HabanaAI/vllm-fork/pull/1218, "
        f"{GITHUB}/jsbaan/transformer-from-scratch/pull/6",
        first_tap="blocks.{layer}.attn.qkv_attention",
        cause="heads-not-merged",
        how="code",
        formulas=attention(heads_not_merged),
    ),
    Fault(
        id="E-c",
        group="blocks",
        sentence="Query and key are exchanged: the scores are transposed before the softmax.",
        seen=UNRECORDED,
        first_tap="blocks.{layer}.attn.query",
        cause="qkv-order",
        how="weights",
        weights=query_and_key_exchanged,
    ),
    Fault(
        id="E-d",
        group="blocks",
        sentence="Query, key and value are cut from one product in the order value, key, query.",
        seen=f"{GITHUB}/vllm-project/vllm/issues/42803, for another model",
        first_tap="blocks.{layer}.attn.query",
        cause="qkv-order",
        how="weights",
        weights=query_and_value_exchanged,
    ),
]
