"""Which mistake explains a wrong tap: a table of small numerical hypotheses, tried one by one; it
names a cause only where the numbers fit, and gives None for noise and for what it does not know.

A hypothesis predicts, in float64, what the tap would hold if one mistake had been made, from the
candidate's own input taps where it shows them, else from the reference's. It explains the tap if
no more than a twentieth of the error is left. To add one: a line in PHRASES, a line in `_table`,
and a formula in `validation/hypotheses.py` where it does not fit into the line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.model import ModelDimensions

from validation import hypotheses as h
from validation.evidence import Case, Taps, distance, frames_first
from validation.hypotheses import Option, each
from validation.stages import Stage, stages

FACTOR = 20.0  # the error must fall by this much; noise and neighbouring mistakes fall by 1 to 3
ROUGH = 2e-2  # and to this: a candidate in bfloat16 has errors of 1e-2 beside its mistake
HOPELESS = 0.1  # a score that no limit allows
# Float32 noise of one stage on its own inputs: 2e-8 to 8e-7 (tiny.en and demo, every stage). Below
# it there is nothing to explain, and scores are equal.
STAGE_NOISE = 1e-6
# The same on the reference's inputs, where the candidate shows none of its own: up to 1e-5. What
# fits numbers to each channel has to get down to it: large channels would let it follow others.
NOISE = 2e-5
TIE = 3.0  # scores within this factor are equal too; of equals the simpler hypothesis wins
SAME_AUDIO = 1e-4  # of the reference's mel to that of the samples, in float64; float32 leaves 2e-6
MOST_CONFIRMED = 8  # hypotheses that pass on some frames and are tried on all

# Ranks, simplest first: one prediction; one found among many; a fitted number or two; a number
# fitted to each channel; a matrix fitted, tried only where all others fail.
NAMED, SEARCHED, SCALAR, VECTOR, MATRIX = range(5)


@dataclass(frozen=True)
class Cause:
    """score: relative L2 between the candidate's tap and what the hypothesis predicts; baseline:
    between it and what the stage should have given (inf where the two cannot be compared).
    tensor: the tensor concerned, by the reference's name without "encoder."."""

    id: str
    sentence: str
    tensor: str | None
    score: float
    baseline: float


