"""Mistakes made on purpose in PyTorch's encoder are found at the right tap and called by their
name; noise, and what the table does not hold, is called nothing. No graph is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLES, first_window
from test_faults_input import MADE as OF_SAMPLES
from torch import Tensor
from whisper.model import ModelDimensions

from validation.faults import FAULTS, Fault, Twin, not_run
from validation.fingerprints import PHRASES, Cause, explain
from validation.metrics import relative_l2
from validation.reference import run_eager, stock_encoder
from validation.stages import Stage, attend, compute, heads, stages
from weights import Checkpoint

DIVERGES = 1e-4  # relative L2 of a tap; two right encoders differ by less than 1e-5
FRAMES = 800  # of a short window: enough to tell a matrix of 384 + 1 rows from noise


@dataclass(frozen=True)
class Bench:
    """A checkpoint, a window, and the right taps of it."""

    checkpoint: Checkpoint
    mel: Tensor
    reference: dict[str, Tensor]

    @property
    def dims(self) -> ModelDimensions:
        return self.checkpoint.dims

    def stage(self, name: str) -> Stage:
        return next(stage for stage in stages(self.dims) if stage.name == name)

    def first_diverging(self, candidate: dict[str, Tensor]) -> Stage | None:
        for stage in stages(self.dims):
            tap, right = candidate.get(stage.name), self.reference[stage.name]
            if tap is not None and relative_l2(tap, right) > DIVERGES:
                return stage
        return None

    def explain(self, name: str, candidate: dict[str, Tensor]) -> Cause | None:
        tensors = self.checkpoint.encoder_tensors()
        return explain(self.stage(name), candidate, self.reference, tensors, self.dims)

    def explain_formula(self, name: str, formula: Callable[..., Tensor]) -> Cause | None:
        """The cause found where one stage has another formula, and all before it is right."""
        twin = Twin(self.checkpoint, formulas={name: formula})
        names = [stage.name for stage in stages(self.dims)]
        before = names[: names.index(name)]
        candidate = {tap: self.reference[tap] for tap in before}
        candidate[name] = twin.stage(self.stage(name), self.reference)
        return self.explain(name, candidate)


def bench(checkpoint: Checkpoint, mel: Tensor) -> Bench:
    return Bench(checkpoint, mel, Twin(checkpoint).taps(mel))


def short(checkpoint: Checkpoint, mel: Tensor) -> Bench:
    """The first FRAMES frames of the encoder alone, which makes the tests quick."""
    name = "encoder.positional_embedding"
    cut = replace(
        checkpoint,
        dims=replace(checkpoint.dims, n_audio_ctx=FRAMES),
        tensors=checkpoint.tensors | {name: checkpoint.tensors[name][:FRAMES]},
    )
    return bench(cut, mel[:, :, : 2 * FRAMES])


@pytest.fixture(scope="module")
def demo_bench(demo_checkpoint: Checkpoint) -> Bench:
    return bench(demo_checkpoint, first_window(SAMPLES / "demo.flac"))


@pytest.fixture(scope="module")
def real_bench(real_checkpoint: Checkpoint, jfk) -> Bench:
    return bench(real_checkpoint, first_window(jfk))


@pytest.fixture(scope="module")
def demo_short(demo_checkpoint: Checkpoint) -> Bench:
    return short(demo_checkpoint, first_window(SAMPLES / "demo.flac"))


@pytest.fixture(scope="module")
def real_short(real_checkpoint: Checkpoint, jfk) -> Bench:
    return short(real_checkpoint, first_window(jfk))


# ---- the twin, and the faults of the catalogue


def test_the_twin_is_the_stock_encoder(demo_checkpoint: Checkpoint, demo_bench: Bench):
    stock = run_eager(stock_encoder(demo_checkpoint), demo_bench.mel)
    assert relative_l2(demo_bench.reference["ln_post"], stock) < 1e-5
    assert torch.equal(
        Twin(demo_checkpoint).features(demo_bench.mel), demo_bench.reference["ln_post"]
    )


def test_the_twin_injects(demo_short: Bench):
    """With wrong convolutions, all else is right on the reference's inputs, and nothing without."""
    wrong = Twin(demo_short.checkpoint, FAULTS["S07"])
    injected, free = wrong.injected(demo_short.reference), wrong.taps(demo_short.mel)
    for stage in stages(demo_short.dims):
        right = demo_short.reference[stage.name]
        off = stage.name in ("conv1", "conv2")
        assert (relative_l2(injected[stage.name], right) > DIVERGES) == off
        assert (relative_l2(free[stage.name], right) > DIVERGES) == (stage.name != "mel")


