"""Every fault of the stem, the blocks and the weights is the mistake that it says it is, shows
first where it says, and is called by its name or, where it has none, nothing. No graph is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import SAMPLES, first_window
from small import N_AUDIO_CTX, small_checkpoint, small_mel
from test_fingerprints import NAMES, Bench, short
from torch import Tensor
from whisper.model import AudioEncoder, disable_sdpa, sinusoids

from validation.faults import FAULTS, Fault, Twin, blocks, stem, unseen, weights
from validation.faults.fault import UNRECORDED, YARDSTICK, seeded
from validation.fingerprints import PHRASES
from validation.metrics import relative_l2
from validation.reference import stock_encoder
from validation.stages import attend, stages
from weights import Checkpoint

MODULES = (stem, blocks, weights)
OWN = [fault for module in MODULES for fault in module.FAULTS]
ONE_LAYER = [fault for fault in OWN if "{layer}" in fault.first_tap]
UNSEEN = [fault for fault in unseen.FAULTS if fault.how != "input"]


def keys(faults: Iterable[Fault]) -> list[str]:
    return [fault.key for fault in faults]


def where_they_differ(taps: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    return [name for name in right if name in taps and not torch.equal(taps[name], right[name])]


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    """Two layers, two heads, float32, random: any of the faults shows in it."""
    return small_checkpoint()


@pytest.fixture(scope="module")
def right(small: Checkpoint) -> dict[str, Tensor]:
    return Twin(small).taps(small_mel())


@pytest.fixture(scope="module")
def demo_short(demo_checkpoint: Checkpoint) -> Bench:
    return short(demo_checkpoint, first_window(SAMPLES / "demo.flac"))


@pytest.fixture(scope="module")
def real_short(real_checkpoint: Checkpoint, jfk) -> Bench:
    return short(real_checkpoint, first_window(jfk))


# ---- the catalogue


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_a_module_has_one_group(module: ModuleType):
    for fault in module.FAULTS:
        assert fault.group == module.__name__.split(".")[-1]
        assert fault.how in ("weights", "code")
        assert FAULTS[fault.key] is fault


def test_the_catalogue_is_whole():
    for key, fault in FAULTS.items():
        assert key == fault.key
        assert fault.group in ("input", "stem", "blocks", "weights", "bridge")
        assert fault.how in ("input", "weights", "code", "bridge")
        assert fault.cause is None or fault.cause in PHRASES, key
        assert fault.sentence.endswith("."), key
        link = re.search(r"https://[\w./-]+[\w/]", fault.seen)
        assert link or fault.seen in (UNRECORDED, YARDSTICK), key
        assert fault.yardstick == (fault.seen == YARDSTICK), key
        assert fault.unseen == (fault in unseen.FAULTS) == key.startswith("U-"), key
        assert (fault.first_tap == "") == (fault.how == "bridge"), key
    assert len({fault.sentence for fault in FAULTS.values()}) == len(FAULTS)


def test_no_fault_hides_another():
    assert len(set(keys(OWN))) == len(OWN)
    one = {fault.id for fault in OWN if fault.strength is None}
    swept = {fault.id for fault in OWN if fault.strength is not None}
    assert not one & swept


def test_what_was_asked_for():
    ids = {fault.id for fault in OWN}
    asked = """S07 S08 S09 S10 S11 S12 E-a E14 E15 E21 E-b S14 S15 S16 S17 S18 S19 S21 E09 E10 S22
    E22 S23 E18 S24 E16 E17 E20 E-c E-d S25 E13 S26 S28 S29 E11 E12 E-e-all E-e-channel"""
    assert set(asked.split()) <= ids
    assert len(ids) >= 45
    assert len({fault.id for fault in OWN if fault.how == "weights"}) >= 18


# ---- on a small encoder: every strength of every fault


@pytest.mark.parametrize("fault", OWN, ids=keys(OWN))
def test_it_shows_where_it_says(small: Checkpoint, right: dict[str, Tensor], fault: Fault):
    taps = Twin(small, fault).taps(small_mel())
    assert where_they_differ(taps, right)[0] == fault.diverges_at()
    assert taps["ln_post"].shape == right["ln_post"].shape
    assert all(torch.isfinite(tap).all() for tap in taps.values())
    again = Twin(small_checkpoint(), fault).taps(small_mel())
    assert where_they_differ(again, taps) == []


@pytest.mark.parametrize("fault", ONE_LAYER, ids=keys(ONE_LAYER))
def test_it_can_be_made_in_one_layer(small: Checkpoint, right: dict[str, Tensor], fault: Fault):
    taps = Twin(small, fault, layer=1).taps(small_mel())
    assert fault.diverges_at(1) == fault.first_tap.replace("{layer}", "1")
    assert where_they_differ(taps, right)[0] == fault.diverges_at(1)


@pytest.fixture(scope="module")
def four() -> Checkpoint:
    """Four layers, as tiny has, and no model has fewer."""
    return small_checkpoint(n_audio_layer=4)


@pytest.mark.parametrize("fault", UNSEEN, ids=keys(UNSEEN))
def test_the_unseen_show_where_they_say(four: Checkpoint, fault: Fault):
    """What they are called is not tested: it is measured."""
    taps, right = Twin(four, fault).taps(small_mel()), Twin(four).taps(small_mel())
    assert where_they_differ(taps, right)[0] == fault.first_tap
    assert taps.keys() == right.keys()
    assert all(torch.isfinite(tap).all() for tap in taps.values())
    assert relative_l2(taps["ln_post"], right["ln_post"]) > 1e-7


def test_positions_of_another_step(four: Checkpoint):
    """The formula is whisper's, up to the step."""
    right = sinusoids(N_AUDIO_CTX, 128)
    wrong = unseen.positions_of_another_step({"positional_embedding": right}, [])
    table = wrong["positional_embedding"]
    assert torch.allclose(table[:, [0, 64]], right[:, [0, 64]], atol=1e-6)  # frequency 1
    frequency = torch.atan2(table[1, 63], table[1, 127])
    assert float(frequency) == pytest.approx(10000 ** (-63 / 64), rel=1e-3)