# What the report says of each id, after "explained to 1e-6 by". Filled from the stage ({name},
# {input}, {branch}, {weight}, {bias}) and from the option that fits.
PHRASES = {
    # mel
    "mel-unscaled": "log10 without (x + 4) / 4",
    "mel-natural-log": "the natural logarithm in place of log10 ((x + 4) / 4: {scaled})",
    "mel-decibel": "decibels below the maximum in place of (log10 + 4) / 4",
    "mel-bins-reversed": "the mel bins in reverse order",
    "mel-zero-padding": "0.0 in place of silence after the audio",
    "mel-floor": "another floor under the logarithm",
    # mel, where the samples are known
    "mel-window": "a {window} window in place of a periodic Hann window",
    "mel-edges": "{edge} in place of reflection at the ends of the samples",
    "mel-magnitude": "the magnitude in place of the power",
    "mel-bins-doubled": "mirrored FFT bins added to their twins",
    "mel-htk": "the HTK mel scale in place of Slaney's{also}",
    "mel-norm-missing": "mel filters without Slaney's norm",
    "mel-filter-count": "the first bins of {of}{also}",
    "mel-added": "{added:g} added under the logarithm in place of a clamp at 1e-10",
    "mel-last-frame": "the STFT's last frame kept before the maximum is taken",
    "mel-silence-padding": "silence in place of 0.0 after the audio",
    "mel-librosa-defaults": "librosa's defaults, 2048 samples every 512 (edges: {edge}), in dB",
    "mel-z-score": "each bin brought to mean 0 and standard deviation 1{also}",
    "mel-samples-scaled": "the samples times {times}",
    "mel-resampled": "linear resampling from {rate} Hz",
    "mel-one-channel": "one channel of two, in which one speaker is {loud:.3g} times as loud as in"
    " their mean and the other {soft:.3g} times",
    # conv
    "conv-middle-tap": "the middle tap of each kernel alone",
    "conv-outer-tap": "tap {tap} of each kernel alone, under input frame {at} of 0, 1, 2",
    "conv-taps-summed": "the three taps summed without the shift",
    "conv-taps-averaged": "the three taps averaged without the shift",
    "conv-reversed": "`{weight}` reversed in time",
    "conv-layout": "the memory of `{weight}` read as (out, taps, in)",
    "conv-shifted": "the kernel moved by {shift:+d} input frames (padding on one side)",
    "conv-stride-missing": "stride 1 in place of 2, cut to length",
    "conv-padding": "{pad} frames in place of zeros at the edges",
    "conv-edges": "other values in {wrong}, where the kernel reads padding, and in no other frame",
    # gelu
    "gelu-tanh": "the tanh form of GELU",
    "gelu-relu": "ReLU in place of GELU",
    "gelu-silu": "SiLU in place of GELU",
    "gelu-quick": "x sigmoid(1.702 x) in place of GELU",
    "gelu-missing": "GELU missing",
    "gelu-twice": "GELU applied twice",
    "gelu-float16-table": "GELU from a float16 table (approximate={of})",
    # positions
    "positions-missing": "`{weight}` not added",
    "positions-twice": "`{weight}` added twice",
    "positions-shifted": "`{weight}` moved by {n:+d} frames",
    "positions-interleaved": "sin and cos interleaved in `{weight}`",
    "positions-cos-first": "cos before sin in `{weight}`",
    "positions-input-scaled": "sqrt(n_state) times the input before `{weight}` is added",
    # layer_norm
    "norm-missing": "the layer norm missing",
    "norm-not-affine": "`{weight}` and `{bias}` missing",
    "norm-weight-missing": "`{weight}` missing",
    "norm-twice": "the layer norm applied twice",
    "norm-epsilon": "epsilon {epsilon:g} in place of 1e-05",
    "norm-unbiased": "the variance divided by n - 1 in place of n",
    "norm-rms": "RMS normalisation in place of layer norm (bias: {bias})",
    "norm-over-frames": "normalisation over frames in place of channels",
    "blocks-skipped": "`{tap}` read in place of `{input}`: {skipped} of {n_layer} blocks skipped",
    # linear, and others that have weights
    "bias-missing": "`{bias}` missing",
    "bias-twice": "`{bias}` added twice",
    "bias-other": "{what} in place of `{bias}`",
    "bias-added": "{what} added, where no bias belongs",
    "weight-transposed": "`{weight}` transposed{also}",
    "weight-rounded": "`{weight}` in {to}",
    "product-rounded": "`{input}` and `{weight}` in {to}",
    "other-weights": "`{tensor}` in place of `{weight}`{also}",
    "other-input": "`{tap}` read in place of `{input}`",
    "unknown-weights": "values of `{weight}` or `{bias}` that no tensor of the checkpoint has",
    # attention
    "attention-scale": "the scale 1/sqrt(n_state) in place of 1/sqrt(n_head_state)",
    "attention-scaled-twice": "the scale 1/sqrt(n_head_state) applied twice",
    "attention-unscaled": "the scale 1/sqrt(n_head_state) missing",
    "attention-half-scaled": "the scale n_head_state^-0.25 in place of 1/sqrt(n_head_state)",
    "one-head": "one head in place of {n_head}, scale 1/sqrt({scale})",
    "qkv-order": "query, key and value exchanged: {order}",
    "causal-mask": "a causal mask",
    "softmax-axis": "softmax over {axis} in place of keys",
    "heads-permuted": "the heads in the order {order}",
    "heads-not-merged": "heads put together by a reshape without the transpose",
    "heads-not-split": "heads taken apart by a reshape without the transpose, and back",
    "scores-rounded": "the scores in {to}",
    # residual, and whole blocks
    "residual-branch-missing": "`{branch}` not added",
    "residual-skip-missing": "`{branch}` alone, without the residual",
    "residual-branch-twice": "`{branch}` added twice",
    "residual-branch-scaled": "`{branch}` added {factor:.6g} times",
    "residual-other": "`{tap}` added in place of `{of}`",
    "block-skipped": "the block missing",
    "block-twice": "the block run twice",
    "block-other-weights": "the weights of blocks.{other} used in {block}",
    # any
    "not-finite": "{count} values of {size} NaN or infinite, the others right",
    "all-zero": "zeros everywhere",
    "frames-shifted": "a shift by {n:+d} frames",
    "frames-cut": "the first {kept} frames alone",
    "frames-renormalised": "each frame normalised once more ({how})",
    "transposed": "frames and channels exchanged",
    "output-rounded": "the output in {to}",
    "low-precision": "arithmetic in {to}: each value is one, and the error is of its size",
    "other-tap": "`{tap}` in its place",
    "scaled": "a factor of {factor:.6g}",
    "scaled-and-offset": "a factor of {a:.6g} and a constant of {b:.6g}",
    "channels-permuted": "the channels in another order",
    "channel-offset": "a constant per channel added",
    "channel-gain": "a factor per channel",
}