def test_no_cause_where_nothing_is_wrong(demo_short: Bench):
    """Nor for a second right encoder, whose taps differ from the reference's by float32 noise."""
    near = Twin(demo_short.checkpoint).taps(demo_short.mel * (1 + 1e-6))
    for taps in (demo_short.reference, near):
        assert demo_short.first_diverging(taps) is None
    for stage in [*stages(demo_short.dims)[1:18], demo_short.stage("ln_post")]:
        assert demo_short.explain(stage.name, near) is None, stage.name
        alone = {stage.name: near[stage.name]}
        assert demo_short.explain(stage.name, alone) is None, stage.name


def layers_of(fault: Fault) -> list[int | None]:
    return [None, 2] if "{layer}" in fault.first_tap else [None]


NAMES = "S07 S14 S16 S18 S21 S22 S23 E09 E17 E21".split()  # tests/test_faults.py has all
TEN = [(FAULTS[name], layer) for name in NAMES for layer in layers_of(FAULTS[name])]
TEN_IDS = [f"{fault.id}-{'all' if layer is None else layer}" for fault, layer in TEN]


def assert_found(bench: Bench, fault: Fault, layer: int | None) -> None:
    candidate = Twin(bench.checkpoint, fault, layer).taps(bench.mel)
    first = bench.first_diverging(candidate)
    assert first is not None
    assert first.name == fault.diverges_at(layer)
    cause = bench.explain(first.name, candidate)
    assert cause is not None
    assert cause.id == fault.cause
    assert cause.score < 1e-6 < DIVERGES < cause.baseline
    assert cause.sentence.startswith(f"{first.name}: explained ")
    if cause.tensor is not None:
        assert cause.tensor in candidate or cause.tensor.startswith(first.name)


@pytest.mark.parametrize(("fault", "layer"), TEN, ids=TEN_IDS)
def test_ten_faults_on_demo(demo_bench: Bench, fault: Fault, layer: int | None):
    assert_found(demo_bench, fault, layer)


@pytest.mark.parametrize(("fault", "layer"), TEN, ids=TEN_IDS)
def test_ten_faults_on_the_real_encoder(real_bench: Bench, fault: Fault, layer: int | None):
    assert_found(real_bench, fault, layer)


def test_a_missing_bias_in_words(demo_bench: Bench):
    candidate = Twin(demo_bench.checkpoint, FAULTS["S14"], 2).taps(demo_bench.mel)
    cause = demo_bench.explain("blocks.2.attn.query", candidate)
    assert cause is not None
    assert cause.tensor == "blocks.2.attn.query.bias"
    assert cause.sentence.endswith("-7 by `blocks.2.attn.query.bias` missing")


def test_one_layer_alone(demo_checkpoint: Checkpoint):
    damaged = FAULTS["S16"].damage(demo_checkpoint, 2)
    for name, tensor in demo_checkpoint.tensors.items():
        right = torch.equal(tensor, damaged.tensors[name])
        attention = name.startswith("encoder.blocks.2.attn.") and name.endswith(".weight")
        assert right != attention, name
    with pytest.raises(ValueError, match="layer is 4, the encoder has 0 to 3"):
        FAULTS["S16"].damage(demo_checkpoint, 4)


def test_a_formula_for_no_stage_is_refused(demo_checkpoint: Checkpoint):
    with pytest.raises(ValueError, match="no stage has the name ln_pre"):
        Twin(demo_checkpoint, formulas={"ln_pre": not_run})


# ---- every fingerprint, made on purpose at one stage: formulas written apart from the table's


def conv(s: Stage, x: Tensor, w: Tensor, b: Tensor | None, stride: int | None = None) -> Tensor:
    """x as the stage reads it, already padded."""
    return F.conv1d(x, w, b, stride=stride or s.stride).transpose(1, 2)


def channels_first(s: Stage, x) -> Tensor:
    return x["mel"] if s.inputs == ("mel",) else x[s.inputs[0]].transpose(1, 2)


def padded(s: Stage, x, left: int = 1, right: int = 1, mode: str = "constant") -> Tensor:
    return F.pad(channels_first(s, x), (left, right), mode=mode)


