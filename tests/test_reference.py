"""The reference: its taps are what the stock encoder computes, and a broken one is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLES, first_window
from small import N_AUDIO_CTX, small_checkpoint, small_mel
from torch import Tensor, nn
from whisper.model import AudioEncoder, MultiHeadAttention

from validation.metrics import relative_l2
from validation.numbers import noise_mel, silence_mel
from validation.reference import (
    AT_THE_END,
    Reference,
    ReferenceBroken,
    SelfCheck,
    Taps,
    floor,
    functional_distances,
    own_floor,
    record,
    run_eager,
    run_float64,
)
from validation.stages import compute, own_output, stages
from weights import Checkpoint

GOOD = SelfCheck(True, True, True, 1e-7, 2e-7, "conv1", 3e-7, 4e-7)


@pytest.fixture(scope="module")
def small() -> Reference:
    return Reference(small_checkpoint())


@pytest.fixture(scope="module")
def demo_run(demo_checkpoint: Checkpoint) -> tuple[Reference, Tensor, Taps, Taps]:
    """(reference, mel, taps, float64 taps) of demo.flac."""
    reference, mel = Reference(demo_checkpoint), first_window(SAMPLES / "demo.flac")
    return reference, mel, reference.taps(mel), reference.exact(mel)


@pytest.fixture(scope="module")
def real_run(real_checkpoint: Checkpoint, jfk) -> tuple[Reference, Tensor, Taps, Taps]:
    reference, mel = Reference(real_checkpoint), first_window(jfk)
    return reference, mel, reference.taps(mel), reference.exact(mel)


def by_hand(checkpoint: Checkpoint, mel: Tensor) -> Taps:
    """The encoder once more, from `whisper/model.py` by eye, in float64 and with plain products:
    neither a module, nor `validation.stages`, nor a fused kernel of PyTorch's is in it."""
    w = {name: t.double() for name, t in checkpoint.encoder_tensors().items()}
    n_head = checkpoint.dims.n_audio_head
    taps: Taps = {}

    def tap(name: str, x: Tensor) -> Tensor:
        taps[name] = x
        return x

    def conv(x: Tensor, name: str, stride: int) -> Tensor:  # x (B, frames, in)
        padded = torch.cat([torch.zeros_like(x[:, :1]), x, torch.zeros_like(x[:, :1])], 1)
        frames = range(0, x.shape[1], stride)
        rows = [
            torch.einsum("bki,oik->bo", padded[:, t : t + 3], w[f"{name}.weight"]) for t in frames
        ]
        return torch.stack(rows, 1) + w[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        scaled = centred / (variance + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    x = tap("mel", mel.double()).transpose(1, 2)
    x = tap("conv1.gelu", gelu(tap("conv1", conv(x, "conv1", 1))))
    x = tap("conv2.gelu", gelu(tap("conv2", conv(x, "conv2", 2))))
    x = tap("positional_embedding", x + w["positional_embedding"])
    for layer in range(checkpoint.dims.n_audio_layer):
        b = f"blocks.{layer}"
        y = tap(f"{b}.attn_ln", norm(x, f"{b}.attn_ln"))
        q, k, v = (
            tap(f"{b}.attn.{n}", linear(y, f"{b}.attn.{n}")) for n in ("query", "key", "value")
        )
        heads = []
        for qh, kh, vh in zip(*(t.chunk(n_head, -1) for t in (q, k, v)), strict=True):
            scores = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
            heads.append(torch.softmax(scores, -1) @ vh)
        y = tap(f"{b}.attn.qkv_attention", torch.cat(heads, -1))
        x = tap(f"{b}.attn.residual", x + tap(f"{b}.attn.out", linear(y, f"{b}.attn.out")))
        y = tap(f"{b}.mlp_ln", norm(x, f"{b}.mlp_ln"))
        y = tap(f"{b}.mlp.1", gelu(tap(f"{b}.mlp.0", linear(y, f"{b}.mlp.0"))))
        x = tap(b, x + tap(f"{b}.mlp.2", linear(y, f"{b}.mlp.2")))
    tap("ln_post", norm(x, "ln_post"))
    return taps


# The taps


def test_names_and_shapes(small: Reference):
    dims = small.dims
    taps = small.taps(small_mel())
    assert list(taps) == [stage.name for stage in stages(dims)]
    for name, x in taps.items():
        frames = 2 * N_AUDIO_CTX if name.startswith("conv1") else N_AUDIO_CTX
        channels = dims.n_audio_state * (4 if name.endswith(("mlp.0", "mlp.1")) else 1)
        expected = (1, dims.n_mels, 2 * N_AUDIO_CTX) if name == "mel" else (1, frames, channels)
        assert tuple(x.shape) == expected, name
        assert x.dtype == torch.float32, name
        assert x.is_contiguous(), name
        assert not x.requires_grad, name


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_any_number_of_layers(layers):
    checkpoint = small_checkpoint(n_audio_layer=layers)
    taps = Reference(checkpoint).taps(small_mel())
    assert len(taps) == 7 + 12 * layers
    expected = by_hand(checkpoint, small_mel())
    assert max(relative_l2(taps[n], expected[n]) for n in taps) < 2e-6


def test_taps_are_what_the_network_computes(small: Reference):
    """Every tap, in float32 and in float64, against the network written down by hand."""
    checkpoint, mel = small_checkpoint(), small_mel()
    expected = by_hand(checkpoint, mel)
    taps, exact = small.taps(mel), small.exact(mel)
    assert expected.keys() == taps.keys() == exact.keys()
    for name, x in expected.items():
        assert relative_l2(taps[name], x) < 2e-6, name
        assert relative_l2(exact[name], x) < 1e-14, name
        assert exact[name].dtype == torch.float64, name


def test_every_tap_is_its_own(small: Reference):
    """No two taps of one shape hold the same: none is taken from the wrong place."""
    taps = small.taps(small_mel())
    names = list(taps)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert taps[a].shape != taps[b].shape or relative_l2(taps[a], taps[b]) > 1e-2, (a, b)


def test_hooks_change_nothing_and_leave_nothing(small: Reference):
    mel = small_mel()
    before = small.features(mel)
    assert torch.equal(small.taps(mel)["ln_post"], before)
    assert torch.equal(small.features(mel), before)
    for module in small.stock.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_are_removed_when_the_run_fails(small: Reference, monkeypatch):
    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(small.stock.ln_post, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            small.taps(small_mel())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.stock.modules())


def test_attention_is_eager_and_the_switch_is_put_back(small: Reference, monkeypatch):
    def fused(*_, **__):
        raise AssertionError("fused attention was called")

    with monkeypatch.context() as patch:
        patch.setattr("whisper.model.scaled_dot_product_attention", fused)
        small.taps(small_mel())
        small.features(small_mel())
        with pytest.raises(AssertionError, match="fused"):
            small.exact(small_mel())  # eager attention would round its scores to float32
    assert MultiHeadAttention.use_sdpa is True


def test_each_module_is_built_once(monkeypatch):
    built = []
    once = AudioEncoder.__init__

    def count(self: AudioEncoder, *sizes: int) -> None:
        built.append(sizes)
        once(self, *sizes)

    monkeypatch.setattr(AudioEncoder, "__init__", count)
    reference, mel = Reference(small_checkpoint()), small_mel()
    for _ in range(2):
        reference.taps(mel)
    assert len(built) == 1
    for _ in range(2):
        reference.exact(mel)
        reference.check(mel)
    assert len(built) == 2


def test_the_float64_features_are_those_of_the_twin(small: Reference):
    mel = small_mel()
    assert torch.equal(small.exact(mel)["ln_post"], run_float64(small.twin, mel))
    assert torch.equal(small.taps(mel)["ln_post"], run_eager(small.stock, mel))


@pytest.mark.parametrize(
    "mel",
    [
        torch.zeros(2, 80, 40),
        torch.zeros(80, 40),
        torch.zeros(1, 80, 39),
        torch.zeros(1, 128, 40),
        torch.zeros(1, 80, 40, dtype=torch.float64),
    ],
    ids=lambda m: f"{tuple(m.shape)} {m.dtype}",
)
@pytest.mark.parametrize("method", ["taps", "exact", "features", "check"])
def test_another_mel_is_refused(small: Reference, mel, method):
    with pytest.raises(ValueError, match=r"expected \(1, 80, 40\) and torch\.float32"):
        getattr(small, method)(mel)


def test_a_tap_that_is_not_passed_is_said(small: Reference, monkeypatch):
    """A later whisper whose stem calls another function: no tap is made up for it."""
    monkeypatch.setattr("whisper.model.F.gelu", lambda x: x * torch.special.ndtr(x))
    monkeypatch.setattr(nn.GELU, "forward", lambda _, x: x * torch.special.ndtr(x))
    with pytest.raises(ReferenceBroken, match=r"did not pass through conv1\.gelu, conv2\.gelu$"):
        small.taps(small_mel())


def test_a_tap_that_is_passed_twice_is_said(small: Reference, monkeypatch):
    once = AudioEncoder.forward
    monkeypatch.setattr(AudioEncoder, "forward", lambda self, x: once(self, x) + once(self, x))
    with pytest.raises(ReferenceBroken, match="passed conv1 twice"):
        small.taps(small_mel())


# The stages' formulas


def test_own_output_of_the_float64_taps_are_the_float64_taps(small: Reference):
    exact = small.exact(small_mel())
    for stage in stages(small.dims):
        own = own_output(stage, exact, small.tensors, small.dims.n_audio_head)
        assert own.dtype == torch.float64
        assert relative_l2(own, exact[stage.name]) < 1e-13, stage.name


def test_own_output_of_the_float32_taps_is_close(small: Reference):
    taps = small.taps(small_mel())
    for stage in stages(small.dims):
        own = own_output(stage, taps, small.tensors, small.dims.n_audio_head)
        assert relative_l2(taps[stage.name], own) < 1e-6, stage.name


def test_own_output_reads_its_inputs_alone(small: Reference):
    """Taps that are no input of the stage may be missing; an input may not."""
    taps = small.taps(small_mel())
    for stage in stages(small.dims):
        inputs = {name: taps[name] for name in stage.inputs or ("mel",)}
        own_output(stage, inputs, small.tensors, small.dims.n_audio_head)
        for name in inputs:
            fewer = {n: x for n, x in inputs.items() if n != name}
            with pytest.raises(KeyError, match=name):
                own_output(stage, fewer, small.tensors, small.dims.n_audio_head)


def test_compute_stays_in_the_dtype_of_its_inputs(small: Reference):
    taps = small.taps(small_mel())
    for stage in stages(small.dims):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = {name: taps[name].to(dtype) for name in stage.inputs or ("mel",)}
            found = compute(stage, inputs, small.tensors, small.dims.n_audio_head)
            assert found.dtype == dtype, stage.name
            assert found.shape == taps[stage.name].shape, stage.name
    bad = replace(stages(small.dims)[1], kind="pool")
    with pytest.raises(ValueError, match="stage conv1 is of unknown kind 'pool'"):
        compute(bad, taps, small.tensors, small.dims.n_audio_head)


def test_stages_name_each_tensor_once(small: Reference):
    """Every weight belongs to exactly one stage, every input is an earlier stage."""
    found = stages(small.dims)
    used = [name for stage in found for name in stage.weights]
    assert sorted(used) == sorted(small.tensors)
    seen: set[str] = set()
    for stage in found:
        assert set(stage.inputs) <= seen
        seen.add(stage.name)


# The floors


def check_floors(reference: Reference, taps: Taps, exact: Taps) -> None:
    names = [stage.name for stage in stages(reference.dims)]
    for found in (
        floor(taps, exact),
        own_floor(taps, reference.tensors, reference.dims),
    ):
        assert list(found) == names
        assert found.pop("mel") == 0  # both are given the same
        assert all(0 < value < 1e-4 for value in found.values()), found


def test_floors_are_positive_and_small(small: Reference):
    check_floors(small, small.taps(small_mel()), small.exact(small_mel()))


def test_floors_of_demo(demo_run):
    reference, _, taps, exact = demo_run
    check_floors(reference, taps, exact)


def test_floors_of_the_real_encoder(real_run):
    reference, _, taps, exact = real_run
    check_floors(reference, taps, exact)


def test_the_floor_is_the_distance_tap_by_tap():
    taps = {"mel": torch.ones(1, 2, 4), "conv1": torch.full((1, 4, 2), 1.5)}
    exact = {"mel": torch.ones(1, 2, 4).double(), "conv1": torch.ones(1, 4, 2).double()}
    assert floor(taps, exact) == {"mel": 0, "conv1": 0.5}


# The self check


def test_the_self_check_passes(small: Reference):
    check_reads(small.check(small_mel()))


def check_reads(found: SelfCheck) -> None:
    assert found.agrees
    assert found.hooked_equals_unhooked
    assert found.repeatable
    assert found.finite
    for value in (
        found.fused_relative_l2,
        found.functional_relative_l2,
        found.functional_worst,
        found.float64_relative_l2,
    ):
        assert 0 < value < AT_THE_END / 4
    read = json.loads(json.dumps({**asdict(found), "agrees": found.agrees}, allow_nan=False))
    assert SelfCheck(**{k: v for k, v in read.items() if k != "agrees"}) == found


def test_the_self_check_passes_on_demo(demo_run):
    reference, mel, taps, exact = demo_run
    check_reads(reference.check(mel, taps, exact))


def test_the_self_check_passes_on_the_real_encoder(real_run):
    reference, mel, taps, exact = real_run
    check_reads(reference.check(mel, taps, exact))


@pytest.mark.parametrize("mel", [silence_mel(), noise_mel()], ids=["silence", "noise"])
def test_the_self_check_passes_without_speech(real_checkpoint: Checkpoint, mel):
    check_reads(Reference(real_checkpoint).check(mel))


def noise_of(x: Tensor) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype)


def randomise(module: AudioEncoder) -> None:
    """A reference that is random noise, as behind another project's swallowed exception."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(noise_of(parameter) / 10)


def other_bias(module: AudioEncoder) -> None:
    with torch.no_grad():
        module.blocks[1].attn.value.bias += 0.01


def tanh_gelu(module: AudioEncoder) -> None:
    for block in module.blocks:
        block.mlp[1] = nn.GELU(approximate="tanh")


def no_scale(module: AudioEncoder) -> None:
    for block in module.blocks:
        block.attn.n_head = 1


@pytest.mark.parametrize("damage", [randomise, other_bias, tanh_gelu, no_scale])
def test_a_reference_that_is_another_function_is_not_believed(damage: Callable[..., None]):
    reference = Reference(small_checkpoint())
    damage(reference.stock)
    with pytest.raises(ReferenceBroken, match=r"cannot serve as the reference: .*plain formulas"):
        reference.check(small_mel())


def test_a_wrong_twin_is_not_believed():
    reference = Reference(small_checkpoint())
    other_bias(reference.twin)
    with pytest.raises(
        ReferenceBroken, match=r"reference: by its float64 twin it is [^;]* expected$"
    ):
        reference.check(small_mel())


def test_a_random_output_is_not_believed(small: Reference, monkeypatch):
    """Weights apart, the output itself is random: no two runs agree."""
    monkeypatch.setattr(small.stock.ln_post, "forward", noise_of)
    with pytest.raises(ReferenceBroken, match="two runs of it differ; its run with hooks differs"):
        small.check(small_mel())


def test_dropout_is_not_believed(small: Reference, monkeypatch):
    """So small that every distance is within the limit: the bits tell."""
    last = small.stock.blocks[0].mlp[2]
    once = last.forward

    def noisy(x: Tensor) -> Tensor:
        y = once(x)
        return y * (1 + 1e-5 * noise_of(y))

    monkeypatch.setattr(last, "forward", noisy)
    torch.manual_seed(1)
    with pytest.raises(ReferenceBroken) as caught:
        small.check(small_mel())
    assert "two runs of it differ" in str(caught.value)
    assert "expected" not in str(caught.value)


def test_weights_that_change_between_the_runs_are_seen():
    reference, mel = Reference(small_checkpoint()), small_mel()
    taps, exact = reference.taps(mel), reference.exact(mel)
    randomise(reference.stock)
    with pytest.raises(ReferenceBroken, match="run with hooks differs from the run without"):
        reference.check(mel, taps, exact)


def test_hooks_that_change_the_run_are_seen(small: Reference, monkeypatch):
    def doubled(module: AudioEncoder, mel: Tensor) -> Taps:
        taps = record(module, mel)
        return {**taps, "ln_post": taps["ln_post"] * (1 + 2**-20)}

    exact = small.exact(small_mel())
    monkeypatch.setattr("validation.reference.record", doubled)
    with pytest.raises(ReferenceBroken) as caught:
        small.check(small_mel(), exact=exact)
    assert str(caught.value).endswith("reference: its run with hooks differs from the run without")


def test_nan_is_not_believed(monkeypatch):
    reference = Reference(small_checkpoint())
    with torch.no_grad():
        reference.stock.conv1.bias[0] = torch.nan
    with pytest.raises(ReferenceBroken, match="values that are not finite"):
        reference.check(small_mel())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finite": False}, "it has values that are not finite"),
        ({"repeatable": False}, "two runs of it differ"),
        ({"hooked_equals_unhooked": False}, "its run with hooks differs"),
        ({"fused_relative_l2": 0.003}, "by its fused attention it is 3.0e-03 off, at most 1e-04"),
        ({"functional_relative_l2": 0.003}, "by the plain formulas it is 3.0e-03 off, at most"),
        ({"functional_worst": 0.003}, "by the plain formulas at conv1 it is 3.0e-03 off, at most"),
        ({"float64_relative_l2": torch.nan}, "by its float64 twin it is nan off"),
    ],
    ids=str,
)
def test_each_problem_is_said(change, words):
    found = replace(GOOD, **change)
    assert GOOD.agrees
    assert not found.agrees
    assert [problem.startswith(words) for problem in found.problems] == [True]


def test_the_plain_formulas_use_the_checkpoint_and_no_module(small: Reference, monkeypatch):
    """They agree with the hooks though every stock module is out of order."""
    mel = small_mel()
    taps = small.taps(mel)

    def broken(*_, **__):
        raise AssertionError("a module was called")

    monkeypatch.setattr(nn.Module, "__call__", broken)
    found = functional_distances(taps, mel, small.tensors, small.dims)
    assert list(found) == list(taps)
    assert found.pop("mel") == 0
    assert max(found.values()) < 5e-6


def test_the_plain_formulas_are_run_one_after_the_other(small: Reference):
    """An error at the start is carried to the end: they do not read the taps."""
    mel = small_mel()
    taps = small.taps(mel)
    other = {**small.tensors, "conv1.bias": small.tensors["conv1.bias"] + 0.1}
    found = functional_distances(taps, mel, other, small.dims)
    assert found["ln_post"] > 1e-3
    assert F.gelu is torch._C._nn.gelu  # what the recorder looks for
