"""Mistakes that ports of Whisper really made, each with where it must show first and what it must
be called; and `Twin`, PyTorch's encoder stage by stage, in which any of them can be made.

The reference never changes, and nothing is patched: a fault is another set of weights, another
input, or another formula for some stages. To add one: a `Fault` at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions

from validation.stages import Stage, attend, compute, stages
from weights import Checkpoint

Taps = dict[str, Tensor]
Tensors = dict[str, Tensor]  # the encoder's, by OpenAI's name without "encoder."
Formula = Callable[[Stage, Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

ALL_LAYERS = None


def not_run(stage: Stage, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """The formula of a stage that the candidate does not have: it gives no tap."""
    raise LookupError(stage.name)


@dataclass(frozen=True)
class Fault:
    """One mistake.

    group      input, stem, blocks, weights
    sentence   what was done, as one would say it of a port
    seen       where it was made
    first_tap  the tap that diverges first; "{layer}" where it can be made in one layer alone
    cause      the id that `validation.fingerprints.explain` must give it
    how        input: `mel`; weights: `weights`, which suit any encoder; code: `formulas`
    """

    id: str
    group: str
    sentence: str
    seen: str
    first_tap: str
    cause: str
    how: Literal["input", "weights", "code"]
    mel: Callable[[Tensor], Tensor] = field(default=lambda mel: mel, repr=False)
    weights: Callable[[Tensors, list[int]], Tensors] = field(default=lambda t, n: {}, repr=False)
    formulas: Callable[[ModelDimensions, list[int]], dict[str, Formula]] = field(
        default=lambda dims, layers: {}, repr=False
    )

    def diverges_at(self, layer: int | None = ALL_LAYERS) -> str:
        """The first wrong tap where the fault is made in `layer`, or in all."""
        return self.first_tap.format(layer=layer or 0)

    def damage(self, checkpoint: Checkpoint, layer: int | None = ALL_LAYERS) -> Checkpoint:
        """The checkpoint with the weights of the fault; unchanged if it is no fault of weights."""
        given = checkpoint.encoder_tensors()
        changed = self.weights(given, _layers(checkpoint.dims, layer))
        changed = {f"encoder.{n}": t.to(given[n].dtype).contiguous() for n, t in changed.items()}
        return replace(checkpoint, tensors=checkpoint.tensors | changed)


def _layers(dims: ModelDimensions, layer: int | None) -> list[int]:
    if layer is not None and not 0 <= layer < dims.n_audio_layer:
        raise ValueError(f"layer is {layer}, the encoder has 0 to {dims.n_audio_layer - 1}")
    return list(range(dims.n_audio_layer)) if layer is ALL_LAYERS else [layer]


class Twin:
    """PyTorch's encoder in float32, run stage by stage with `validation.stages.compute`.

    It is a candidate like any other (`name`, `taps`, `injected`, `features`). A fault, and formulas
    given for some taps besides, take the place of the right ones; without any it is right.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        fault: Fault | None = None,
        layer: int | None = ALL_LAYERS,
        formulas: Mapping[str, Formula] | None = None,
    ):
        self.name = f"torch twin with {fault.id}" if fault else "torch twin"
        self.dims = checkpoint.dims
        self.fault = fault
        damaged = fault.damage(checkpoint, layer) if fault else checkpoint
        self.tensors = {n: t.detach().float() for n, t in damaged.encoder_tensors().items()}
        self.formulas = dict(fault.formulas(self.dims, _layers(self.dims, layer)) if fault else {})
        self.formulas |= formulas or {}
        if unknown := self.formulas.keys() - {stage.name for stage in stages(self.dims)}:
            raise ValueError(f"no stage has the name {sorted(unknown)[0]}")

    def stage(self, stage: Stage, inputs: Mapping[str, Tensor]) -> Tensor:
        """One stage's tap for these inputs, by tap name."""
        formula = self.formulas.get(stage.name)
        if formula is None:
            return compute(stage, inputs, self.tensors, self.dims.n_audio_head)
        return formula(stage, inputs, self.tensors)

    def _run(self, mel: Tensor, inputs: Callable[[Taps], Mapping[str, Tensor]]) -> Taps:
        taps: Taps = {}
        given = self.fault.mel(mel) if self.fault else mel
        with torch.no_grad():
            for stage in stages(self.dims):
                if self.formulas.get(stage.name) is not_run:
                    continue
                read = {"mel": given} if stage.kind == "mel" else inputs(taps)
                taps[stage.name] = self.stage(stage, read)
        return taps

    def taps(self, mel: Tensor) -> Taps:
        """mel (1, n_mels, 2 * n_audio_ctx) -> every tap that this encoder has, in order."""
        return self._run(mel, lambda taps: taps)

    def injected(self, reference: Taps) -> Taps:
        """Every stage on the reference's inputs."""
        return self._run(reference["mel"], lambda taps: reference)

    def features(self, mel: Tensor) -> Tensor:
        """mel -> (1, n_audio_ctx, n_audio_state)."""
        return self.taps(mel)["ln_post"]


# ---- the formulas and weights of the faults


