"""What a tap would hold if one mistake had been made: the formulas, stage by stage, in float64.

Nothing is judged here: `validation/fingerprints.py` has the table of mistakes, and the verdict.
Each formula gives the frames of its case, (frames, channels), NaN where it says nothing. A function
that returns options is called with all frames: it lists what a formula is to be tried over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from whisper.audio import HOP_LENGTH

from validation import frontend
from validation.evidence import Case, distance
from validation.frontend import WHISPER, Recipe
from validation.stages import LAYER_NORM_EPSILON, attend, compute, heads, stages

PADDINGS = ("repeated", "reflected")
# Elements of a mel that float32 cannot tell apart: within so many times its noise of both sides.
# Twice the factor by which an error must fall, so that noise alone does not keep it from falling.
COVERED = 40.0
FAR = 0.1  # too far for float32's noise to matter
CLOSE = 2e-2  # how near a tensor has to be to be worth a prediction with all frames
FEWEST_BINS = 8  # of a frame that are to tell how loud it is

Option = dict[str, Any]


def each(name: str, *values: object) -> list[Option]:
    return [{name: value} for value in values]


# ---- mel: the reference is (log10(power) + 4) / 4, with a floor 2 below its maximum


def log10_power(c: Case) -> Tensor:
    return 4 * c.expected - 4


def above_floor(c: Case) -> Tensor:
    return c.expected > c.expected.min() + 1e-6


def natural_log(c: Case, floor: bool, scaled: str) -> Tensor:
    ln = math.log(10) * log10_power(c)
    ln = ln.clamp(min=float(ln.max()) - 8) if floor else torch.where(above_floor(c), ln, math.nan)
    return (ln + 4) / 4 if scaled == "kept" else ln


def zero_padding(c: Case) -> Tensor:
    """Real frames, then 0.0; in the three frames before, the STFT saw other samples."""
    sounding = (c.y != 0).any(1).nonzero()
    end = int(sounding.max()) + 1 if len(sounding) else 0
    unknown = torch.full_like(c.y[max(0, end - 3) : end], math.nan)
    return torch.cat([c.expected[: max(0, end - 3)], unknown, torch.zeros_like(c.y[end:])])


def other_floor(c: Case) -> Tensor:
    """A higher one cuts more off; a lower one shows what the reference cut off."""
    lowest = float(c.expected.min())
    if c.y.min() >= lowest:
        return c.expected.clamp(min=float(c.y.min()))
    return torch.where(above_floor(c), c.expected, c.y.clamp(max=lowest))


# ---- mel, where the samples are known: the whole wrong mel, computed from them


def if_samples(options: list[Option]) -> Callable[[Case], list[Option]]:
    return lambda c: options if c.audio is not None else []


def samples(c: Case) -> Tensor:
    assert c.audio is not None  # `if_samples`
    return c.audio


def content(c: Case) -> int:
    """The frames that the audio fills; all after them are 0.0."""
    return min(len(samples(c)) // HOP_LENGTH, len(c.whole.y))


def filled(c: Case, log: Tensor, after: float = 0.0, frames: int | None = None) -> Tensor:
    """The first frames of `log`, by default those of the audio, and `after` in all others."""
    n = min(content(c) if frames is None else frames, len(log), len(c.whole.y))
    return torch.cat([log[:n], torch.full_like(c.whole.y[n:], after)])


def spectrogram(c: Case, recipe: Recipe = WHISPER) -> Tensor:
    """(frames, bins) of the audio and some silence, with the frames that see only its end."""
    alike = replace(recipe, scale=WHISPER.scale, norm=WHISPER.norm, whole_bins=False)
    audio = frontend.silence_after(samples(c), recipe.n_fft)
    return c.once(f"spectrogram {alike}", lambda: frontend.spectrogram(audio, recipe))


def mel_power(c: Case, recipe: Recipe = WHISPER) -> Tensor:
    """(frames, n_mels) of the same frames."""
    return c.once(
        f"mel power {recipe}",
        lambda: spectrogram(c, recipe) @ frontend.filters(recipe, c.whole.y.shape[1]).T,
    )


def right_mel(c: Case) -> Tensor:
    """What the reference computes, in float64."""
    return c.once("right mel", lambda: filled(c, frontend.scaled(frontend.log10(mel_power(c)))))


def mel_noise(c: Case) -> Tensor:
    def make() -> Tensor:
        bank = frontend.filters(WHISPER, c.whole.y.shape[1])
        return filled(c, frontend.float32_noise(spectrogram(c), mel_power(c), bank))

    return c.once("mel noise", make)


def told(c: Case, predicted: Tensor) -> Tensor:
    """The prediction, as far as float32 can be held against it: the reference's own value where the
    mistake changes nothing; nothing said where the candidate is as near to the one as to the other
    in terms of float32's noise."""
    if distance(c.y, predicted) > FAR:
        return predicted
    same = (predicted - right_mel(c)).abs() <= 1e-8
    predicted = torch.where(same, c.expected, predicted)
    bound = COVERED * mel_noise(c)
    covered = ((c.y - predicted).abs() <= bound) & ((c.y - c.expected).abs() <= bound)
    return torch.where(covered & ~same, math.nan, predicted)