def test_steps_of_blocks_and_of_float8(four: Checkpoint):
    name = "encoder.blocks.0.mlp.2.weight"
    right = four.tensors[name]
    wrong = FAULTS["U-blocks-of-32@5"].damage(four).tensors[name]
    blocks, levels = right.reshape(-1, 32), wrong.reshape(-1, 32)
    counts = levels / (blocks.abs().amax(1, keepdim=True) / 15)
    assert float((counts - counts.round()).abs().max()) < 1e-4
    assert torch.equal(counts.round().abs().amax(1), torch.full((len(counts),), 15.0))
    wrong = FAULTS["U-float8"].damage(four).tensors[name]
    error = ((wrong - right) / right)[right.abs() > right.abs().max() / 100].abs()
    assert 0.05 < float(error.max()) <= 2**-4 + 1e-6


@pytest.mark.parametrize("fault", FAULTS.values(), ids=keys(FAULTS.values()))
def test_weights_keep_names_shapes_and_types(four: Checkpoint, fault: Fault):
    damaged = fault.damage(four)
    assert damaged.tensors.keys() == four.tensors.keys()
    changed = set(where_they_differ(damaged.tensors, four.tensors))
    assert bool(changed) == (fault.how == "weights")
    for name, tensor in four.tensors.items():
        assert damaged.tensors[name].shape == tensor.shape
        assert damaged.tensors[name].dtype == torch.float32
        assert damaged.tensors[name].is_contiguous()
    assert where_they_differ(small_checkpoint(n_audio_layer=4).tensors, four.tensors) == []


def test_random_numbers_are_the_same_in_every_process():
    assert seeded("E14", "conv1").initial_seed() == 2_500_606_061
    assert seeded("E14", "conv2").initial_seed() != seeded("E14", "conv1").initial_seed()


# ---- against OpenAI's own modules, put together wrongly


