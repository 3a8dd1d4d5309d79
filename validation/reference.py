"""The reference encoders: stock openai-whisper in float32, and its float64 twin (noise floor).

Neither is ever replaced by anything else: what cannot be loaded raises, and `Reference.check`
raises where the reference does not agree with a second path of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from whisper.model import AudioEncoder, LayerNorm, ModelDimensions, disable_sdpa

from validation.metrics import relative_l2
from validation.stages import compute, own_output, stages
from weights import Checkpoint

Stock = TypeVar("Stock", bound=nn.Module)
Taps = dict[str, Tensor]  # tap name -> (1, frames, channels); only mel is (1, n_mels, frames)

# Relative L2 that two float32 paths of one network, or float32 and float64, may be apart: at the
# end, and at whichever tap it is worst. Over the inputs of validation/inputs.py the largest seen
# were 1.1e-5 and 2.3e-5 (tiny.en). GELU by tanh alone is apart by more.
AT_THE_END = 1e-4
AT_ANY_TAP = 5e-4


class ReferenceBroken(Exception):
    """The reference does not agree with itself, so nothing may be judged by it; one sentence."""


def stock_encoder(checkpoint: Checkpoint) -> AudioEncoder:
    """`whisper.model.AudioEncoder` with the checkpoint's weights, PyTorch float32 on the CPU."""
    d = checkpoint.dims
    module = AudioEncoder(d.n_mels, d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
    module.load_state_dict({name: t.float() for name, t in checkpoint.encoder_tensors().items()})
    return module.eval()


def in_float64(module: Stock) -> Stock:
    """A stock module made float64 throughout; Whisper's LayerNorm, which casts to float32, is
    replaced by the plain one it is derived from."""
    module = module.double()
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LayerNorm):
                plain = nn.LayerNorm(child.normalized_shape, child.eps, dtype=torch.float64)
                plain.load_state_dict(child.state_dict())
                setattr(parent, name, plain)
    return module


def float64_encoder(checkpoint: Checkpoint) -> AudioEncoder:
    """The stock encoder in float64."""
    return in_float64(stock_encoder(checkpoint))


def run_eager(module: AudioEncoder, mel: Tensor) -> Tensor:
    """mel (B, n_mels, frames) -> features, window by window, attention written out."""
    with torch.no_grad(), disable_sdpa():
        return torch.cat([module(window[None]) for window in mel])


def run_float64(module: AudioEncoder, mel: Tensor) -> Tensor:
    """mel -> features in float64. Through PyTorch's fused attention: the eager one of Whisper
    rounds the scores to float32."""
    with torch.no_grad():
        return torch.cat([module(window[None].double()) for window in mel])


class _GeluOf(TorchFunctionMode):
    """Sees the results of `F.gelu` on the tensors that it was told to watch, as the network runs.

    The stem calls `F.gelu` as a function, so no module hook can see what comes out of it.
    """

    def __init__(self) -> None:
        self._watched: list[tuple[Tensor, Callable[[Tensor], None]]] = []

    def watch(self, x: Tensor, see: Callable[[Tensor], None]) -> None:
        self._watched.append((x, see))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.gelu:
            for x, see in self._watched:
                if args[0] is x:
                    see(result)
        return result


