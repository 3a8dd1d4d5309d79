"""Candidates: everyone's taps in one form, one sentence where that cannot be, no substitutes."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLES, first_window
from safetensors.torch import save_file
from torch import Tensor, nn

import encoder.engine
from validation.candidates import (
    CandidateError,
    FileCandidate,
    MaxCandidate,
    OnnxCandidate,
    ran,
    resolve,
)
from validation.metrics import relative_l2
from validation.numbers import noise_mel
from validation.reference import Reference, Taps, stock_encoder
from validation.stages import stages
from weights import Checkpoint

SAME = 1e-5  # relative L2 of any tap of any float32 candidate, see test_taps.py


@pytest.fixture(scope="module")
def mel() -> Tensor:
    return first_window(SAMPLES / "demo.flac")


@pytest.fixture(scope="module")
def reference(demo_checkpoint: Checkpoint, mel: Tensor) -> Taps:
    return Reference(demo_checkpoint).taps(mel)


def assert_same(found: Taps, reference: Taps) -> None:
    worst = {name: relative_l2(x, reference[name]) for name, x in found.items()}
    assert max(worst.values()) <= SAME, worst


@pytest.mark.parametrize(
    "spec",
    ["", "tensorflow", "npz", "npz:", "onnx:", "module:", "max:x", "module:json", "module::f"],
)
def test_unknown_candidates(demo_checkpoint, spec):
    with pytest.raises(
        CandidateError, match=rf"^candidate is '{spec}', expected .*module:PACKAGE:"
    ):
        resolve(spec, demo_checkpoint)


# max


@pytest.fixture(scope="module")
def ours(demo_checkpoint: Checkpoint) -> MaxCandidate:
    candidate = resolve("max", demo_checkpoint, "cpu")
    assert isinstance(candidate, MaxCandidate)
    return candidate


def test_max_is_the_graphs_of_this_package(ours, demo_engine, reference, mel):
    assert ours.name == "max"
    taps = ours.taps(mel)
    assert list(taps) == list(reference)
    assert_same(taps, reference)
    assert_same(ours.injected(reference), reference)
    assert torch.equal(ours.features(mel), demo_engine(mel))


def test_max_is_never_replaced(demo_checkpoint, mel, monkeypatch):
    """Where MAX cannot run there is no result."""

    def broken(*_):
        raise encoder.engine.EngineError("MAX cannot run: unplugged")

    monkeypatch.setattr(encoder.engine, "compiled_encoder", broken)
    candidate = resolve("max", demo_checkpoint)
    for ask in (candidate.taps, candidate.features):
        with pytest.raises(encoder.engine.EngineError, match="unplugged"):
            ask(mel)


def test_proof_that_max_ran(ours, demo_checkpoint, mel):
    proof = ran(ours, mel, ours.features(mel))
    layers = demo_checkpoint.dims.n_audio_layer
    assert proof["kernels"]["max_whisper.qkv_attention"] == layers
    assert proof["kernels"]["max_whisper.linear"] == 6 * layers
    assert proof["kernels"]["max_whisper.conv1d"] == 2
    assert proof["kernels"]["matmul"] == proof["kernels"]["softmax"] == 0
    assert proof["kernels"]["layer_norm"] == 2 * layers + 1
    assert (proof["kernels"]["mo.div"], proof["kernels"]["gelu"]) == (2 + layers, 0)  # our GELU
    assert proof["perturbed"] == "blocks.0.mlp.0.bias"
    assert proof["output_changed_by"] > 1e-3  # what the reference's output changes by
    tensors = {**demo_checkpoint.tensors}
    tensors["encoder.blocks.0.mlp.0.bias"] = tensors["encoder.blocks.0.mlp.0.bias"] + 0.5
    stock = stock_encoder(demo_checkpoint)
    other = stock_encoder(replace(demo_checkpoint, tensors=tensors))
    with torch.no_grad():
        expected = relative_l2(other(mel), stock(mel))
    assert proof["output_changed_by"] == pytest.approx(expected, rel=1e-3)


def test_an_engine_that_did_not_use_its_weights_would_be_seen(ours, mel, demo_engine, monkeypatch):
    """The proof is 0 where the output does not depend on what was bound."""
    monkeypatch.setattr("validation.candidates.Engine", lambda checkpoint, device: demo_engine)
    assert ran(ours, mel, demo_engine(mel))["output_changed_by"] == 0


def test_other_weights_for_the_candidate(demo_checkpoint, reference, stages_engine):
    """The candidate has the checkpoint's weights that it was given: one stage differs, alone."""
    tensors = {**demo_checkpoint.tensors}
    tensors["encoder.blocks.2.attn.out.bias"] = tensors["encoder.blocks.2.attn.out.bias"] * 0
    damaged = replace(demo_checkpoint, tensors=tensors)
    for spec in ("max", "torch"):
        found = resolve(spec, damaged, "cpu").injected(reference)
        far = {n for n, x in found.items() if relative_l2(x, reference[n]) > SAME}
        assert far == {"blocks.2.attn.out"}