def stock_features(encoder: AudioEncoder, mel: Tensor, order: Iterable[int]) -> Tensor:
    """The stock encoder with its blocks in this order."""
    with torch.no_grad(), disable_sdpa():
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).mT + encoder.positional_embedding
        for layer in order:
            x = encoder.blocks[layer](x)
        return encoder.ln_post(x)


ORDERS = [
    ("S22", 4, [0, 1]),
    ("S22-one", 4, [0]),
    ("S22-none", 4, []),
    ("S22", 1, []),
    ("E22", 4, [1, 2, 3]),
    ("E22-twice", 4, [0, 0, 2, 3]),
    ("E22-swapped", 4, [1, 0, 2, 3]),
]


@pytest.mark.parametrize(("key", "n_layer", "order"), ORDERS)
def test_blocks_in_another_order(key: str, n_layer: int, order: list[int]):
    checkpoint = small_checkpoint(n_audio_layer=n_layer)
    taps = Twin(checkpoint, FAULTS[key]).taps(small_mel())
    expected = stock_features(stock_encoder(checkpoint), small_mel(), order)
    assert relative_l2(taps["ln_post"], expected) < 1e-5
    if FAULTS[key].how == "code":
        run = [name for name in taps if name.startswith("blocks.") and name.count(".") == 1]
        assert len(run) == len(order)


def test_post_norm(small: Checkpoint):
    encoder = stock_encoder(small)
    with torch.no_grad(), disable_sdpa():
        x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(small_mel())))).mT
        x = x + encoder.positional_embedding
        for block in encoder.blocks:
            x = block.attn_ln(x + block.attn(x)[0])
            x = block.mlp_ln(x + block.mlp(x))
        expected = encoder.ln_post(x)
    assert relative_l2(Twin(small, FAULTS["E18"]).features(small_mel()), expected) < 1e-5


def test_strides(small: Checkpoint, right: dict[str, Tensor]):
    encoder = stock_encoder(small)
    encoder.conv2.stride = (1,)
    with torch.no_grad():
        expected = encoder.conv2(right["conv1.gelu"].mT).mT[:, :N_AUDIO_CTX]
        dropped = right["conv1.gelu"] @ encoder.conv2.weight.sum(2).T + encoder.conv2.bias
    taps = Twin(small, FAULTS["S11"]).taps(small_mel())
    assert relative_l2(taps["conv2"], expected) < 1e-6
    taps = Twin(small, FAULTS["S12"]).taps(small_mel())
    assert relative_l2(taps["conv2"], dropped[:, ::2]) < 1e-6


def test_one_tap_of_conv1_alone(small: Checkpoint):
    weight, bias = (small.tensors[f"encoder.conv1.{name}"] for name in ("weight", "bias"))
    taps = Twin(small, FAULTS["S10"]).taps(small_mel())
    assert relative_l2(taps["conv1"], small_mel().mT @ weight[:, :, 0].T + bias) < 1e-6
    positions = small.tensors["encoder.positional_embedding"]
    assert torch.equal(taps["positional_embedding"], taps["conv1"][:, ::2] + positions)
    assert not {"conv1.gelu", "conv2", "conv2.gelu"} & taps.keys()


def test_only_the_edges_are_corrupt(small: Checkpoint, right: dict[str, Tensor]):
    taps = Twin(small, FAULTS["E14"]).injected(right)
    wrong = (taps["conv1"] != right["conv1"]).any(2)[0].nonzero().flatten().tolist()
    assert wrong == [0, 2 * N_AUDIO_CTX - 1]
    wrong = (taps["conv2"] != right["conv2"]).any(2)[0].nonzero().flatten().tolist()
    assert wrong == [0]  # stride 2 ends before the padding on the right


def test_exchanged_projections(small: Checkpoint, right: dict[str, Tensor]):
    """Made with weights, they are what the same mistake in the code gives; of the key the softmax
    does not see the bias, which the graph has no place for."""
    names = [f"blocks.0.attn.{name}" for name in ("query", "key", "value")]
    q, k, v = (right[name] for name in names)
    taps = Twin(small, FAULTS["E-c"]).taps(small_mel())
    mixed = taps["blocks.0.attn.qkv_attention"]
    assert relative_l2(mixed, attend(k, q, v, small.dims.n_audio_head)) < 1e-5
    taps = Twin(small, FAULTS["E-d"]).taps(small_mel())
    assert all(
        torch.equal(taps[name], right[of]) for name, of in zip(names, reversed(names), strict=True)
    )
    mixed = taps["blocks.0.attn.qkv_attention"]
    assert torch.equal(mixed, attend(v, k, q, small.dims.n_audio_head))