@dataclass(frozen=True)
class Rule:
    """`kind` of stage or "any"; `predict(case, **option)`; `options` to try, or a function of the
    whole case that lists them."""

    kind: str
    id: str
    predict: Callable[..., Tensor]
    options: list[Option] | Callable[[Case], list[Option]] = lambda c: [{}]
    rank: int = NAMED

    def tried(self, c: Case) -> list[Option]:
        return self.options(c) if callable(self.options) else self.options


RULES: list[Rule] = []


def _table(kinds: str, *rows: tuple[Any, ...]) -> None:
    RULES.extend(Rule(kind, *row) for kind in kinds.split() for row in rows)


_LOGS = [{"floor": f, "scaled": s} for f in (True, False) for s in ("kept", "missing")]
_OUTER = [{"tap": tap, "at": at} for tap in (0, 2) for at in range(3)]
_MOVES = each("n", *(n for n in range(-8, 9) if n))
_EPSILONS = each("epsilon", 1e-12, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
_INTEGERS = [f"int{bits} per {of}" for bits in (8, 6, 4) for of in ("tensor", "channel")]
_STORED = each("to", "float16", "bfloat16", "tf32", *_INTEGERS)
_FLOATS = each("to", "float16", "bfloat16", "tf32")
_ORDERS = each("order", *("kqv", "qvk", "vkq", "kvq", "vqk"))

_ADDED = each("added", 1e-10, 1e-8, 1e-6, 1e-5)
_LOGS_OF_SAMPLES = [
    {"added": added, "floor": floor, "scaled": scaled}
    for added, floor in ((0.0, True), (0.0, False), (1e-10, False), (1e-8, False), (1e-6, False))
    for scaled in ("kept", "missing")
]
_HTK = {"scale": "HTK", "norm": False, "also": " and no norm"}
_FACTORS = [
    {"factor": 32768 / 32767, "times": "32768/32767"},
    {"factor": 32767 / 32768, "times": "32767/32768"},
    {"factor": 32768.0, "times": "32768, as in int16"},
    {"factor": 1 / 32768, "times": "1/32768"},
    {"factor": 2.0, "times": "2"},
    {"factor": 0.5, "times": "1/2"},
]

_table(
    "mel",
    (
        "mel-window",
        h.with_recipe,
        h.if_samples(each("window", "symmetric Hann", "Hamming", "rectangular")),
    ),
    ("mel-edges", h.with_recipe, h.if_samples(each("edge", "zeros"))),
    ("mel-magnitude", lambda c: h.with_recipe(c, exponent=1), h.if_samples([{}])),
    ("mel-bins-doubled", lambda c: h.with_recipe(c, doubled=True), h.if_samples([{}])),
    (
        "mel-htk",
        h.with_recipe,
        h.if_samples(
            [{"scale": "HTK"}, _HTK, _HTK | {"whole_bins": True, "also": " at whole FFT bins"}]
        ),
    ),
    ("mel-norm-missing", lambda c: h.with_recipe(c, norm=False), h.if_samples([{}])),
    ("mel-filter-count", h.first_filters, h.with_other_filters),
    ("mel-added", h.added_under_log, h.if_samples(_ADDED)),
    ("mel-natural-log", h.natural_log_of_samples, h.if_samples(_LOGS_OF_SAMPLES)),
    ("mel-decibel", h.decibels_of_samples, h.if_samples([{}])),
    ("mel-librosa-defaults", h.librosa_defaults, h.if_samples(each("edge", "zeros", "reflection"))),
    (
        "mel-z-score",
        h.z_scores,
        h.if_samples(
            each("also", "", ", of a symmetric window and HTK filters at whole bins without norm")
        ),
    ),
    ("mel-last-frame", h.last_frame_kept, h.reaching_the_end),
    ("mel-silence-padding", h.silence_padding, h.if_samples([{}])),
    ("frames-cut", h.first_frames, h.frames_left_out),
    ("mel-floor", h.floor_of_candidate, h.if_samples([{}])),
    ("mel-samples-scaled", h.scaled_samples, h.if_samples(_FACTORS)),
    (
        "mel-resampled",
        h.resampled,
        h.if_samples(each("rate", 8000, 11025, 22050, 24000, 44100)),
    ),
    ("mel-one-channel", h.channel, h.one_channel, SCALAR),
    ("mel-unscaled", h.log10_power),
    ("mel-natural-log", h.natural_log, _LOGS),
    ("mel-decibel", lambda c: 40 * (c.expected - c.expected.max())),
    ("mel-bins-reversed", lambda c: c.expected.flip(1)),
    ("mel-zero-padding", h.zero_padding),
    ("mel-floor", h.other_floor),
)
_table(
    "conv",
    ("conv-middle-tap", lambda c: h.one_tap(c, 1, 1)),
    ("conv-outer-tap", h.one_tap, _OUTER),
    ("conv-taps-summed", lambda c: h.columns(c)[:, 1] @ c.weight.sum(2).T + c.bias),
    ("conv-taps-averaged", lambda c: h.columns(c)[:, 1] @ c.weight.mean(2).T + c.bias),
    ("conv-reversed", lambda c: h.conv(c, c.weight.flip(2))),
    ("conv-layout", lambda c: h.conv(c, c.weight.reshape(len(c.weight), 3, -1).transpose(1, 2))),
    (
        "conv-shifted",
        lambda c, shift: h.conv(c, c.weight, shift=shift),
        each("shift", 1, -1, 2, -2),
    ),
    ("conv-stride-missing", lambda c: h.conv(c, c.weight, stride=1)),
    ("conv-padding", lambda c, pad: h.conv(c, c.weight, pad=pad), each("pad", *h.PADDINGS)),
    ("weight-transposed", lambda c, also: h.conv(c, c.weight.transpose(0, 1)), h.only_square),
    ("conv-edges", h.own_edges, h.edges, VECTOR),
)
_table(
    "gelu",
    ("gelu-tanh", lambda c: F.gelu(c.x, approximate="tanh")),
    ("gelu-relu", lambda c: F.relu(c.x)),
    ("gelu-silu", lambda c: F.silu(c.x)),
    ("gelu-quick", lambda c: c.x * (1.702 * c.x).sigmoid()),
    ("gelu-missing", lambda c: c.x),
    ("gelu-twice", lambda c: F.gelu(F.gelu(c.x))),
    ("gelu-float16-table", h.gelu_table, each("of", "none", "tanh")),
)
_table(
    "positions",
    ("positions-missing", lambda c: c.x),
    ("positions-twice", lambda c: c.expected + c.cut(c.weight)),
    ("positions-shifted", lambda c, n: c.x + h.moved(c, c.weight, n), _MOVES),
    ("positions-interleaved", lambda c: c.x + c.cut(h.interleaved(c.weight))),
    ("positions-cos-first", lambda c: c.x + c.cut(h.swapped_halves(c.weight))),
    ("positions-input-scaled", lambda c: c.x * c.x.shape[1] ** 0.5 + c.cut(c.weight)),
)
_table(
    "layer_norm",
    ("norm-missing", lambda c: c.x),
    ("blocks-skipped", lambda c, tap, skipped: h.norm(c, c.of(tap)), h.earlier_blocks),
    ("norm-not-affine", lambda c: h.normed(c.x)),
    ("norm-weight-missing", lambda c: h.normed(c.x) + c.bias),
    ("norm-twice", lambda c: h.norm(c, h.norm(c, c.x))),
    ("norm-epsilon", lambda c, epsilon: h.norm(c, c.x, epsilon=epsilon), _EPSILONS),
    ("norm-unbiased", lambda c: h.norm(c, c.x, less=1)),
    ("norm-rms", h.rms, each("bias", "kept", "missing")),
    ("norm-over-frames", h.norm_over_frames),
    ("other-weights", h.with_other_norm, h.other_norms),
    ("other-input", lambda c, tap: h.norm(c, c.of(tap)), h.neighbours, SEARCHED),
    ("unknown-weights", lambda c, gamma, beta: h.normed(c.x) * gamma + beta, h.affine, MATRIX),
)
_table(
    "linear",
    ("weight-transposed", h.transposed, h.transposed_square),
    ("qkv-order", h.with_other, h.same_attention),
    ("other-weights", h.with_other, h.same_shape, SEARCHED),
    ("other-input", lambda c, tap: c.of(tap) @ c.weight.T + c.bias, h.neighbours, SEARCHED),
    ("bias-other", h.with_vector, h.if_biased(h.vectors)),
    ("bias-added", h.with_vector, h.if_not_biased(h.vectors)),
    ("bias-added", h.with_offset, h.if_not_biased(h.offset), VECTOR),
)
_table("linear conv layer_norm", ("bias-missing", lambda c: c.expected - c.bias))
_table(
    "linear conv",
    ("bias-twice", lambda c: c.expected + c.bias),
    ("weight-rounded", lambda c, to: h.product(c, to, "weight"), _STORED),
    ("product-rounded", lambda c, to: h.product(c, to, "both"), _FLOATS),
    ("unknown-weights", h.fitted, [{}], MATRIX),
)
_table(
    "attention",
    ("attention-scale", lambda c: h.scaled(c, state=-0.5, head=0.0)),
    ("attention-scaled-twice", lambda c: h.scaled(c, state=0.0, head=-1.0)),
    ("attention-unscaled", lambda c: h.scaled(c, state=0.0, head=0.0)),
    ("attention-half-scaled", lambda c: h.scaled(c, state=0.0, head=-0.25)),
    ("one-head", h.one_head, each("scale", "n_state", "n_head_state")),
    ("qkv-order", h.attended, _ORDERS),
    ("causal-mask", h.causal),
    ("softmax-axis", h.softmax_over, each("axis", "queries", "heads")),
    ("heads-not-merged", h.unmerged),
    ("heads-not-split", h.unsplit),
    ("scores-rounded", h.rounded_scores, each("to", "float16", "bfloat16")),
)
_table("linear attention", ("heads-permuted", h.reordered_heads, h.head_orders))
_table(
    "residual",
    ("block-skipped", lambda c: c.of(h.block_input(c)), h.if_opaque),
    ("block-twice", h.block_twice, h.if_opaque),
    ("block-other-weights", h.with_other_block, h.other_blocks),
    ("residual-branch-missing", lambda c: c.x),
    ("residual-skip-missing", lambda c: c.branch),
    ("residual-branch-twice", lambda c: c.x + 2 * c.branch),
    ("residual-other", h.with_other_tap, h.either_input, SEARCHED),
    ("residual-branch-scaled", lambda c, factor: c.x + factor * c.branch, h.branch_factor, SCALAR),
)
_table(
    "any",
    ("frames-shifted", lambda c, n: h.moved(c, c.whole.expected, n), h.shifts, SEARCHED),
    ("transposed", lambda c: c.cut(c.whole.expected.T.reshape(c.whole.y.shape))),
    ("frames-renormalised", h.renormalised, each("how", "mean 0, std 1", "length 1")),
    ("output-rounded", lambda c, to: h.rounded(c.expected, to), _FLOATS),
    ("other-tap", lambda c, tap: c.of(tap), h.same_shaped_taps, SEARCHED),
    ("scaled", lambda c, factor: factor * c.expected, h.factor, SCALAR),
    ("scaled-and-offset", lambda c, a, b: a * c.expected + b, h.line, SCALAR),
    ("channels-permuted", lambda c, found: c.expected[:, found], h.channel_orders, VECTOR),
    ("channel-offset", h.with_offset, h.offset, VECTOR),
    ("channel-gain", lambda c, found: c.expected * found, h.gains, VECTOR),
)


def _cause(stage: Stage, id: str, words: Option, score: float, baseline: float) -> Cause:
    own = {"name": stage.name, "input": "", "branch": "", "weight": "", "bias": "", "also": ""}
    own |= dict(zip(("input", "branch"), stage.inputs, strict=False))
    own |= dict(zip(("weight", "bias"), stage.weights, strict=False))
    phrase = PHRASES[id]
    tensor = words.get("tensor")
    if tensor is None:  # the one that the phrase is about
        about = next((key for key in ("weight", "bias") if f"{{{key}}}" in phrase), None)
        tensor = (own[about] or None) if about and about not in words else None
    fit = "exactly" if score == 0 else f"to {score:.0e}".replace("e-0", "e-")
    said = phrase.format(**(own | words))
    return Cause(id, f"{stage.name}: explained {fit} by {said}", tensor, score, baseline)


def _at_a_glance(stage: Stage, candidate: Taps, reference: Taps) -> Cause | None:
    """What needs no formula: another shape, NaN, zeros."""
    y, expected = candidate[stage.name].detach().double(), reference[stage.name].detach().double()
    if y.shape != expected.shape:
        if y.mT.shape == expected.shape and (score := distance(y.mT, expected)) <= ROUGH:
            return _cause(stage, "transposed", {}, score, math.inf)
        a, b = frames_first(stage.name, y), frames_first(stage.name, expected)
        cut = len(a) < len(b) and a.shape[1] == b.shape[1]
        if cut and (score := distance(a, b[: len(a)])) <= ROUGH:
            return _cause(stage, "frames-cut", {"kept": len(a)}, score, math.inf)
        return None
    bad = ~torch.isfinite(y)
    if bad.any():
        score = distance(y, expected.masked_fill(bad, math.nan))
        count = {"count": int(bad.sum()), "size": y.numel()}
        return _cause(stage, "not-finite", count, score, math.inf) if score <= ROUGH else None
    if not y.any():
        return _cause(stage, "all-zero", {}, 0.0, 1.0)
    return None


def _some_frames(c: Case) -> Tensor:
    """Frames to try hypotheses on: spread over all, the edges, and the worst."""
    n = len(c.y)
    worst = torch.linalg.vector_norm(c.y - c.expected, dim=1).topk(min(8, n)).indices
    edges = torch.tensor([i for i in (0, 1, 2, n - 3, n - 2, n - 1) if 0 <= i < n])
    return torch.cat([c.spread(48), edges, worst]).unique()


def _measure(rule: Rule, option: Option, c: Case) -> tuple[float, float]:
    """Score and baseline, both over the elements that the hypothesis says something about; where
    the score is hopeless the baseline is not measured."""
    prediction = rule.predict(c, **option)
    score = distance(c.y, prediction)
    if score > HOPELESS:
        return score, math.nan
    expected = torch.where(torch.isnan(prediction), math.nan, c.expected)
    return score, distance(c.y, expected)


def _explains(rule: Rule, score: float, baseline: float, slack: float = 1.0) -> bool:
    limit = ROUGH if rule.rank < VECTOR else NOISE
    return score <= limit * slack and score * FACTOR <= baseline * slack


def _confirmed(c: Case, rules: list[Rule]) -> Iterator[tuple[Rule, Cause]]:
    """The rules that explain the case: tried on some frames, confirmed on all."""
    # mel's hypotheses look at its floor and its end, so they need all frames
    few = c if c.stage.kind == "mel" else c.on(_some_frames(c))
    likely = []
    for rule in rules:
        for option in rule.tried(c):
            score, baseline = _measure(rule, option, few)
            if _explains(rule, score, baseline, slack=2.0):
                likely.append((score, rule, option))
    likely.sort(key=lambda found: found[0])
    for _, rule, option in likely[:MOST_CONFIRMED]:
        score, baseline = _measure(rule, option, c)
        if _explains(rule, score, baseline):
            words = {"n_head": c.n_head, "n_layer": c.dims.n_audio_layer} | option
            yield rule, _cause(c.stage, rule.id, words, score, baseline)


def _low_precision(c: Case) -> Cause | None:
    """The one verdict without a prediction, and the last: a sum in 16 bits depends on its order.
    Numbers that all have so few bits are no accident; the error must be a few roundings large."""
    baseline = distance(c.y, c.expected)
    for to in ("bfloat16", "float16"):  # most numbers of the first are of the second too
        dtype = getattr(torch, to)
        if torch.equal(c.y, h.rounded(c.y, to)) and baseline <= 8 * torch.finfo(dtype).eps:
            score = distance(c.y, h.rounded(c.expected, to))
            return _cause(c.stage, "low-precision", {"to": to}, score, baseline)
    return None


def _of_whole_block(c: Case, cause: Cause) -> Cause:
    """Another block's tensor at one stage: the whole block's, if all its other stages say so."""
    block, other = c.block.removesuffix("."), ".".join((cause.tensor or "").split(".")[:2])
    if cause.id != "other-weights" or block in ("", other) or not other.startswith("blocks."):
        return cause
    fits = []
    for stage in stages(c.dims):
        shown = all(name in c.candidate for name in (stage.name, *stage.inputs))
        in_block = stage.name.startswith(c.block) and stage.name != c.stage.name
        if in_block and shown and stage.weights:
            weights = tuple(name.replace(block, other) for name in stage.weights)
            moved = replace(stage, weights=weights)
            there = Case(moved, c.candidate, c.reference, c.tensors, c.dims)
            fits.append(distance(there.y, there.expected) <= max(NOISE, TIE * cause.score))
    if len(fits) < 2 or not all(fits):
        return cause
    words = {"other": other.removeprefix("blocks."), "block": block, "tensor": cause.tensor}
    return _cause(c.stage, "block-other-weights", words, cause.score, cause.baseline)


def _require_samples(c: Case) -> None:
    off = distance(c.expected, h.right_mel(c)) if h.samples(c).ndim == 1 else math.inf
    if not off <= SAME_AUDIO:
        raise ValueError(
            f"the samples, {tuple(h.samples(c).shape)}, do not give the reference's mel: "
            f"relative L2 {off:.0e}"
        )


def explain_all(
    stage: Stage,
    candidate: Taps,
    reference: Taps,
    tensors: Taps,
    dims: ModelDimensions,
    audio: Tensor | np.ndarray | None = None,
) -> list[Cause]:
    """Every cause that explains the candidate's tap of `stage`, the best first; none for noise.

    stage      the first that diverges, so that all before it is right
    candidate  its taps by name, as many as it shows, each of one window (B = 1)
    reference  the reference's taps of the same window
    tensors    the REFERENCE's encoder tensors, without "encoder."
    audio      the samples (at 16 kHz) of which `encoder.audio.windows` made the reference's mel, in
               its first window: with them a wrong mel is explained by what was done to them
    The best is the simplest of those whose score equals the smallest. Raises ValueError
    where the candidate or the reference has no such tap, or more than one window, and where the
    samples do not give the reference's mel.
    """
    for side, taps in (("candidate", candidate), ("reference", reference)):
        if stage.name not in taps:
            raise ValueError(f"the {side} has no tap {stage.name}")
        shape = tuple(taps[stage.name].shape)
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(f"the {side}'s {stage.name} has shape {shape}, expected (1, ..., ...)")
    with torch.no_grad():
        if glance := _at_a_glance(stage, candidate, reference):
            return [glance]
        if candidate[stage.name].shape != reference[stage.name].shape:
            return []
        c = Case(stage, candidate, reference, tensors, dims, audio)
        if not torch.isfinite(c.y).all() or distance(c.y, c.expected) <= STAGE_NOISE:
            return []
        if stage.kind == "mel" and audio is not None:
            _require_samples(c)
        kinds = ("any", stage.kind) if c.has_inputs else ("any",)
        rules = [rule for rule in RULES if rule.kind in kinds]
        found = list(_confirmed(c, [rule for rule in rules if rule.rank < MATRIX]))
        if not found:
            found = list(_confirmed(c, [rule for rule in rules if rule.rank == MATRIX]))
        if not found:
            last = _low_precision(c)
            return [last] if last else []
        equal = max(TIE * min(cause.score for _, cause in found), STAGE_NOISE)
        tied = [(rule, cause) for rule, cause in found if cause.score <= equal]
        tied.sort(key=lambda pair: (pair[0].rank, RULES.index(pair[0]), pair[1].score))
        causes = [cause for _, cause in tied]
        others = [cause for _, cause in found if cause not in causes]
        causes += sorted(others, key=lambda cause: cause.score)
        return [_of_whole_block(c, causes[0]), *causes[1:]]


def explain(
    stage: Stage,
    candidate: Taps,
    reference: Taps,
    tensors: Taps,
    dims: ModelDimensions,
    audio: Tensor | np.ndarray | None = None,
) -> Cause | None:
    """The cause that explains the candidate's tap of `stage`, or None; see `explain_all`."""
    causes = explain_all(stage, candidate, reference, tensors, dims, audio)
    return causes[0] if causes else None