# torch


def test_torch_is_stock_in_fused_attention(demo_checkpoint, reference, mel):
    candidate = resolve("torch", demo_checkpoint)
    taps = candidate.taps(mel)
    assert list(taps) == list(reference)
    assert_same(taps, reference)
    attention = "blocks.0.attn.qkv_attention"
    assert not torch.equal(taps[attention], reference[attention])  # written out in the reference
    assert torch.equal(candidate.features(mel), taps["ln_post"])


def test_every_stage_of_torch_is_fed_the_reference_s_inputs(demo_checkpoint, reference):
    """A wrong input changes what reads it, and nothing else."""
    candidate = resolve("torch", demo_checkpoint)
    answers = candidate.injected(reference)
    assert list(answers) == list(reference)
    assert_same(answers, reference)
    for name in ("conv1.gelu", "blocks.1.attn.value"):
        found = candidate.injected({**reference, name: reference[name].flip(-1)})
        changed = {n for n in answers if not torch.equal(found[n], answers[n])}
        assert changed == {s.name for s in stages(demo_checkpoint.dims) if name in s.inputs}


@pytest.mark.parametrize("spec", ["torch", "npz:x.npz"])
def test_no_proof_for_others(spec, demo_checkpoint, reference, mel, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **{name: x.numpy() for name, x in reference.items()})
    candidate = resolve(spec, demo_checkpoint)
    proof = ran(candidate, mel, candidate.features(mel))
    assert proof == {"kernels": None, "perturbed": None, "output_changed_by": None}


# npz


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("batch", [True, False], ids=["with batch", "without batch"])
def test_taps_from_a_file(demo_checkpoint, reference, mel, tmp_path, suffix, batch):
    path = tmp_path / f"taps.{suffix}"
    taps = {name: x if batch else x[0] for name, x in reversed(reference.items())}
    if suffix == "npz":
        np.savez(path, **{name: x.numpy() for name, x in taps.items()})
    else:
        save_file(taps, path)
    candidate = resolve(f"npz:{path}", demo_checkpoint)
    assert candidate.name == f"npz:{path}"
    found = candidate.taps(mel)
    assert list(found) == list(reference)  # in the order of computation, mel too
    assert all(torch.equal(found[name], reference[name]) for name in reference)
    assert torch.equal(candidate.features(mel), reference["ln_post"])
    assert candidate.injected(reference) is None


def test_some_taps_in_half_precision_with_nan(demo_checkpoint, reference, mel, tmp_path):
    x = reference["conv2"].half()
    x[0, 3, 4] = torch.nan
    np.savez(tmp_path / "a.npz", conv2=x.numpy())
    candidate = resolve(f"npz:{tmp_path / 'a.npz'}", demo_checkpoint)
    assert candidate.features(mel) is None  # there is no ln_post, and nobody makes one
    (found,) = candidate.taps(mel).values()
    assert found.dtype == torch.float16
    assert torch.equal(found.isnan(), x.isnan())