def kernel(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The convolution with its kernel changed."""
    return lambda s, x, t: conv(s, padded(s, x), change(t[s.weights[0]]), t[s.weights[1]])


def alone(tap: int, at: int) -> Callable[[Tensor], Tensor]:
    def change(w: Tensor) -> Tensor:
        changed = torch.zeros_like(w)
        changed[:, :, at] = w[:, :, tap]
        return changed

    return change


def first(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A formula of the first input alone."""
    return lambda s, x, t: function(x[s.inputs[0]])


def right(s: Stage, x, t) -> Tensor:
    return compute(s, x, t, 6)


def output(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The right output, changed."""
    return lambda s, x, t: change(right(s, x, t))


def added(make: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The positions stage with another table."""
    return lambda s, x, t: x[s.inputs[0]] + make(t[s.weights[0]])


def norm(epsilon: float = 1e-5, gamma: bool = True, beta: bool = True) -> Callable[..., Tensor]:
    def formula(s: Stage, x, t) -> Tensor:
        w, b = (t[name] for name in s.weights)
        y = x[s.inputs[0]]
        return F.layer_norm(y, y.shape[-1:], w if gamma else None, b if beta else None, epsilon)

    return formula


def rms(beta: bool) -> Callable[..., Tensor]:
    def formula(s: Stage, x, t) -> Tensor:
        w, b = (t[name] for name in s.weights)
        return F.rms_norm(x[s.inputs[0]], w.shape, w, 1e-5) + (b if beta else 0)

    return formula


def unbiased(s: Stage, x, t) -> Tensor:
    y, w, b = x[s.inputs[0]], *(t[name] for name in s.weights)
    return (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-5).sqrt() * w + b


def over_frames(s: Stage, x, t) -> Tensor:
    y, w, b = x[s.inputs[0]], *(t[name] for name in s.weights)
    return F.layer_norm(y.mT, y.shape[1:2]).mT * w + b


def reading(*inputs: str) -> Callable[..., Tensor]:
    return lambda s, x, t: right(replace(s, inputs=inputs), x, t)


def using(*weights: str) -> Callable[..., Tensor]:
    return lambda s, x, t: right(replace(s, weights=weights), x, t)


def linear(
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    bias: Callable[[Tensor], Tensor | None] = lambda b: b,
    x_: Callable[[Tensor], Tensor] = lambda x: x,
) -> Callable[..., Tensor]:
    def formula(s: Stage, x, t) -> Tensor:
        b = bias(t[s.weights[1]]) if len(s.weights) == 2 else None
        return F.linear(x_(x[s.inputs[0]]), weight(t[s.weights[0]]), b)

    return formula


def int8(axis: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    def change(w: Tensor) -> Tensor:
        step = w.abs().amax(axis, keepdim=True) / 127
        return torch.round(w / step) * step

    return change


def as_type(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).float()


def random_like(x: Tensor, seed: int = 0) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return noise * x.std() + x.mean()


def attention(
    scale: float = 64**-0.5,
    n_head: int = 6,
    weights: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    merge: Callable[[Tensor], Tensor] = lambda wv: wv.transpose(1, 2).flatten(2),
) -> Callable[..., Tensor]:
    def formula(s: Stage, x, t) -> Tensor:
        q, k, v = (heads(x[name], n_head) for name in s.inputs)
        return merge(weights((q * scale) @ k.mT) @ v)

    return formula


def masked(scores: Tensor) -> Tensor:
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def not_split(s: Stage, x, t) -> Tensor:
    q, k, v = (x[n].reshape(1, 6, -1, 64) for n in s.inputs)
    return F.scaled_dot_product_attention(q, k, v).reshape(x[s.inputs[0]].shape)


def inputs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda s, x, t: function(*(x[name] for name in s.inputs))


B = "blocks.1"
Q, K, V, OUT = (f"{B}.attn.{name}" for name in ("query", "key", "value", "out"))
LN, MLP_LN, MIX = f"{B}.attn_ln", f"{B}.mlp_ln", f"{B}.attn.qkv_attention"
UP, ACT, DOWN, RES = f"{B}.mlp.0", f"{B}.mlp.1", f"{B}.mlp.2", f"{B}.attn.residual"
BF16, FP16 = as_type(torch.bfloat16), as_type(torch.float16)
PERM = [3, 0, 5, 1, 2, 4]

MADE = [
    ("conv-middle-tap", "conv2", kernel(alone(1, 1))),
    ("conv-outer-tap", "conv1", kernel(alone(0, 0))),
    ("conv-outer-tap", "conv2", kernel(alone(2, 1))),
    (
        "conv-taps-summed",
        "conv1",
        kernel(lambda w: alone(0, 1)(w.sum(2, keepdim=True).repeat(1, 1, 3))),
    ),
    (
        "conv-taps-averaged",
        "conv2",
        kernel(lambda w: alone(0, 1)(w.mean(2, keepdim=True).repeat(1, 1, 3))),
    ),
    ("conv-reversed", "conv1", kernel(lambda w: w.flip(2))),
    ("conv-layout", "conv2", kernel(lambda w: w.reshape(384, 3, 384).transpose(1, 2))),
    (
        "conv-shifted",
        "conv1",
        lambda s, x, t: conv(s, padded(s, x, 2, 0), *(t[n] for n in s.weights)),
    ),
    (
        "conv-shifted",
        "conv2",
        lambda s, x, t: conv(s, padded(s, x, 0, 2), *(t[n] for n in s.weights)),
    ),
    (
        "conv-stride-missing",
        "conv2",
        lambda s, x, t: conv(s, padded(s, x), *(t[n] for n in s.weights), stride=1)[:, :FRAMES],
    ),
    (
        "conv-padding",
        "conv1",
        lambda s, x, t: conv(s, padded(s, x, mode="replicate"), *(t[n] for n in s.weights)),
    ),
    (
        "conv-padding",
        "conv2",
        lambda s, x, t: conv(s, padded(s, x, mode="reflect"), *(t[n] for n in s.weights)),
    ),
    (
        "conv-edges",
        "conv1",
        lambda s, x, t: conv(s, padded(s, x, mode="circular"), *(t[n] for n in s.weights)),
    ),
    (
        "conv-edges",
        "conv2",
        lambda s, x, t: torch.cat([right(s, x, t)[:, 1:2], right(s, x, t)[:, 1:]], 1),
    ),
    ("weight-transposed", "conv2", kernel(lambda w: w.transpose(0, 1))),
    ("bias-missing", "conv1", lambda s, x, t: conv(s, padded(s, x), t[s.weights[0]], None)),
    ("weight-rounded", "conv2", kernel(BF16)),
    (
        "product-rounded",
        "conv1",
        lambda s, x, t: conv(s, BF16(padded(s, x)), BF16(t[s.weights[0]]), t[s.weights[1]]),
    ),
    ("unknown-weights", "conv1", kernel(random_like)),
    ("gelu-tanh", "conv2.gelu", first(lambda x: F.gelu(x, approximate="tanh"))),
    ("gelu-relu", ACT, first(F.relu)),
    ("gelu-silu", ACT, first(F.silu)),
    ("gelu-quick", "conv1.gelu", first(lambda x: x * torch.sigmoid(1.702 * x))),
    ("gelu-missing", "conv2.gelu", first(lambda x: x)),
    ("gelu-twice", "conv2.gelu", first(lambda x: F.gelu(F.gelu(x)))),
    ("gelu-float16-table", "conv1.gelu", first(lambda x: F.gelu(x.half().float()).half().float())),
    (
        "gelu-float16-table",
        ACT,
        first(lambda x: F.gelu(x.half().float(), approximate="tanh").half().float()),
    ),
    ("positions-missing", "positional_embedding", added(torch.zeros_like)),
    ("positions-twice", "positional_embedding", added(lambda p: 2 * p)),
    ("positions-shifted", "positional_embedding", added(lambda p: F.pad(p[1:], (0, 0, 0, 1)))),
    (
        "positions-interleaved",
        "positional_embedding",
        added(lambda p: p.view(-1, 2, 192).transpose(1, 2).reshape(-1, 384)),
    ),
    (
        "positions-cos-first",
        "positional_embedding",
        added(lambda p: torch.cat([p[:, 192:], p[:, :192]], 1)),
    ),
    (
        "positions-input-scaled",
        "positional_embedding",
        lambda s, x, t: x[s.inputs[0]] * 384**0.5 + t[s.name],
    ),
    ("norm-missing", LN, first(lambda x: x)),
    ("norm-not-affine", MLP_LN, norm(gamma=False, beta=False)),
    ("norm-weight-missing", MLP_LN, norm(gamma=False)),
    ("bias-missing", LN, norm(beta=False)),
    ("norm-twice", "ln_post", lambda s, x, t: norm()(s, {s.inputs[0]: right(s, x, t)}, t)),
    ("norm-epsilon", "blocks.0.attn_ln", norm(1e-3)),
    ("norm-epsilon", "blocks.0.attn_ln", norm(1e-12)),
    ("norm-epsilon", "blocks.0.mlp_ln", norm(1e-6)),
    ("norm-unbiased", "ln_post", unbiased),
    ("norm-rms", LN, rms(True)),
    ("norm-rms", "ln_post", rms(False)),
    ("norm-over-frames", LN, over_frames),
    ("other-weights", LN, using(f"{MLP_LN}.weight", f"{MLP_LN}.bias")),
    ("other-input", LN, reading("blocks.0.attn.residual")),
    ("other-input", MLP_LN, reading("blocks.0")),
    ("blocks-skipped", "blocks.2.attn_ln", reading("blocks.0")),
    ("blocks-skipped", "ln_post", reading("positional_embedding")),
    (
        "unknown-weights",
        MLP_LN,
        lambda s, x, t: right(s, x, {n: random_like(t[n]) for n in s.weights}),
    ),
    ("weight-transposed", OUT, linear(lambda w: w.T)),
    ("weight-transposed", Q, linear(lambda w: w.T, lambda b: None)),
    ("bias-missing", DOWN, linear(bias=lambda b: None)),
    ("bias-twice", V, linear(bias=lambda b: 2 * b)),
    ("bias-other", OUT, using(f"{OUT}.weight", f"{V}.bias")),
    ("bias-added", K, using(f"{K}.weight", f"{Q}.bias")),
    ("bias-added", K, lambda s, x, t: right(s, x, t) + random_like(t[f"{Q}.bias"])),
    ("qkv-order", Q, using(f"{K}.weight")),
    ("qkv-order", K, using(f"{V}.weight", f"{V}.bias")),
    ("qkv-order", V, using(f"{Q}.weight", f"{V}.bias")),
    ("other-weights", OUT, using("blocks.3.attn.out.weight", "blocks.3.attn.out.bias")),
    ("other-weights", Q, using("blocks.2.attn.out.weight", f"{Q}.bias")),
    ("other-weights", UP, using("blocks.0.mlp.0.weight", "blocks.0.mlp.0.bias")),
    ("other-input", Q, reading("blocks.0")),
    ("other-input", UP, reading(RES)),
    ("weight-rounded", UP, linear(BF16)),
    ("weight-rounded", Q, linear(int8((0, 1)))),
    ("weight-rounded", DOWN, linear(int8((1,)))),
    ("product-rounded", V, linear(FP16, x_=FP16)),
    ("product-rounded", UP, linear(BF16, x_=BF16)),
    ("unknown-weights", K, linear(random_like)),
    ("unknown-weights", UP, linear(lambda w: w + 1e-2 * random_like(w))),
    ("heads-permuted", Q, output(lambda y: y.unflatten(2, (6, 64))[:, :, PERM].flatten(2))),
    ("channels-permuted", K, output(lambda y: y.unflatten(2, (6, 64)).transpose(2, 3).flatten(2))),
    ("attention-scale", MIX, attention(384**-0.5)),
    ("attention-scaled-twice", MIX, attention(1 / 64)),
    ("attention-unscaled", MIX, attention(1.0)),
    ("attention-half-scaled", MIX, attention(64**-0.25)),
    ("one-head", MIX, attention(384**-0.5, n_head=1)),
    ("one-head", MIX, attention(n_head=1)),
    ("qkv-order", MIX, inputs(lambda q, k, v: attend(k, q, v, 6))),
    ("qkv-order", MIX, inputs(lambda q, k, v: attend(v, k, q, 6))),
    ("causal-mask", MIX, attention(weights=masked)),
    ("softmax-axis", MIX, attention(weights=lambda scores: scores.softmax(-2))),
    ("softmax-axis", MIX, attention(weights=lambda scores: scores.softmax(1))),
    ("heads-not-merged", MIX, attention(merge=lambda wv: wv.reshape(1, -1, 384))),
    ("heads-not-split", MIX, not_split),
    ("scores-rounded", MIX, attention(weights=lambda scores: FP16(scores).softmax(-1))),
    ("heads-permuted", MIX, attention(merge=lambda wv: wv[:, PERM].transpose(1, 2).flatten(2))),
    ("residual-branch-missing", RES, first(lambda x: x)),
    ("residual-skip-missing", B, inputs(lambda x, branch: branch)),
    ("residual-branch-twice", RES, inputs(lambda x, branch: x + 2 * branch)),
    ("residual-branch-scaled", B, inputs(lambda x, branch: x - 0.5 * branch)),
    ("residual-other", RES, lambda s, x, t: x[LN] + x[OUT]),
    ("residual-other", B, lambda s, x, t: x["blocks.0"] + x[DOWN]),
    ("residual-other", RES, lambda s, x, t: x["blocks.0"] + x[MIX]),
    ("frames-shifted", DOWN, output(lambda y: y.roll(5, 1))),
    ("frames-shifted", "conv1", output(lambda y: y.roll(-1, 1))),
    ("transposed", "ln_post", output(lambda y: y.mT.reshape(y.shape))),
    ("frames-renormalised", "ln_post", output(lambda y: F.layer_norm(y, y.shape[2:]))),
    ("frames-renormalised", B, output(lambda y: F.normalize(y, dim=2))),
    ("output-rounded", RES, output(BF16)),
    ("other-tap", OUT, lambda s, x, t: x[V]),
    ("other-tap", DOWN, lambda s, x, t: x["blocks.0.mlp.2"]),
    ("scaled", Q, output(lambda y: y / 8)),
    ("scaled", "ln_post", output(lambda y: y * (0.22 / y.std()))),
    ("scaled-and-offset", "ln_post", output(lambda y: (y - y.mean() + 0.5) / y.std())),
    ("channel-offset", DOWN, output(lambda y: y + random_like(y[0, 0]))),
    ("channel-gain", "ln_post", output(lambda y: y * random_like(y[0, 0]))),
]


def ids(rows) -> list[str]:
    return [f"{row[0]}-{row[1]}" for row in rows]


@pytest.mark.parametrize(("id", "name", "formula"), MADE, ids=ids(MADE))
def test_fingerprints_on_demo(demo_short: Bench, id: str, name: str, formula):
    assert_called(demo_short, id, name, formula)


@pytest.mark.parametrize(("id", "name", "formula"), MADE, ids=ids(MADE))
def test_fingerprints_on_the_real_encoder(real_short: Bench, id: str, name: str, formula):
    assert_called(real_short, id, name, formula)


def assert_called(bench: Bench, id: str, name: str, formula) -> None:
    cause = bench.explain_formula(name, formula)
    assert cause is not None
    assert cause.id == id, cause.sentence
    assert cause.score <= cause.baseline / 20


# ---- what is seen at a glance, mel, whole blocks, foreign candidates


def with_tap(bench: Bench, name: str, tap: Tensor) -> dict[str, Tensor]:
    return bench.reference | {name: tap}


def not_finite(y: Tensor) -> Tensor:
    y = y.clone()
    y[0, 3, 5] = math.nan
    y[0, 7] = math.inf
    return y


GLANCES = [
    ("not-finite", DOWN, not_finite, "385 values of 307200 NaN or infinite, the others right"),
    ("all-zero", OUT, torch.zeros_like, "explained exactly by zeros everywhere"),
    ("transposed", "ln_post", lambda y: y.mT, "frames and channels exchanged"),
    ("frames-cut", "ln_post", lambda y: y[:, :500], "the first 500 frames alone"),
    ("transposed", "mel", lambda y: y.mT, "frames and channels exchanged"),
    ("frames-cut", "mel", lambda y: y[:, :, :800], "the first 800 frames alone"),
]


@pytest.mark.parametrize(("id", "name", "change", "words"), GLANCES, ids=ids(GLANCES))
def test_at_a_glance(demo_short: Bench, id: str, name: str, change, words: str):
    cause = demo_short.explain(name, with_tap(demo_short, name, change(demo_short.reference[name])))
    assert cause is not None
    assert cause.id == id
    assert cause.sentence.endswith(words)


def log10_power(mel: Tensor) -> Tensor:
    return 4 * mel - 4


def padded_in_mel(mel: Tensor) -> Tensor:
    mel = mel.clone()
    mel[:, :, 1200:] = 0.0
    mel[:, :, 1199] += 0.1  # the frame before the end of the audio sees the cut
    return mel


LN10 = math.log(10)
MELS = [
    ("mel-unscaled", log10_power),
    ("mel-natural-log", lambda m: LN10 * log10_power(m)),
    ("mel-natural-log", lambda m: (LN10 * log10_power(m) + 4) / 4),
    ("mel-natural-log", lambda m: (10 ** log10_power(m) + 1e-8).log()),
    ("mel-decibel", lambda m: 10 * (log10_power(m) - log10_power(m).max())),
    ("mel-bins-reversed", lambda m: m.flip(1)),
    ("mel-zero-padding", padded_in_mel),
    ("mel-floor", lambda m: m.clamp(min=float(m.min()) + 0.2)),
    ("mel-floor", lambda m: torch.where(m > m.min() + 1e-6, m, m - 0.3 * random_like(m).abs())),
    ("frames-shifted", lambda m: m.roll(1, 2)),
    ("frames-shifted", lambda m: m.roll(-37, 2)),
    ("scaled", lambda m: m * 32767 / 32768 * 1.01),
    ("scaled-and-offset", lambda m: (m - m.mean()) / m.std()),
    ("output-rounded", BF16),
]


@pytest.mark.parametrize(("id", "change"), MELS, ids=[row[0] for row in MELS])
def test_mel(demo_short: Bench, id: str, change):
    assert_mel_called(demo_short, id, change)


@pytest.mark.parametrize(("id", "change"), MELS, ids=[row[0] for row in MELS])
def test_mel_of_a_window_that_is_mostly_padding(real_bench: Bench, id: str, change):
    assert_mel_called(real_bench, id, change)


def assert_mel_called(bench: Bench, id: str, change) -> None:
    cause = bench.explain("mel", with_tap(bench, "mel", change(bench.mel)))
    assert cause is not None
    assert cause.id == id, cause.sentence


def exchanged(checkpoint: Checkpoint, a: int, b: int) -> Checkpoint:
    """Two blocks of a checkpoint exchanged."""
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.tensors:
        for old, new in ((a, b), (b, a)):
            if name.startswith(f"encoder.blocks.{old}."):
                there = name.replace(f"blocks.{old}.", f"blocks.{new}.", 1)
                tensors[name] = checkpoint.tensors[there]
    return replace(checkpoint, tensors=tensors)


def test_two_blocks_exchanged(demo_short: Bench):
    """E22, with every tap shown: the norm names another norm, and the rest of the block agrees."""
    candidate = Twin(exchanged(demo_short.checkpoint, 1, 2)).taps(demo_short.mel)
    first = demo_short.first_diverging(candidate)
    assert first is not None
    assert first.name == LN
    cause = demo_short.explain(LN, candidate)
    assert cause is not None
    assert cause.id == "block-other-weights"
    assert cause.tensor == "blocks.2.attn_ln.weight"
    assert cause.sentence.endswith("the weights of blocks.2 used in blocks.1")


def test_one_tensor_of_another_block_is_not_the_whole_block(demo_short: Bench):
    other = f"encoder.{LN}.weight", f"encoder.{LN}.bias"
    tensors = demo_short.checkpoint.tensors
    wrong = tensors | {name: tensors[name.replace("blocks.1", "blocks.2")] for name in other}
    candidate = Twin(replace(demo_short.checkpoint, tensors=wrong)).taps(demo_short.mel)
    cause = demo_short.explain(LN, candidate)
    assert cause is not None
    assert cause.id == "other-weights"


def outputs_alone(taps: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a port shows that keeps its hidden states: the outputs of the blocks, and the last."""
    kept = ("positional_embedding", "ln_post")
    return {n: t for n, t in taps.items() if n in kept or n.removeprefix("blocks.").isdigit()}


def block_runs(bench: Bench, order: list[int]) -> dict[str, Tensor]:
    """The hidden states where the blocks are run in this order; the i-th output is blocks.i."""
    taps = outputs_alone(bench.reference)
    twin, x = Twin(bench.checkpoint), bench.reference["positional_embedding"]
    for i, layer in enumerate(order):
        inner = {f"blocks.{layer - 1}" if layer else "positional_embedding": x}
        for stage in stages(bench.dims):
            if f"{stage.name}.".startswith(f"blocks.{layer}."):
                inner[stage.name] = twin.stage(stage, inner)
        taps[f"blocks.{i}"] = x = inner[f"blocks.{layer}"]
    return taps


def test_hidden_states_alone(demo_short: Bench):
    right = block_runs(demo_short, [0, 1, 2, 3])
    assert demo_short.first_diverging(right) is None
    swapped = block_runs(demo_short, [0, 2, 1, 3])
    assert demo_short.first_diverging(swapped) == demo_short.stage("blocks.1")
    cause = demo_short.explain("blocks.1", swapped)
    assert cause is not None
    assert cause.id == "block-other-weights"
    assert cause.sentence.endswith("the weights of blocks.2 used in blocks.1")
    skipped = outputs_alone(demo_short.reference) | {"blocks.2": demo_short.reference["blocks.1"]}
    cause = demo_short.explain("blocks.2", skipped)
    assert cause is not None
    assert cause.id == "block-skipped"
    again = block_runs(demo_short, [0, 1, 1, 3])["blocks.2"]
    twice = block_runs(demo_short, [0, 0, 2, 3])
    twice = {"positional_embedding": twice["positional_embedding"], "blocks.0": twice["blocks.1"]}
    cause = demo_short.explain("blocks.0", twice)
    assert cause is not None
    assert cause.id == "block-twice"
    cause = demo_short.explain(
        "blocks.2", outputs_alone(demo_short.reference) | {"blocks.2": again}
    )
    assert cause is not None
    assert cause.id == "block-other-weights"


LAST = [
    ("norm-missing", lambda taps: taps["blocks.3"]),
    ("transposed", lambda taps: taps["ln_post"].mT),
    ("scaled", lambda taps: taps["ln_post"] * 0.4),
    ("frames-shifted", lambda taps: taps["ln_post"].roll(1, 1)),
    ("frames-renormalised", lambda taps: F.layer_norm(taps["ln_post"], (384,))),
]


@pytest.mark.parametrize(("id", "change"), LAST, ids=[row[0] for row in LAST])
def test_the_features_alone(demo_short: Bench, id: str, change):
    """An export that shows its output and nothing else: the reference's inputs have to do."""
    near = Twin(demo_short.checkpoint).taps(demo_short.mel * (1 + 1e-6))
    cause = demo_short.explain("ln_post", {"ln_post": change(near)})
    assert cause is not None
    assert cause.id == id


def test_a_mistake_inside_is_not_guessed_from_the_features(demo_short: Bench):
    for fault in ("S07", "S16", "S18", "E09", "E21"):
        features = Twin(demo_short.checkpoint, FAULTS[fault]).features(demo_short.mel)
        assert demo_short.explain("ln_post", {"ln_post": features}) is None, fault


def test_half_precision_does_not_hide_a_missing_bias(real_short: Bench):
    """A candidate in bfloat16: 3e-3 of noise beside a mistake of 5e-1."""
    cause = real_short.explain_formula(
        Q, lambda s, x, t: BF16(F.linear(x[LN], BF16(t[f"{Q}.weight"])))
    )
    assert cause is not None
    assert cause.id == "bias-missing"
    assert 1e-4 < cause.score < 2e-2


@pytest.mark.parametrize(
    ("dtype", "to"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")]
)
def test_half_precision_throughout(demo_short: Bench, dtype: torch.dtype, to: str):
    """Every stage of a candidate in half precision is called that, by one of its names."""
    tensors = {name: t.to(dtype) for name, t in demo_short.checkpoint.encoder_tensors().items()}
    taps = {"mel": demo_short.mel}
    for stage in stages(demo_short.dims)[1:17]:
        inputs = {name: taps[name].to(dtype) for name in stage.inputs}
        taps[stage.name] = compute(stage, inputs, tensors, 6)
        cause = demo_short.explain(stage.name, taps)
        assert cause is not None, stage.name
        assert cause.id in ("low-precision", "output-rounded", "gelu-float16-table")
        # tf32 and float16 have the same ten bits: above 6e-5 nothing tells them apart
        assert to in cause.sentence or (to == "float16" and "tf32" in cause.sentence)


def test_few_bits_alone_are_no_cause(demo_short: Bench):
    """An output in bfloat16 beside an error that is larger than its roundings."""
    assert demo_short.explain_formula(OUT, lambda s, x, t: BF16(noisy(0.1)(s, x, t))) is None


# ---- what must be called nothing


def noisy(size: float, where: str = "all") -> Callable[..., Tensor]:
    """White noise of a relative size, everywhere or in one place."""

    def change(y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        mask = torch.zeros_like(y)
        {"all": mask, "channel": mask[..., 7], "frame": mask[:, 100], "edge": mask[:, :2]}[
            where
        ].fill_(1)
        noise *= mask
        return y + size * noise * torch.linalg.vector_norm(y) / torch.linalg.vector_norm(noise)

    return output(change)


def shuffled(y: Tensor) -> Tensor:
    return y[:, torch.randperm(y.shape[1], generator=torch.Generator().manual_seed(2))]


def zeroed(part: slice) -> Callable[[Tensor], Tensor]:
    def change(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, part] = 0
        return y

    return change


KINDS = ["conv1", "conv2.gelu", "positional_embedding", LN, K, MIX, RES, "ln_post"]
NOTHING = [
    *[(f"noise-{size:g}", name, noisy(size)) for name in KINDS for size in (1e-5, 1e-2)],
    *[(f"noise-{w}", n, noisy(0.01, w)) for n in KINDS for w in ("channel", "frame", "edge")],
    ("noise-edge", "conv2", noisy(0.01, "edge")),
    ("one frame", "conv1", output(lambda y: zeroed(slice(9, 10))(y))),
    ("dropout", ACT, output(lambda y: F.dropout(y, 0.1))),
    ("dropout", RES, output(lambda y: F.dropout(y, 0.1))),
    ("elu", ACT, first(F.elu)),
    ("softplus", "conv1.gelu", first(F.softplus)),
    ("leaky relu", "conv2.gelu", first(F.leaky_relu)),
    ("temperature", MIX, attention(0.9 / 8)),
    ("three heads", MIX, attention(128**-0.5, n_head=3)),
    (
        "softmax with a sink",
        MIX,
        attention(weights=lambda s: s.exp() / (1 + s.exp().sum(-1, True))),
    ),
    ("local window", MIX, attention(weights=lambda s: masked(s.flip(-1)).nan_to_num())),
    ("sharpened", MIX, output(lambda y: y * y.abs())),
    ("shuffled frames", "ln_post", output(shuffled)),
    ("half the frames", "ln_post", output(zeroed(slice(400, None)))),
    ("one frame", LN, output(zeroed(slice(9, 10)))),
    ("stretched", "conv2", output(lambda y: y[:, (torch.arange(FRAMES) * 15 // 16)])),
    ("random kernel", "conv2", kernel(random_like)),
    ("random table", "positional_embedding", added(random_like)),
    ("group norm", LN, first(lambda x: F.group_norm(x[0], 6)[None])),
    ("tanh", "ln_post", output(torch.tanh)),
    ("square root", DOWN, output(lambda y: y.abs().sqrt() * y.sign())),
    ("product", RES, inputs(lambda x, branch: x * branch)),
]


@pytest.mark.parametrize(("id", "name", "formula"), NOTHING, ids=ids(NOTHING))
def test_nothing_is_named(demo_short: Bench, id: str, name: str, formula):
    torch.manual_seed(0)
    cause = demo_short.explain_formula(name, formula)
    assert cause is None, cause


def test_every_id_of_the_table_is_proven():
    """An id that no test makes on purpose is a claim; the table has none."""
    made = {row[0] for rows in (MADE, GLANCES, MELS, LAST) for row in rows}
    made |= {fault.cause for fault, _ in TEN}
    of_input = [fault for fault in FAULTS.values() if fault.how == "input" and not fault.unseen]
    made |= {fault.cause for fault in of_input if fault.cause}
    made |= {row[0] for row in OF_SAMPLES}
    made |= {"block-skipped", "block-twice", "block-other-weights", "low-precision"}
    assert made == PHRASES.keys()


def test_what_cannot_be_explained_is_one_sentence(demo_short: Bench):
    with pytest.raises(ValueError, match="the candidate has no tap ln_post"):
        demo_short.explain("ln_post", {})
    two = demo_short.reference["ln_post"].repeat(2, 1, 1)
    with pytest.raises(ValueError, match=r"the candidate's ln_post has shape \(2, 800, 384\)"):
        demo_short.explain("ln_post", {"ln_post": two})