def with_recipe(c: Case, also: str = "", **changed: Any) -> Tensor:
    log = frontend.log10(mel_power(c, Recipe(**changed)))
    return told(c, filled(c, frontend.scaled(log)))


def with_other_filters(c: Case) -> list[Option]:
    """Those of the other models: 128 bins, as in large-v3, or 80."""
    other: dict[int, Option] = {80: {"of": 128}, 128: {"of": 80, "also": ", and 0.0 above"}}
    found = other.get(c.whole.y.shape[1])
    return [found] if c.audio is not None and found else []


def first_filters(c: Case, of: int, also: str = "") -> Tensor:
    """The loudest of all filters sets the floor, also where it is not among the first."""
    mel = spectrogram(c) @ frontend.filters(WHISPER, of).T
    n_mels = c.whole.y.shape[1]
    log = frontend.scaled(frontend.log10(mel))[:, :n_mels]
    return told(c, filled(c, F.pad(log, (0, n_mels - log.shape[1]))))


def added_under_log(c: Case, added: float) -> Tensor:
    return told(c, filled(c, frontend.scaled(frontend.log10(mel_power(c), added))))


def natural_log_of_samples(c: Case, added: float, floor: bool, scaled: str) -> Tensor:
    ln = math.log(10) * frontend.log10(mel_power(c), added)
    ln = ln.clamp(min=float(ln.max()) - 8) if floor else ln
    return told(c, filled(c, (ln + 4) / 4 if scaled == "kept" else ln))


def decibels_of_samples(c: Case) -> Tensor:
    return told(c, filled(c, frontend.decibels(mel_power(c))))


def librosa_defaults(c: Case, edge: str) -> Tensor:
    """Neither silence after the audio nor a dropped frame; 0.0 to the length."""
    recipe = Recipe(n_fft=2048, hop=512, edge=edge)
    if len(samples(c)) <= recipe.n_fft:  # too short to be reflected
        return torch.full_like(c.whole.y, math.nan)
    mel = frontend.spectrogram(samples(c), recipe) @ frontend.filters(recipe, c.y.shape[1]).T
    return told(c, filled(c, frontend.decibels(mel), frames=len(mel)))


def z_scores(c: Case, also: str) -> Tensor:
    """Of each bin over the frames of the audio. `also`: of a log-mel that is another one besides,
    without silence after the audio and with its last frame."""
    if not also:
        log = right_mel(c)[: content(c)]
    else:
        recipe = Recipe(window="symmetric Hann", scale="HTK", norm=False, whole_bins=True)
        if len(samples(c)) <= recipe.n_fft:
            return torch.full_like(c.whole.y, math.nan)
        bins = frontend.spectrogram(samples(c), recipe)
        log = frontend.log10(bins @ frontend.filters(recipe, c.y.shape[1]).T)
    scores = (log - log.mean(0)) / (log.std(0, correction=0) + 1e-8)
    return told(c, filled(c, scores, frames=len(log)))


def silence_padding(c: Case) -> Tensor:
    log = frontend.scaled(frontend.log10(mel_power(c)))
    return told(c, filled(c, log, after=float(log[-1].min()), frames=len(log)))  # last: silence


def reaching_the_end(c: Case) -> list[Option]:
    """A window that is full: only there does its last frame hold sound."""
    full = c.audio is not None and len(c.audio) > len(c.whole.y) * HOP_LENGTH - 2 * WHISPER.n_fft
    return [{}] if full else []