def test_several_windows_are_told_apart_by_their_mel(demo_checkpoint, reference, mel, tmp_path):
    other = Reference(demo_checkpoint).taps(noise_mel(5))
    both = {n: torch.cat([other[n], reference[n]]) for n in ("mel", "ln_post")}
    save_file(both, tmp_path / "two.safetensors")
    candidate = resolve(f"npz:{tmp_path / 'two.safetensors'}", demo_checkpoint)
    for taps in (reference, other):
        found = candidate.taps(taps["mel"])
        assert torch.equal(found["ln_post"], taps["ln_post"])
        assert torch.equal(found["mel"], taps["mel"])
    del both["mel"]
    save_file(both, tmp_path / "two.safetensors")
    with pytest.raises(CandidateError, match=r"^two\.safetensors holds 2 windows and no mel"):
        resolve(f"npz:{tmp_path / 'two.safetensors'}", demo_checkpoint)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "gives no tap"),
        (
            {"blocks.0.attn.querry": (1, 1500, 384)},
            r"is no tap; did you mean blocks.0.attn.query, ",
        ),
        ({"x": (1,)}, r"'x' is no tap; taps are mel, conv1 ... ln_post"),
        (
            {"conv1": (1, 384, 3000)},
            r"conv1 has shape \(1, 384, 3000\), expected \(1 or more, 3000, 384\)",
        ),
        ({"mel": (3000, 80)}, r"mel has shape \(3000, 80\), expected \(1 or more, 80, 3000\)"),
        ({"ln_post": (1, 1, 1500, 384)}, r"ln_post has shape \(1, 1, 1500, 384\), expected"),
        ({"ln_post": (0, 1500, 384)}, r"ln_post has shape \(0, 1500, 384\), expected"),
        ({"conv2": (2, 1500, 384), "mel": (1, 80, 3000)}, r"different numbers of windows: .*: 2"),
    ],
    ids=str,
)
def test_a_file_of_something_else(demo_checkpoint, tmp_path, arrays, message):
    path = tmp_path / "taps.npz"
    np.savez(path, **{name: np.zeros(shape, np.float32) for name, shape in arrays.items()})
    with pytest.raises(CandidateError, match=rf"^taps\.npz:? .*{message}") as caught:
        resolve(f"npz:{path}", demo_checkpoint)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_no_taps(demo_checkpoint, tmp_path):
    np.savez(tmp_path / "a.npz", ln_post=np.zeros((1500, 384), np.int16))
    with pytest.raises(CandidateError, match=r"ln_post holds torch\.int16, expected floating"):
        resolve(f"npz:{tmp_path / 'a.npz'}", demo_checkpoint)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.npy", "pickled.npz", "half.npz"])
