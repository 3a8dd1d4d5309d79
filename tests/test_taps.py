"""The graph with taps and the graph of single stages are the network that production runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SAMPLES, first_window
from torch import Tensor

import encoder.engine
from encoder.engine import EngineError, Kind, StagesEngine, TappedEngine, artifact_name
from encoder.graph import tap_names, tap_shapes
from validation.metrics import relative_l2
from validation.numbers import noise_mel, silence_mel
from validation.reference import Reference, Taps
from validation.stages import stages
from weights import Checkpoint

# Measured on demo.flac and on jfk.flac with the real encoder: 3.9e-7 and 8.5e-7.
OBSERVER = 4e-6
# Free-running, worst tap: 3.4e-6 and 4.0e-6. One stage alone, worst tap: 2.4e-6 and 2.1e-6.
TAP = 1e-5


@pytest.fixture(scope="module")
def demo_mel() -> Tensor:
    return first_window(SAMPLES / "demo.flac")


@pytest.fixture(scope="module")
def demo_taps(demo_checkpoint: Checkpoint, demo_mel: Tensor) -> Taps:
    return Reference(demo_checkpoint).taps(demo_mel)


@pytest.fixture(scope="module")
def demo_answers(demo_checkpoint: Checkpoint, demo_taps: Taps, stages_engine: StagesEngine) -> Taps:
    return stages_engine(demo_taps, demo_checkpoint.encoder_tensors())


def errors(found: Taps, reference: Taps) -> dict[str, float]:
    assert list(found) == list(reference)
    return {name: relative_l2(found[name], reference[name]) for name in reference}


def changed(found: Taps, before: Taps) -> set[str]:
    return {name for name in before if not torch.equal(found[name], before[name])}


def test_the_builder_taps_the_stages_and_no_others(demo_checkpoint):
    tiny = demo_checkpoint.dims
    large = replace(tiny, n_mels=128, n_audio_state=1280, n_audio_head=20, n_audio_layer=32)
    for dims in (tiny, replace(tiny, n_audio_layer=1), large):
        assert tap_names(dims) == [stage.name for stage in stages(dims)]


def test_shapes_of_the_taps_are_those_of_the_stock_encoder(demo_checkpoint, demo_taps):
    found = {name: tuple(x.shape[1:]) for name, x in demo_taps.items()}
    assert tap_shapes(demo_checkpoint.dims) == found


def test_observer_on_demo(demo_engine, demo_tapped, demo_mel):
    """What the outputs for the taps change in the result is far below the limit of parity."""
    for mel in (demo_mel, silence_mel(), torch.cat([demo_mel, noise_mel()])):
        assert relative_l2(demo_tapped(mel)["ln_post"], demo_engine(mel)) <= OBSERVER


def test_every_tap_of_demo_is_the_reference_s(demo_tapped, demo_mel, demo_taps):
    found = errors(demo_tapped(demo_mel), demo_taps)
    assert max(found.values()) <= TAP, found
    assert found["mel"] == 0


def test_every_stage_of_demo_alone_is_the_reference_s(demo_answers, demo_taps):
    found = errors(demo_answers, demo_taps)
    assert max(found.values()) <= TAP, found


def test_real_encoder(real_checkpoint, real_engine, stages_engine, jfk):
    """The observer, every tap, and every stage alone, on real weights with real speech."""
    mel = first_window(jfk)
    reference = Reference(real_checkpoint).taps(mel)
    taps = TappedEngine(real_checkpoint, "cpu")(mel)
    assert relative_l2(taps["ln_post"], real_engine(mel)) <= OBSERVER
    free = errors(taps, reference)
    assert max(free.values()) <= TAP, free
    own = errors(stages_engine(reference, real_checkpoint.encoder_tensors()), reference)
    assert max(own.values()) <= TAP, own


def test_taps_and_stages_have_the_kernels_of_production(
    demo_checkpoint, demo_tapped, stages_engine
):
    for engine, layers in ((demo_tapped, demo_checkpoint.dims.n_audio_layer), (stages_engine, 1)):
        for name, count in (("conv1d", 2), ("linear", 6 * layers), ("qkv_attention", layers)):
            assert len([k for k in engine.kernels if f"max_whisper.{name}" in k]) == count, name
        for name in ("matmul", "flash_attention", "softmax"):
            assert not [k for k in engine.kernels if name in k], name


@pytest.mark.parametrize(
    "name",
    [
        "mel",
        "conv1.gelu",
        "positional_embedding",
        "blocks.0",
        "blocks.1.attn.key",
        "blocks.2.attn.residual",
        "blocks.2.mlp.2",
        "blocks.3",
    ],
)
def test_a_wrong_input_changes_those_stages_alone_that_read_it(
    demo_checkpoint, stages_engine, demo_taps, demo_answers, name
):
    """Nothing that a stage answers reaches another stage; `mel`, which nobody computes, is given
    back as it is."""
    wrong = {**demo_taps, name: demo_taps[name].flip(-1)}
    found = stages_engine(wrong, demo_checkpoint.encoder_tensors())
    readers = {stage.name for stage in stages(demo_checkpoint.dims) if name in stage.inputs}
    assert changed(found, demo_answers) == readers | ({"mel"} & {name})


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("conv2.weight", "conv2"),
        ("positional_embedding", "positional_embedding"),
        ("blocks.0.attn.out.bias", "blocks.0.attn.out"),
        ("blocks.3.mlp_ln.weight", "blocks.3.mlp_ln"),
        ("ln_post.bias", "ln_post"),
    ],
)
def test_a_wrong_tensor_changes_its_stage_alone(
    demo_checkpoint, stages_engine, demo_taps, demo_answers, tensor, stage
):
    tensors = demo_checkpoint.encoder_tensors()
    wrong = {**tensors, tensor: tensors[tensor] + 0.5}
    assert changed(stages_engine(demo_taps, wrong), demo_answers) == {stage}


def test_one_artifact_of_stages_serves_every_depth(demo_checkpoint, demo_mel, monkeypatch):
    """Two blocks of the four: nothing is compiled, and every stage is right."""

    def never(dims, device, kind):
        raise AssertionError(f"compiled {kind}")

    monkeypatch.setattr(encoder.engine, "compile_encoder", never)
    dims = replace(demo_checkpoint.dims, n_audio_layer=2)
    tensors = {
        name: tensor
        for name, tensor in demo_checkpoint.tensors.items()
        if not name.startswith(("encoder.blocks.2.", "encoder.blocks.3."))
    }
    two = replace(demo_checkpoint, dims=dims, tensors=tensors)
    reference = Reference(two).taps(demo_mel)
    found = errors(StagesEngine(dims, "cpu")(reference, two.encoder_tensors()), reference)
    assert max(found.values()) <= TAP, found


def test_batches(demo_checkpoint, demo_tapped, stages_engine, demo_mel, demo_taps):
    """Row by row a batch gives what its windows give, to float32's noise."""
    other = Reference(demo_checkpoint).taps(noise_mel(3))
    both = {name: torch.cat([x, other[name]]) for name, x in demo_taps.items()}
    answers = stages_engine(both, demo_checkpoint.encoder_tensors())
    taps = demo_tapped(both["mel"])
    for row, alone in enumerate((demo_taps, other)):
        for found in (answers, taps):
            kept = {name: x[row : row + 1] for name, x in found.items()}
            assert max(errors(kept, alone).values()) <= 2 * TAP