def last_frame_kept(c: Case) -> Tensor:
    """The window's end is reflected, and the frame around it counts for the maximum."""
    n = len(c.whole.y) * HOP_LENGTH
    window = F.pad(samples(c)[:n], (0, max(0, n - len(samples(c)))))
    mel = frontend.spectrogram(window) @ frontend.filters(WHISPER, c.whole.y.shape[1]).T
    return told(c, filled(c, frontend.scaled(frontend.log10(mel))))


def floor_of_candidate(c: Case) -> Tensor:
    """Its lowest value in the frames of the audio, under the logarithm without a floor."""
    if not content(c):
        return torch.full_like(c.whole.y, math.nan)
    log = (frontend.log10(mel_power(c)) + 4) / 4
    return told(c, filled(c, log.clamp(min=float(c.y[: content(c)].min()))))


def frames_left_out(c: Case) -> list[Option]:
    """Frames of the audio that are 0.0, down to the last."""
    sounding = (c.y != 0).any(1).nonzero()
    kept = int(sounding.max()) + 1 if len(sounding) else 0
    return [{"kept": kept}] if c.audio is not None and 0 < kept < content(c) else []


def first_frames(c: Case, kept: int) -> Tensor:
    return filled(c, c.expected, frames=kept)


def scaled_samples(c: Case, factor: float, times: str) -> Tensor:
    """`times` says the factor in words."""
    return told(c, filled(c, frontend.scaled(frontend.log10(mel_power(c) * factor**2))))


def resampled(c: Case, rate: int) -> Tensor:
    def make() -> Tensor:
        audio = frontend.linearly_resampled(samples(c), rate)
        bins = frontend.spectrogram(frontend.silence_after(audio))
        mel = bins @ frontend.filters(WHISPER, c.whole.y.shape[1]).T
        return filled(c, frontend.scaled(frontend.log10(mel)))

    return told(c, c.once(f"resampled {rate}", make))


def one_channel(c: Case) -> list[Option]:
    """How much louder than their mean one channel of two holds one speaker, `loud`, and how much
    softer another, `soft`: the median of the frames of either. In the mean both channels have a
    speaker as loud as himself, so that the two add up to 2."""
    if c.audio is None or not content(c):
        return []
    y = c.y[: content(c)]
    log = (frontend.log10(mel_power(c))[: len(y)] + 4) / 4
    clear = (y > y.min() + 1e-3) & (log > log.min() + 1e-3)  # of either floor
    gains = torch.where(clear, 10 ** (2 * (y - log)), math.nan).nanmedian(1).values
    gains = gains[clear.sum(1) >= FEWEST_BINS]
    loud, soft = gains[gains > 1], gains[gains < 1]
    if not len(loud):
        return []
    near = float(loud.median())
    far = float(soft.median()) if len(soft) else 0.0
    return [{"loud": near, "soft": far}] if near > 1.01 and abs(near + far - 2) < 0.01 else []


def channel(c: Case, loud: float, soft: float) -> Tensor:
    """Each frame is the one speaker or the other, whichever is nearer; where they change, a frame
    holds a part of both, and nothing is said of it."""
    y = c.y[: content(c)]
    floor = float(y.max()) - frontend.RANGE / 4
    power = mel_power(c)[: len(y)]
    logs = [(frontend.log10(power * g**2) + 4) / 4 for g in (loud, soft)]
    first, second = (log.clamp(min=floor) for log in logs)
    one = (y - first).abs().sum(1) <= (y - second).abs().sum(1)
    apart = (first - second).abs().amax(1) > 1e-3  # else both are at the floor
    last = torch.where(apart, torch.arange(len(y)), -1).cummax(0).values.clamp(min=0)
    one = one[last]  # where nothing tells them apart, as before
    changes = F.pad((one[1:] != one[:-1]).double(), (1, 0))
    near = F.max_pool1d(changes[None], 7, stride=1, padding=3)[0].bool()
    log = torch.where(one[:, None], first, second)
    return filled(c, torch.where(near[:, None], math.nan, log))


# ---- conv: kernel 3, padding 1


def columns(c: Case, stride: int = 0, shift: int = 0, pad: str = "zero") -> Tensor:
    """(frames, 3, in): the input frames under each output frame."""
    x = c.full(c.stage.inputs[0])
    last = len(x) - 1
    at = c.index[:, None] * (stride or c.stage.stride) + torch.arange(-1, 2) + shift
    if pad == "reflected":
        return x[last - (last - at.abs()).abs()]
    inside = (at >= 0) & (at <= last) | (pad == "repeated")
    return x[at.clamp(0, last)] * inside[..., None]