def test_a_file_that_cannot_be_read(demo_checkpoint, tmp_path, name):
    path = tmp_path / name
    if name == "pickled.npz":
        np.savez(path, ln_post=np.array([{}], dtype=object))
    elif name == "half.npz":
        np.savez(path, ln_post=np.zeros((1500, 384), np.float32))
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        path.write_bytes(b"these are no taps")
    with pytest.raises(CandidateError, match=re.escape(str(path))) as caught:
        resolve(f"npz:{path}", demo_checkpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(CandidateError, match=r"missing\.npz: No such file"):
        FileCandidate("", tmp_path / "missing.npz", demo_checkpoint.dims)


# module


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """write_module(text) -> the spec of its function `make`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str, factory: str = "make") -> str:
        (tmp_path / "their_port.py").write_text(text)
        sys.modules.pop("their_port", None)
        return f"module:their_port:{factory}"

    yield write
    sys.modules.pop("their_port", None)


STOCK = "from validation.reference import stock_encoder\n"


def test_a_function_that_gives_features(demo_checkpoint, reference, mel, write_module):
    """It gets a copy of the mel: what it does to it does not reach the reference."""
    spec = write_module(
        STOCK
        + "def make(checkpoint):\n"
        + "    module = stock_encoder(checkpoint)\n"
        + "    def run(mel):\n"
        + "        y = module(mel)\n"
        + "        mel.zero_()\n"
        + "        return y\n"
        + "    return run\n"
    )
    candidate = resolve(spec, demo_checkpoint)
    kept = mel.clone()
    found = candidate.taps(mel)
    assert torch.equal(mel, kept)
    assert list(found) == ["ln_post"]
    assert_same(found, reference)
    assert torch.equal(candidate.features(mel), found["ln_post"])
    assert candidate.injected(reference) is None


def test_a_function_that_gives_taps(demo_checkpoint, reference, mel, write_module):
    spec = write_module(
        "import torch\n"
        "def make(checkpoint):\n"
        "    return lambda mel: {'conv2': torch.ones(1500, 384), 'mel': mel}\n"
    )
    candidate = resolve(spec, demo_checkpoint)
    found = candidate.taps(mel)
    assert list(found) == ["mel", "conv2"]
    assert torch.equal(found["mel"], mel)
    assert torch.equal(found["conv2"], torch.ones(1, 1500, 384))
    assert candidate.features(mel) is None


def test_a_module_with_openai_s_names_is_looked_into(demo_checkpoint, reference, mel, write_module):
    """Every tap that hooks can see, from the run itself; `ln_post` is what the module returns."""
    text = STOCK + "def make(checkpoint):\n    return stock_encoder(checkpoint)\n"
    candidate = resolve(write_module(text), demo_checkpoint)
    found = candidate.taps(mel)
    assert list(found) == [name for name in reference if name != "conv2.gelu"]
    assert_same(found, reference)
    rescaled = STOCK + (
        "from whisper.model import AudioEncoder\n"
        "class Rescaled(AudioEncoder):\n"
        "    def forward(self, mel):\n"
        "        return 2 * super().forward(mel)\n"
        "def make(checkpoint):\n"
        "    module = stock_encoder(checkpoint)\n"
        "    module.__class__ = Rescaled\n"
        "    return module\n"
    )
    found = resolve(write_module(rescaled), demo_checkpoint).taps(mel)
    assert relative_l2(found["blocks.3"], reference["blocks.3"]) <= SAME
    assert relative_l2(found["ln_post"], 2 * reference["ln_post"]) <= SAME


def test_hooks_are_removed_and_see_the_first_run(demo_checkpoint, reference, mel, write_module):
    """A block that runs twice (a real port's fault) is seen at its first run; what comes after the
    tap in place does not change it; the production path runs without hooks."""
    text = STOCK + (
        "from torch.nn import ModuleList\n"
        "def make(checkpoint):\n"
        "    module = stock_encoder(checkpoint)\n"
        "    module.conv1.register_forward_hook(lambda part, x, y: None)\n"
        "    run = module.blocks[1].forward\n"
        "    module.blocks[1].forward = lambda x: run(run(x))\n"
        "    make.module = module\n"
        "    return module\n"
    )
    candidate = resolve(write_module(text), demo_checkpoint)
    found = candidate.taps(mel)
    assert relative_l2(found["blocks.1.mlp.2"], reference["blocks.1.mlp.2"]) <= SAME
    assert relative_l2(found["blocks.1"], reference["blocks.1"]) > 1e-2
    module: nn.Module = sys.modules["their_port"].make.module
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    assert left == 1  # its own


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"raised AttributeError: module 'their_port' has no attribute 'make'$"),
        ("def make(:", r"raised SyntaxError: .*"),
        (
            "import no_such_module",
            r"ModuleNotFoundError: .*no_such_module' \(their_port.py, line 1\)",
        ),
        ("def make(c):\n    return c.nothing", r"AttributeError: .* \(their_port.py, line 2\)$"),
        ("def make(c): return 3", r"returned int, expected a function of mel$"),
    ],
)
def test_a_module_that_cannot_be_made(demo_checkpoint, write_module, text, message):
    with pytest.raises(
        CandidateError, match=rf"^module:their_port:make {'.*' + message}"
    ) as caught:
        resolve(write_module(text), demo_checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("None", "ln_post is NoneType, expected a torch.Tensor"),
        ("{'conv1': 3}", "conv1 is int, expected a torch.Tensor"),
        ("{}", "gives no tap"),
        ("m[:, :, :5]", r"ln_post has shape \(1, 80, 5\), expected \(1, 1500, 384\)"),
        ("m.view(7)", r"raised RuntimeError: .* \(their_port.py, line 1\)"),
        ("{'ln_post': __import__('torch').zeros(2, 1500, 384)}", r"ln_post has shape \(2, 1500"),
    ],
)
def test_a_module_that_gives_something_else(demo_checkpoint, mel, write_module, body, message):
    candidate = resolve(write_module(f"def make(c): return lambda m: {body}"), demo_checkpoint)
    with pytest.raises(CandidateError, match=rf"^module:their_port:make:? {message}") as caught:
        candidate.taps(mel)
    assert "\n" not in str(caught.value)


def test_a_package_that_is_not_there(demo_checkpoint):
    with pytest.raises(
        CandidateError, match=r"ModuleNotFoundError: No module named 'no_such_pack'"
    ):
        resolve("module:no_such_pack:make", demo_checkpoint)


# onnx


@pytest.fixture(scope="module")
def exported(demo_checkpoint: Checkpoint, mel: Tensor, tmp_path_factory) -> Path:
    """The stock encoder as `torch.onnx` exports it."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: extra peers")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: extra peers")
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    module = stock_encoder(demo_checkpoint)
    torch.onnx.export(module, (mel,), path, input_names=["mel"], output_names=["y"], dynamo=True)
    return path


def test_an_onnx_export_of_the_stock_encoder(demo_checkpoint, exported, reference, mel):
    candidate = resolve(f"onnx:{exported}", demo_checkpoint)
    found = candidate.taps(mel)
    assert list(found) == ["ln_post"]
    assert_same(found, reference)
    assert not torch.equal(found["ln_post"], reference["ln_post"])  # another engine computed it
    assert torch.equal(candidate.features(mel), found["ln_post"])
    assert candidate.injected(reference) is None


def onnx_model(path: Path, inputs: list[str], outputs: list[str], shape: list[int]) -> Path:
    """A model whose outputs are its first input, of that shape."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: extra peers")
    kind = onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [inputs[0]], [name]) for name in outputs],
        "identity",
        [value(name, kind, shape) for name in inputs],
        [value(name, kind, shape) for name in outputs],
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return path


def test_named_outputs_are_taps(demo_checkpoint, mel, tmp_path):
    path = onnx_model(tmp_path / "a.onnx", ["audio"], ["mel"], [1, 80, 3000])
    candidate = resolve(f"onnx:{path}", demo_checkpoint)
    found = candidate.taps(mel)
    assert list(found) == ["mel"]
    assert torch.equal(found["mel"], mel)
    assert candidate.features(mel) is None


@pytest.mark.parametrize(
    ("inputs", "outputs", "shape", "message"),
    [
        (["a", "b"], ["y"], [1, 80, 3000], r"^a\.onnx takes 2 inputs \(a, b\), expected one, mel$"),
        (["a"], ["y"], [1, 80, 3000], r"^a\.onnx: ln_post has shape \(1, 80, 3000\), expected"),
        (["a"], ["mel", "y"], [1, 80, 3000], r"^a\.onnx: 'y' is no tap"),
        (["a"], ["mel"], [1, 128, 3000], r"^a\.onnx cannot be run on mel of shape \(1, 80, 3000\)"),
    ],
)
def test_an_onnx_model_of_something_else(
    demo_checkpoint, mel, tmp_path, inputs, outputs, shape, message
):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: extra peers")
    path = onnx_model(tmp_path / "a.onnx", inputs, outputs, shape)
    with pytest.raises(CandidateError, match=message) as caught:
        resolve(f"onnx:{path}", demo_checkpoint).taps(mel)
    assert "\n" not in str(caught.value)


def test_a_wrong_onnx_file(demo_checkpoint, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: extra peers")
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"this is no model")
    with pytest.raises(CandidateError, match=r"bad\.onnx cannot be loaded as ONNX: ") as caught:
        resolve(f"onnx:{path}", demo_checkpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(CandidateError, match=r"missing\.onnx: no such file$"):
        OnnxCandidate("", tmp_path / "missing.onnx", demo_checkpoint.dims)


def test_without_onnxruntime(demo_checkpoint, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # what is not installed
    with pytest.raises(CandidateError, match=r"needs onnxruntime, which is not installed.*`peers`"):
        resolve("onnx:a.onnx", demo_checkpoint)