def every(dims: ModelDimensions, kind: str, formula: Formula) -> dict[str, Formula]:
    """One formula for all stages of a kind."""
    return {stage.name: formula for stage in stages(dims) if stage.kind == kind}


def projections(layers: list[int], *names: str) -> list[str]:
    """ "blocks.0.attn.query" and so on."""
    return [f"blocks.{layer}.attn.{name}" for layer in layers for name in names]


def middle_tap(tensors: Tensors, layers: list[int]) -> Tensors:
    middle = torch.tensor([0.0, 1.0, 0.0])
    return {f"{n}.weight": tensors[f"{n}.weight"] * middle for n in ("conv1", "conv2")}


def no_attention_biases(tensors: Tensors, layers: list[int]) -> Tensors:
    names = projections(layers, "query", "value", "out")
    return {f"{n}.bias": torch.zeros_like(tensors[f"{n}.bias"]) for n in names}


def square_weights_transposed(tensors: Tensors, layers: list[int]) -> Tensors:
    names = projections(layers, "query", "key", "value", "out")
    return {f"{n}.weight": tensors[f"{n}.weight"].T for n in names}


def positions_one_late(tensors: Tensors, layers: list[int]) -> Tensors:
    return {"positional_embedding": tensors["positional_embedding"].roll(1, 0)}


def scale_of_whole_state(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        q, k, v = (x[name] for name in stage.inputs)
        return attend(q, k, v, dims.n_audio_head, scale=dims.n_audio_state**-0.5)

    return dict.fromkeys(projections(layers, "qkv_attention"), formula)


def key_bias(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """As `torch.nn.Linear` initialises a bias that no checkpoint fills."""
    bound = dims.n_audio_state**-0.5
    noise = torch.rand(dims.n_audio_state, generator=torch.Generator().manual_seed(0))
    bias = (2 * noise - 1) * bound

    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return compute(stage, x, tensors, dims.n_audio_head) + bias

    return dict.fromkeys(projections(layers, "key"), formula)


def half_of_the_layers(dims: ModelDimensions, layers: list[int]) -> dict[str, Formula]:
    """The second half of the blocks is not there; ln_post reads the last that is."""
    last = dims.n_audio_layer // 2 - 1
    run = f"blocks.{last}" if last >= 0 else "positional_embedding"

    def formula(stage: Stage, x: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        return compute(replace(stage, inputs=(run,)), x, tensors, dims.n_audio_head)

    left_out = tuple(f"blocks.{i}" for i in range(last + 1, dims.n_audio_layer))
    names = [
        s.name for s in stages(dims) if f"{s.name}.".startswith(tuple(f"{b}." for b in left_out))
    ]
    return dict.fromkeys(names, not_run) | {"ln_post": formula}


EARLIER_PORT = "nijaru/max-whisper, history"

FAULTS: dict[str, Fault] = {
    fault.id: fault
    for fault in (
        Fault(
            id="S07",
            group="stem",
            sentence="Only the middle tap of each kernel of the convolutions is used.",
            seen=EARLIER_PORT,
            first_tap="conv1",
            cause="conv-middle-tap",
            how="weights",
            weights=middle_tap,
        ),
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
            id="S18",
            group="blocks",
            sentence="Scores are scaled by 1/sqrt(n_state) in place of 1/sqrt(n_head_state).",
            seen=EARLIER_PORT,
            first_tap="blocks.{layer}.attn.qkv_attention",
            cause="attention-scale",
            how="code",
            formulas=scale_of_whole_state,
        ),
        Fault(
            id="S21",
            group="blocks",
            sentence="ReLU is used in place of GELU.",
            seen=EARLIER_PORT,
            first_tap="conv1.gelu",
            cause="gelu-relu",
            how="code",
            formulas=lambda dims, layers: every(
                dims, "gelu", lambda s, x, t: F.relu(x[s.inputs[0]])
            ),
        ),
        Fault(
            id="S22",
            group="blocks",
            sentence="Half of the layers are run.",
            seen=EARLIER_PORT,
            first_tap="ln_post",
            cause="blocks-skipped",
            how="code",
            formulas=half_of_the_layers,
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
            id="E09",
            group="blocks",
            sentence="GELU is computed in its tanh form in place of the exact one.",
            seen="candle, tinygrad, whisper.cpp; the reverse in kyutai-labs/pocket-tts#278",
            first_tap="conv1.gelu",
            cause="gelu-tanh",
            how="code",
            formulas=lambda dims, layers: every(
                dims, "gelu", lambda s, x, t: F.gelu(x[s.inputs[0]], approximate="tanh")
            ),
        ),
        Fault(
            id="E17",
            group="blocks",
            sentence="The key has a bias, which no checkpoint fills. (softmax does not see it.)",
            seen="vllm-project/vllm#12342",
            first_tap="blocks.{layer}.attn.key",
            cause="bias-added",
            how="code",
            formulas=key_bias,
        ),
        Fault(
            id="E21",
            group="stem",
            sentence="The positional embedding is one frame late.",
            seen="no port known; the neighbour of a missing embedding",
            first_tap="positional_embedding",
            cause="positions-shifted",
            how="weights",
            weights=positions_one_late,
        ),
    )
}