def test_outputs_own_their_memory(demo_checkpoint, demo_tapped, stages_engine, demo_taps):
    """No output is the input, or another output; a later run overwrites none."""
    mel = demo_taps["mel"].clone()
    taps = demo_tapped(mel)
    answers = stages_engine({**demo_taps, "mel": mel}, demo_checkpoint.encoder_tensors())
    kept = {name: x.clone() for name, x in taps.items()}
    for found in (taps, answers):
        addresses = {x.data_ptr() for x in found.values()}
        assert len(addresses) == len(found)
        assert not addresses & {mel.data_ptr(), *(x.data_ptr() for x in demo_taps.values())}
    mel.zero_()
    demo_tapped(noise_mel())
    assert not changed(taps, kept)


def test_the_engines_refuse_other_input(demo_checkpoint, demo_tapped, stages_engine, demo_taps):
    tensors = demo_checkpoint.encoder_tensors()
    with pytest.raises(
        ValueError, match=r"mel has shape \(1, 80, 2999\), expected \(batch, 80, 30"
    ):
        demo_tapped(torch.zeros(1, 80, 2999))
    with pytest.raises(ValueError, match=r"mel is torch\.float64"):
        demo_tapped(demo_taps["mel"].double())

    def given(**other: Tensor) -> Taps:
        return {**demo_taps, **other}

    for reference, message in (
        ({k: v for k, v in demo_taps.items() if k != "conv2"}, "lacks the tap conv2"),
        (given(conv2=demo_taps["conv2"].mT), r"conv2 has shape \(1, 384, 1500\), expected"),
        (given(ln_post=demo_taps["ln_post"].half()), r"ln_post is torch\.float16"),
        (given(conv1=demo_taps["conv1"].repeat(2, 1, 1)), r"several batches: \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            stages_engine(reference, tensors)
    with pytest.raises(EngineError, match=r"encoder\.conv1\.bias: found \(80,\)"):
        stages_engine(demo_taps, {**tensors, "conv1.bias": torch.zeros(80)})


def test_each_kind_has_its_own_artifact_and_says_what_is_compiled(
    demo_checkpoint, monkeypatch, tmp_path, capsys
):
    dims, device = demo_checkpoint.dims, encoder.engine.select_device("cpu")
    ours = {kind: encoder.engine.KINDS[kind] for kind in ("encoder", "encoder-taps", "stages")}
    assert len({artifact_name(dims, device, kind) for kind in ours}) == 3

    def build(dims, device):
        raise RuntimeError("unplugged\nand more")

    kinds = {kind: Kind(build, known.what) for kind, known in ours.items()}
    monkeypatch.setattr(encoder.engine, "KINDS", kinds)
    monkeypatch.setenv("MAX_WHISPER_CACHE", str(tmp_path))
    for kind, known in kinds.items():
        with pytest.raises(EngineError, match=rf"^MAX cannot compile {known.what}: unplugged$"):
            encoder.engine.compiled_encoder(dims, device, kind)
        assert f"Compiling {known.what} (4 layers of 384)" in capsys.readouterr().err