def test_a_bias_of_the_key_changes_nothing_in_the_end(small: Checkpoint, right: dict[str, Tensor]):
    taps = Twin(small, FAULTS["E17"]).taps(small_mel())
    assert relative_l2(taps["blocks.0.attn.key"], right["blocks.0.attn.key"]) > 1e-3
    assert relative_l2(taps["ln_post"], right["ln_post"]) < 1e-5


def test_another_output(small: Checkpoint, right: dict[str, Tensor]):
    y = right["ln_post"]
    for factor in weights.FACTORS:
        scaled = Twin(small, FAULTS[f"S28-factor@{factor:g}"]).features(small_mel())
        assert relative_l2(scaled, factor * y) < 1e-6
    for target in weights.TARGET_STDS:
        scaled = Twin(small, FAULTS[f"S28@{target:g}"]).features(small_mel())
        assert float(scaled.std(correction=0)) == pytest.approx(target, rel=1e-5)
        assert float(F.cosine_similarity(scaled.flatten(), y.flatten(), 0)) > 1 - 1e-6
    frames = Twin(small, FAULTS["S29"]).features(small_mel())
    assert relative_l2(frames, F.layer_norm(y, y.shape[-1:], eps=0.0)) < 1e-5
    turned = Twin(small, FAULTS["E12"]).features(small_mel())
    assert torch.equal(turned.view(1, small.dims.n_audio_state, N_AUDIO_CTX), y.mT)


# ---- precision and noise


BITS = [("float16", 10), ("bfloat16", 7), ("tf32", 10)]


@pytest.mark.parametrize(("to", "bits"), BITS)
def test_floats_of_fewer_bits(to: str, bits: int):
    x = torch.randn(4000, generator=seeded(to))
    y = weights.rounded(x, to)
    error = ((y - x) / x).abs()
    assert 0.4 * 2**-bits < float(error.max()) <= 0.5 * 2**-bits
    assert torch.equal(weights.rounded(y, to), y)


@pytest.mark.parametrize(("to", "levels"), [("int8", 127), ("int6", 31), ("int4", 7)])
def test_integers_of_fewer_bits(to: str, levels: int):
    """Every channel has its own largest number, and as many steps on either side of zero."""
    x = (
        torch.randn((3, 400, 3), generator=seeded(to))
        * torch.tensor([1.0, 10.0, 0.0])[:, None, None]
    )
    y = weights.rounded(x, f"{to} per channel")
    assert torch.equal(y[2], x[2])
    for of in (0, 1):
        step = x[of].abs().max() / levels
        counts = y[of] / step
        assert float((counts - counts.round()).abs().max()) < 1e-4
        assert int(counts.abs().max().round()) == levels
        assert float((y[of] - x[of]).abs().max()) <= 0.5001 * float(step)
    whole = weights.rounded(x, f"{to} per tensor")
    assert relative_l2(whole[0], x[0]) > relative_l2(y[0], x[0])
    assert relative_l2(whole[1], x[1]) < 1.5 * relative_l2(y[1], x[1])


def test_precision_is_that_of_matrices_alone(small: Checkpoint):
    matrices = {
        f"encoder.{s.weights[0]}" for s in stages(small.dims) if s.kind in ("conv", "linear")
    }
    for to in weights.PRECISIONS:
        damaged = FAULTS[f"E11@{to}"].damage(small)
        assert set(where_they_differ(damaged.tensors, small.tensors)) == matrices