def conv(c: Case, kernel: Tensor, **how: Any) -> Tensor:
    """kernel (out, in, 3)."""
    return columns(c, **how).flatten(1) @ kernel.permute(2, 1, 0).flatten(0, 1) + c.bias


def one_tap(c: Case, tap: int, at: int) -> Tensor:
    """One tap of each kernel alone, under input frame `at` of the three."""
    return columns(c)[:, at] @ c.weight[:, :, tap].T + c.bias


def reads_padding(c: Case) -> Tensor:
    """(frames,): whether the kernel reaches beyond the first input frame or the last."""
    at = c.index * c.stage.stride
    return (at == 0) | (at == len(c.full(c.stage.inputs[0])) - 1)


def edges(c: Case) -> list[Option]:
    frames = c.index[reads_padding(c)].tolist()
    return [{"wrong": "frame " + " and frame ".join(map(str, frames))}]


def own_edges(c: Case, wrong: str) -> Tensor:
    """What the candidate has there, whatever it is; all other frames are right."""
    return torch.where(reads_padding(c)[:, None], c.y, c.expected)


def only_square(c: Case) -> list[Option]:
    return [{"also": ""}] if c.weight.shape[0] == c.weight.shape[1] else []


# ---- gelu


def gelu_table(c: Case, of: str) -> Tensor:
    return F.gelu(c.x.half().double(), approximate=of).half().double()


# ---- positions: a table (n_audio_ctx, n_state), its first half of channels sin, the other cos


def moved(c: Case, x: Tensor, n: int) -> Tensor:
    """Frame t of the result is frame t - n of `x`, which has all frames; NaN beyond its ends."""
    at = c.index - n
    inside = (at >= 0) & (at < len(x))
    return torch.where(inside[:, None], x[at.clamp(0, len(x) - 1)], math.nan)


def interleaved(positions: Tensor) -> Tensor:
    return torch.stack(positions.chunk(2, dim=1), dim=2).flatten(1)