def record(module: AudioEncoder, mel: Tensor) -> Taps:
    """Run a stock encoder on one window and return what passed through it, by tap name, in the
    order of computation; mel (1, n_mels, frames) in the module's dtype.

    Everything is taken from the run itself: outputs and inputs of modules by hooks, the two GELUs
    of the stem by `_GeluOf`. The channels-first tensors of the stem are turned, no more.
    Raises ReferenceBroken where the module did not pass through a tap exactly once.
    """
    found: Taps = {}

    def see(name: str, x: Tensor) -> None:
        if name in found:
            raise ReferenceBroken(f"the stock encoder passed {name} twice in one run")
        found[name] = x.detach().contiguous()

    def output(name: str) -> Callable[..., None]:
        return lambda _, inputs, y: see(name, y)

    def input_(name: str) -> Callable[..., None]:
        return lambda _, inputs: see(name, inputs[0])

    gelu = _GeluOf()

    def conv(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:  # y (1, channels, frames)
            see(name, y.transpose(1, 2))
            gelu.watch(y, lambda z: see(f"{name}.gelu", z.transpose(1, 2)))

        return hook

    blocks: list[Any] = list(module.blocks)
    handles = [
        module.register_forward_pre_hook(input_("mel")),
        module.conv1.register_forward_hook(conv("conv1")),
        module.conv2.register_forward_hook(conv("conv2")),
        [*blocks, module.ln_post][0].register_forward_pre_hook(input_("positional_embedding")),
        module.ln_post.register_forward_hook(output("ln_post")),
    ]
    for layer, block in enumerate(blocks):
        b = f"blocks.{layer}"
        handles += [
            block.attn_ln.register_forward_hook(output(f"{b}.attn_ln")),
            block.attn.query.register_forward_hook(output(f"{b}.attn.query")),
            block.attn.key.register_forward_hook(output(f"{b}.attn.key")),
            block.attn.value.register_forward_hook(output(f"{b}.attn.value")),
            block.attn.out.register_forward_pre_hook(input_(f"{b}.attn.qkv_attention")),
            block.attn.out.register_forward_hook(output(f"{b}.attn.out")),
            block.mlp_ln.register_forward_pre_hook(input_(f"{b}.attn.residual")),
            block.mlp_ln.register_forward_hook(output(f"{b}.mlp_ln")),
            *(block.mlp[i].register_forward_hook(output(f"{b}.mlp.{i}")) for i in range(3)),
            block.register_forward_hook(output(b)),
        ]
    try:
        with torch.no_grad(), gelu:
            module(mel)
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class SelfCheck:
    """Whether the reference agrees with itself, on one window; relative L2 at `ln_post` unless said
    otherwise. `Reference.check` returns one only if `agrees`.

    hooked_equals_unhooked  the run with hooks gives the bits of the run without
    repeatable              two runs give the same bits (with and without hooks, or both without)
    finite                  every tap is finite
    fused_relative_l2       stock in PyTorch's fused attention against stock in eager attention
    functional_relative_l2  the formulas of `validation.stages` one after the other in float32, on
                            the checkpoint's tensors and without any stock module, against the hooks
    functional_worst_tap    the tap where that is worst, and how far it is there
    functional_worst
    float64_relative_l2     stock in float32 against its float64 twin
    limit                   what each of these may be at most, functional_worst excepted
    tap_limit               what functional_worst may be at most
    """

    hooked_equals_unhooked: bool
    repeatable: bool
    finite: bool
    fused_relative_l2: float
    functional_relative_l2: float
    functional_worst_tap: str
    functional_worst: float
    float64_relative_l2: float
    limit: float = AT_THE_END
    tap_limit: float = AT_ANY_TAP

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words; nothing if the reference agrees with itself."""
        found = []
        if not self.finite:
            found.append("it has values that are not finite")
        if not self.repeatable:
            found.append("two runs of it differ")
        if not self.hooked_equals_unhooked:
            found.append("its run with hooks differs from the run without")
        at = self.functional_worst_tap
        for what, value, limit in (
            ("by its fused attention", self.fused_relative_l2, self.limit),
            ("by the plain formulas", self.functional_relative_l2, self.limit),
            (f"by the plain formulas at {at}", self.functional_worst, self.tap_limit),
            ("by its float64 twin", self.float64_relative_l2, self.limit),
        ):
            if not value <= limit:  # a NaN is a problem too
                found.append(f"{what} it is {value:.1e} off, at most {limit:.0e} is expected")
        return found

    @property
    def agrees(self) -> bool:
        return not self.problems


class Reference:
    """The stock encoder and its float64 twin with a checkpoint's weights, each built once.

    One window at a time: every mel is (1, n_mels, 2 * n_audio_ctx) float32. Attention is the eager
    one of Whisper in float32, PyTorch's fused one in float64 (see `run_float64`).
    """

    def __init__(self, checkpoint: Checkpoint):
        self.dims = checkpoint.dims
        self.tensors = checkpoint.encoder_tensors()
        self.stock = stock_encoder(checkpoint)
        self._checkpoint = checkpoint

    @cached_property
    def twin(self) -> AudioEncoder:
        return float64_encoder(self._checkpoint)

    def _require(self, mel: Tensor) -> None:
        expected = (1, self.dims.n_mels, 2 * self.dims.n_audio_ctx)
        if tuple(mel.shape) != expected or mel.dtype != torch.float32:
            raise ValueError(
                f"mel has shape {tuple(mel.shape)} and is {mel.dtype}, expected {expected} and "
                "torch.float32"
            )

    def _in_order(self, found: Taps) -> Taps:
        names = [stage.name for stage in stages(self.dims)]
        if found.keys() != set(names):
            missed = sorted(set(names) ^ found.keys())
            raise ReferenceBroken(f"the stock encoder did not pass through {', '.join(missed)}")
        return {name: found[name] for name in names}

    def features(self, mel: Tensor) -> Tensor:
        """The stock encoder's output without any hook, (1, n_audio_ctx, n_audio_state)."""
        self._require(mel)
        return run_eager(self.stock, mel)

    def taps(self, mel: Tensor) -> Taps:
        """Every tap of the stock encoder, float32, in the order of computation."""
        self._require(mel)
        with disable_sdpa():
            return self._in_order(record(self.stock, mel))

    def exact(self, mel: Tensor) -> Taps:
        """Every tap of the float64 twin, float64: what the taps are measured against to know how
        much of a difference float32 itself makes."""
        self._require(mel)
        return self._in_order(record(self.twin, mel.double()))

    def check(self, mel: Tensor, taps: Taps | None = None, exact: Taps | None = None) -> SelfCheck:
        """Run the reference again, and by other paths, and compare: three runs of the encoder.

        `taps` and `exact` are what the methods of these names gave for this mel, for a caller who
        has them; else two more runs. Raises ReferenceBroken, with all that is wrong, where the
        reference does not agree with itself.
        """
        taps = self.taps(mel) if taps is None else taps
        exact = self.exact(mel) if exact is None else exact
        with torch.no_grad():
            fused = self.stock(mel)
        functional = functional_distances(taps, mel, self.tensors, self.dims)
        return self_check(
            "encoder", "ln_post", lambda: self.features(mel), taps, exact, fused, functional
        )


def rank(distance: float) -> float:
    """NaN counts as the largest."""
    return distance if distance == distance else torch.inf


def self_check(
    part: str,
    last: str,
    run: Callable[[], Tensor],
    taps: Taps,
    exact: Taps,
    fused: Tensor,
    functional: dict[str, float],
) -> SelfCheck:
    """What the runs of a stock part of the model show of each other, at its `last` tap.

    run  gives that tap without hooks, anew each time
    fused  the same by PyTorch's fused attention
    functional  how far the plain formulas are from each tap

    Raises ReferenceBroken, with all that is wrong, where the part does not agree with itself.
    """
    first = run()
    same = torch.equal(taps[last], first)  # two runs already: equal, they are repeatable
    worst = max(functional, key=lambda name: rank(functional[name]))
    found = SelfCheck(
        hooked_equals_unhooked=same,
        repeatable=same or torch.equal(first, run()),
        finite=all(bool(torch.isfinite(x).all()) for x in taps.values()),
        fused_relative_l2=relative_l2(fused, first),
        functional_relative_l2=functional[last],
        functional_worst_tap=worst,
        functional_worst=functional[worst],
        float64_relative_l2=relative_l2(first, exact[last]),
    )
    if not found.agrees:
        raise ReferenceBroken(
            f"the stock {part} cannot serve as the reference: " + "; ".join(found.problems)
        )
    return found


def functional_distances(
    taps: Taps, mel: Tensor, tensors: Mapping[str, Tensor], dims: ModelDimensions
) -> dict[str, float]:
    """The formulas of `validation.stages` one after the other, in the dtype of `mel`, on their own
    results: relative L2 of each from `taps`. No stock module has a part in it.

    What no later stage reads is let go, so that a large encoder is not held a second time.
    """
    left = stages(dims)
    last_use = {name: i for i, stage in enumerate(left) for name in stage.inputs}
    running: Taps = {"mel": mel}
    found = {}
    for i, stage in enumerate(left):
        running[stage.name] = compute(stage, running, tensors, dims.n_audio_head)
        found[stage.name] = relative_l2(running[stage.name], taps[stage.name])
        running = {name: x for name, x in running.items() if last_use.get(name, 0) > i}
    return found


def floor(taps: Taps, exact: Taps) -> dict[str, float]:
    """The noise floor: relative L2 of each float32 tap from the float64 one."""
    return {name: relative_l2(x, exact[name]) for name, x in taps.items()}


def own_floor(taps: Taps, tensors: Mapping[str, Tensor], dims: ModelDimensions) -> dict[str, float]:
    """What float32 costs in each stage alone: relative L2 of the stage's formula in float32 from
    the formula in float64, both on the reference's float32 inputs."""
    found = {}
    for stage in stages(dims):
        single = compute(stage, taps, tensors, dims.n_audio_head)
        found[stage.name] = relative_l2(single, own_output(stage, taps, tensors, dims.n_audio_head))
    return found