def test_a_checkpoint_in_float16_loses_nothing_to_float16_and_tf32(demo_checkpoint: Checkpoint):
    assert {t.dtype for n, t in demo_checkpoint.encoder_tensors().items()} == {torch.float16}
    for to in ("float16", "tf32"):
        damaged = FAULTS[f"E11@{to}"].damage(demo_checkpoint)
        for name, tensor in demo_checkpoint.encoder_tensors().items():
            assert torch.equal(damaged.encoder_tensors()[name].float(), tensor.float()), name


NOISES = [fault for fault in OWN if fault.id.startswith("E-e-")]


@pytest.mark.parametrize("fault", NOISES, ids=keys(NOISES))
def test_noise_has_its_size(small: Checkpoint, right: dict[str, Tensor], fault: Fault):
    taps = Twin(small, fault).injected(right)
    wrong = where_they_differ(taps, right)
    assert wrong == ([n for n in right if n != "mel"] if "all" in fault.id else [fault.first_tap])
    for name in wrong:
        noise = taps[name] - right[name]
        size = float(torch.linalg.vector_norm(noise) / torch.linalg.vector_norm(right[name]))
        assert size == pytest.approx(fault.strength, rel=0.1 if fault.strength < 1e-5 else 1e-2)
        channels = int(noise.abs().amax((0, 1)).count_nonzero())
        assert channels == (1 if "channel" in fault.id else noise.shape[2])


@pytest.mark.parametrize("id_", ["E-e-all", "E-e-channel"])
def test_noise_of_another_recording_is_another(small: Checkpoint, id_: str):
    """Yet of all sizes it is the same, also where the taps before are noisy already."""
    noise = {}
    for seed in (2, 3):
        mel = small_mel(seed)
        right = Twin(small).taps(mel)
        for size in ("0.001", "0.01"):
            given = {n: x if n == "mel" else x * (1 + float(size)) for n, x in right.items()}
            twin = Twin(small, FAULTS[f"{id_}@{size}"])
            stage = next(s for s in stages(small.dims) if s.name == "blocks.1")
            noise[seed, size] = twin.stage(stage, given) - Twin(small).stage(stage, given)
    for seed in (2, 3):
        one, ten = noise[seed, "0.001"], noise[seed, "0.01"]
        assert float(F.cosine_similarity(one.flatten(), ten.flatten(), 0)) > 0.999
    assert (
        abs(float(F.cosine_similarity(noise[2, "0.01"].flatten(), noise[3, "0.01"].flatten(), 0)))
        < 0.5
    )


def test_noise_of_another_size_is_the_same_noise(small: Checkpoint, right: dict[str, Tensor]):
    one, ten = (
        Twin(small, FAULTS[f"E-e-ln_post@{size}"]).features(small_mel()) - right["ln_post"]
        for size in ("0.1", "1")
    )
    assert relative_l2(10 * one, ten) < 1e-5


# ---- called by their names


def ends(fault: Fault) -> bool:
    """Of a sweep the ends, of the precisions those in use."""
    same = [f for f in OWN if f.id == fault.id]
    return fault in (same[0], same[-1]) or fault.id.startswith("E11")


# What changes no number of a checkpoint in float16; what the table of causes does not try; what is
# tested on a whole window.
NO_CHANGE = {"E11@float16", "E11@tf32"}
LEFT_OUT = {*NO_CHANGE, *NAMES}
NAMED = [fault for fault in OWN if ends(fault) and fault.key not in LEFT_OUT]


def assert_called(bench: Bench, fault: Fault) -> None:
    candidate = Twin(bench.checkpoint, fault).taps(bench.mel)
    first = where_they_differ(candidate, bench.reference)[0]
    assert first == fault.diverges_at()
    cause = bench.explain(first, candidate)
    assert (cause and cause.id) == fault.cause, cause
    assert cause is None or cause.score <= cause.baseline / 20


@pytest.mark.parametrize("fault", NAMED, ids=keys(NAMED))
def test_it_is_called_by_its_name(demo_short: Bench, fault: Fault):
    assert_called(demo_short, fault)


@pytest.mark.parametrize("fault", NAMED, ids=keys(NAMED))
def test_it_is_called_by_its_name_on_the_real_encoder(real_short: Bench, fault: Fault):
    assert_called(real_short, fault)