def swapped_halves(positions: Tensor) -> Tensor:
    return positions.roll(positions.shape[1] // 2, 1)


# ---- layer_norm


def normed(x: Tensor, axis: int = 1, epsilon: float = LAYER_NORM_EPSILON, less: int = 0) -> Tensor:
    variance = x.var(axis, keepdim=True, correction=less)
    return (x - x.mean(axis, keepdim=True)) / (variance + epsilon).sqrt()


def norm(c: Case, x: Tensor, **how: Any) -> Tensor:
    return normed(x, **how) * c.weight + c.bias


def rms(c: Case, bias: str) -> Tensor:
    size = (c.x.square().mean(1, keepdim=True) + LAYER_NORM_EPSILON).sqrt()
    return c.x / size * c.weight + (c.bias if bias == "kept" else 0.0)


def norm_over_frames(c: Case) -> Tensor:
    return c.cut(normed(c.full(c.stage.inputs[0]), axis=0)) * c.weight + c.bias


def other_norms(c: Case) -> list[Option]:
    names = [s.name for s in stages(c.dims) if s.kind == "layer_norm" and s.name != c.stage.name]
    return [{"tensor": f"{n}.weight", "with_bias": f"{n}.bias"} for n in names]


def with_other_norm(c: Case, tensor: str, with_bias: str) -> Tensor:
    return normed(c.x) * c.w(tensor) + c.w(with_bias)


def neighbours(c: Case) -> list[Option]:
    """The other taps of the block and just before it that are as wide as the first input."""
    every = [s.name for s in stages(c.dims)]
    own = every.index(c.stage.name)
    near = [
        t for i, t in enumerate(every) if f"{t}.".startswith(c.block or "-") or 0 < own - i < 13
    ]
    known = [t for t in near if t in c.reference and t not in (c.stage.name, *c.stage.inputs)]
    shape = c.side(c.stage.inputs[0]).shape
    return [{"tap": tap} for tap in known if c.side(tap).shape == shape]


def earlier_blocks(c: Case) -> list[Option]:
    """For a norm that reads a block's output: the outputs before that one."""
    head, _, layer = c.stage.inputs[0].partition(".")
    if head != "blocks" or not layer.isdigit():
        return []
    outputs = ["positional_embedding", *(f"blocks.{i}" for i in range(int(layer)))]
    return [{"tap": tap, "skipped": len(outputs) - i} for i, tap in enumerate(outputs)]


# ---- linear: weight (out, in)


def linear(c: Case, weight: Tensor, bias: Tensor | float) -> Tensor:
    return c.x @ weight.T + bias


def transposed_square(c: Case) -> list[Option]:
    return [{"also": also} for o in only_square(c) for also in ("", " and its bias missing")]


def transposed(c: Case, also: str) -> Tensor:
    return linear(c, c.weight.T, 0.0 if also else c.bias)


def same_shape(c: Case) -> list[Option]:
    """The other tensors of the weight's shape that fit on a few frames, whatever the bias (both
    sides less their mean); each with the biases that it may come with."""
    few = c.on(c.spread(32))
    x, y = few.x - few.x.mean(0), few.y - few.y.mean(0)
    found = []
    for name, tensor in c.tensors.items():
        if tensor.shape != c.weight.shape or name == c.stage.weights[0]:
            continue
        if distance(y, x @ tensor.double().T) <= CLOSE:
            its = name.removesuffix("weight") + "bias"
            for bias in dict.fromkeys([its if its in c.tensors else None, c.bias_name, None]):
                words = "" if bias == c.bias_name else f" and `{bias}`" if bias else " without bias"
                found.append({"tensor": name, "with_bias": bias, "also": words})
    return found


def with_other(c: Case, tensor: str, with_bias: str | None, **_: str) -> Tensor:
    return linear(c, c.w(tensor), c.w(with_bias) if with_bias else 0.0)


def same_attention(c: Case) -> list[Option]:
    """Those of `same_shape` that are query, key or value of one attention with the stage."""
    three = [f"{c.block}attn.{name}.weight" for name in ("query", "key", "value")]
    found = same_shape(c) if c.stage.weights[0] in three else []
    return [
        o | {"order": f"`{o['tensor']}`{o['also']} used here"}
        for o in found
        if o["tensor"] in three
    ]


def vectors(c: Case) -> list[Option]:
    """The vectors of the checkpoint that could stand where the bias does, or should not."""
    found = (c.y - c.expected).mean(0) + c.bias
    same = [n for n, t in c.tensors.items() if t.shape == found.shape and n != c.bias_name]
    near = [n for n in same if distance(found, c.w(n)) <= CLOSE]
    return [{"tensor": name, "what": f"`{name}`"} for name in near]


def with_vector(c: Case, tensor: str, what: str) -> Tensor:
    return c.expected - c.bias + c.w(tensor)


def offset(c: Case) -> list[Option]:
    return [{"found": (c.y - c.expected).mean(0), "what": "a constant per channel"}]


def with_offset(c: Case, found: Tensor, what: str) -> Tensor:
    return c.expected + found


def if_biased(options: Callable[[Case], list[Option]]) -> Callable[[Case], list[Option]]:
    return lambda c: options(c) if c.bias_name else []


def if_not_biased(options: Callable[[Case], list[Option]]) -> Callable[[Case], list[Option]]:
    return lambda c: [] if c.bias_name else options(c)


# ---- linear and conv: operands of fewer bits


def rounded(x: Tensor, to: str) -> Tensor:
    """`x` as it would be stored."""
    if to == "tf32":  # float32 with 10 bits of mantissa
        return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()
    if to.startswith("int"):  # "int8 per channel": symmetric, a step for each or one for all
        kind, _, scope = to.partition(" per ")
        largest = 2 ** (int(kind.removeprefix("int")) - 1) - 1
        axes = tuple(range(1 if scope == "channel" else 0, x.ndim))
        step = x.abs().amax(axes, keepdim=True).clamp(min=1e-30) / largest
        return (x / step).round() * step
    return x.to(getattr(torch, to)).double()


def product(c: Case, to: str, of: str) -> Tensor:
    x = c.x if c.stage.kind == "linear" else columns(c).flatten(1)
    weight = rounded(c.weight, to)
    matrix = weight.T if c.stage.kind == "linear" else weight.permute(2, 1, 0).flatten(0, 1)
    return (rounded(x, to) if of == "both" else x) @ matrix + c.bias


# ---- attention: softmax(q k^T / sqrt(n_head_state)) v


def scores(c: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n_head, frames of the case, all frames), scaled."""
    q, k = (heads(x.to(dtype)[None], c.n_head)[0] for x in (c.x, c.full(c.stage.inputs[1])))
    return q @ k.transpose(1, 2) * q.shape[2] ** -0.5


def mixed(c: Case, weights: Tensor) -> Tensor:
    """weights (n_head, frames, all frames) -> (frames, n_state)."""
    v = heads(c.full(c.stage.inputs[2])[None], c.n_head)[0]
    return (weights @ v).transpose(0, 1).flatten(1)


def attended(c: Case, order: str = "qkv", n_head: int = 0, scale: float | None = None) -> Tensor:
    """Attention with its inputs in another order, another number of heads, another scale."""
    taps = dict(zip("qkv", c.stage.inputs, strict=True))
    q, k, v = c.of(taps[order[0]]), c.full(taps[order[1]]), c.full(taps[order[2]])
    return attend(q[None], k[None], v[None], n_head or c.n_head, scale)[0]


def scaled(c: Case, state: float, head: float) -> Tensor:
    """Attention with the scale n_state^state * n_head_state^head."""
    n_state = c.y.shape[1]
    return attended(c, scale=n_state**state * (n_state // c.n_head) ** head)


def one_head(c: Case, scale: str) -> Tensor:
    width = c.y.shape[1] // (1 if scale == "n_state" else c.n_head)
    return attended(c, n_head=1, scale=width**-0.5)


def rounded_scores(c: Case, to: str) -> Tensor:
    """From float32, as a candidate has them: what float64 rounds otherwise would hide the cause."""
    return mixed(c, rounded(scores(c, torch.float32), to).softmax(2))


def causal(c: Case) -> Tensor:
    future = torch.arange(len(c.whole.y)) > c.index[:, None]
    return mixed(c, scores(c).masked_fill(future, -math.inf).softmax(2))


def softmax_over(c: Case, axis: str) -> Tensor:
    own = scores(c)
    if axis == "heads":
        return mixed(c, own.softmax(0))
    # over all queries, (n_head, 1, all frames); in float32, as all scores are needed
    total = c.once(axis, lambda: scores(c.whole, torch.float32).logsumexp(1, keepdim=True))
    return mixed(c, (own - total).exp())


def unsplit(c: Case) -> Tensor:
    """(T, C) read as (n_head, T, C / n_head) where it lies, and back; float32, as all is needed."""
    state = c.y.shape[1]
    q, k, v = (
        c.full(n).float().reshape(1, c.n_head, -1, state // c.n_head) for n in c.stage.inputs
    )
    return c.cut(
        c.once("unsplit", lambda: F.scaled_dot_product_attention(q, k, v).reshape(-1, state))
    ).double()


def unmerged(c: Case) -> Tensor:
    """(n_head, T, C / n_head) read as (T, C) where it lies."""
    return c.cut(heads(c.whole.expected[None], c.n_head).reshape(-1, c.y.shape[1]))


def head_orders(c: Case) -> list[Option]:
    """The order of heads that fits best, where it is an order, and not the right one."""
    if c.stage.kind == "linear" and c.stage.name.split(".")[-1] not in ("query", "key", "value"):
        return []
    few = c.on(c.spread(64))
    y, expected = (heads(t[None], c.n_head)[0].flatten(1) for t in (few.y, few.expected))
    order = torch.cdist(y, expected).argmin(1).tolist()
    right = list(range(c.n_head))
    return [{"order": order}] if order != right and sorted(order) == right else []


def reordered_heads(c: Case, order: list[int]) -> Tensor:
    return c.expected.unflatten(1, (c.n_head, -1))[:, order].flatten(1)


# ---- residual: x + branch


def either_input(c: Case) -> list[Option]:
    return [o | {"at": at, "of": c.stage.inputs[at]} for o in neighbours(c) for at in (0, 1)]


def with_other_tap(c: Case, tap: str, at: int, of: str) -> Tensor:
    return c.of(tap) + (c.branch if at == 0 else c.x)


def branch_factor(c: Case) -> list[Option]:
    return [{"factor": float(((c.y - c.x) * c.branch).sum() / c.branch.square().sum())}]


def block_input(c: Case) -> str:
    layer = int(c.block.split(".")[1])
    return f"blocks.{layer - 1}" if layer else "positional_embedding"


def is_opaque(c: Case) -> bool:
    """A block of which the candidate shows the output alone."""
    return c.stage.name + "." == c.block and not any(tap.startswith(c.block) for tap in c.candidate)


def run_block(c: Case, x: Tensor, layer: int) -> Tensor:
    """Block `layer` on x, (T, n_state): all frames up to keys and values, the case's after them."""
    own = [s for s in stages(c.dims) if f"{s.name}.".startswith(f"blocks.{layer}.")]
    taps = {own[0].inputs[0]: x[None]}
    for stage in own:
        taps[stage.name] = compute(stage, taps, c.tensors, c.n_head)
        if stage.name.endswith("attn.value"):
            for name in (own[0].inputs[0], f"blocks.{layer}.attn.query"):
                taps[name] = c.cut(taps[name][0])[None]
    return taps[own[-1].name][0]


def other_blocks(c: Case) -> list[Option]:
    if not is_opaque(c):
        return []
    return [{"other": i, "block": c.stage.name} for i in range(c.dims.n_audio_layer)]


def with_other_block(c: Case, other: int, block: str) -> Tensor:
    return run_block(c, c.full(block_input(c)), other)


def block_twice(c: Case) -> Tensor:
    layer = int(c.block.split(".")[1])
    return run_block(c, run_block(c.whole, c.full(block_input(c)), layer), layer)


def if_opaque(c: Case) -> list[Option]:
    return [{}] if is_opaque(c) else []


# ---- any kind


def shifts(c: Case) -> list[Option]:
    """One frame either way, and the lag at which both sides correlate best."""
    n = len(c.y)
    some = [t[:, ::8].float() for t in (c.y, c.expected)]  # channels enough to find the lag
    spectra = [torch.fft.rfft(t - t.mean(0), 2 * n, dim=0) for t in some]
    lag = int(torch.fft.irfft((spectra[0] * spectra[1].conj()).sum(1), 2 * n).argmax())
    lag -= 2 * n if lag > n else 0
    return [{"n": m} for m in sorted({-1, 1, lag}) if 0 < abs(m) <= n // 4]


def same_shaped_taps(c: Case) -> list[Option]:
    shape = c.reference[c.stage.name].shape
    return [{"tap": n} for n, t in c.reference.items() if t.shape == shape and n != c.stage.name]


def factor(c: Case) -> list[Option]:
    return [{"factor": float((c.y * c.expected).sum() / c.expected.square().sum())}]


def line(c: Case) -> list[Option]:
    """y = a * expected + b by least squares."""
    centred = c.expected - c.expected.mean()
    a = float((c.y * centred).sum() / centred.square().sum())
    return [{"a": a, "b": float(c.y.mean() - a * c.expected.mean())}]


def gains(c: Case) -> list[Option]:
    squares = c.expected.square().sum(0).clamp(min=1e-30)
    return [{"found": (c.y * c.expected).sum(0) / squares}]


def channel_orders(c: Case) -> list[Option]:
    few = c.on(c.spread(64))
    order = torch.cdist(few.y.T.contiguous(), few.expected.T.contiguous()).argmin(1)
    right = torch.arange(len(order))
    is_order = torch.equal(order.sort().values, right) and not torch.equal(order, right)
    return [{"found": order}] if is_order else []


def renormalised(c: Case, how: str) -> Tensor:
    if how == "mean 0, std 1":
        return normed(c.expected, epsilon=0.0)
    return c.expected / torch.linalg.vector_norm(c.expected, dim=1, keepdim=True)


# ---- the last resort: right but for values that no tensor of the checkpoint has


def fitted(c: Case) -> Tensor:
    """The best weight and bias for the candidate's inputs and outputs; NaN where there are too few
    frames to tell: anything would fit."""
    whole = c.whole
    x = columns(whole).flatten(1) if c.stage.kind == "conv" else whole.x
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if len(x) < 2 * x.shape[1]:
        return torch.full_like(c.y, math.nan)
    return c.cut(c.once("fitted", lambda: x @ torch.linalg.lstsq(x, whole.y).solution))


def affine(c: Case) -> list[Option]:
    x = normed(c.x)
    centred = x - x.mean(0)
    gamma = (c.y * centred).sum(0) / centred.square().sum(0)
    return [{"gamma": gamma, "beta": c.y.mean(0) - gamma * x.mean(0)}]
