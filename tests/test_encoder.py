"""The MAX encoder is the stock encoder: numbers, kernels, buffers; and it is ours that ran."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SAMPLES, first_window, sample_rows
from max.dtype import DType
from max.graph import DeviceRef, Graph

import encoder.engine
import encoder.graph
from encoder.engine import Engine, EngineError
from validation.metrics import max_abs, relative_l2
from validation.numbers import compare, noise_mel, random_mel, silence_mel
from validation.reference import run_eager, stock_encoder
from weights import Checkpoint

# On the real tiny.en encoder with speech: see docs/numbers-tiny.en.json.
RELATIVE_L2 = 1e-5
MAX_ABS = 2e-4


def assert_same(
    ours: torch.Tensor, checkpoint: Checkpoint, mel: torch.Tensor, noise: tuple[int, ...] = ()
) -> None:
    """Every window, whole and at its edge frames alone, is within the limits of the stock output.

    `noise` names the windows of noise from audio on which tiny.en misses MAX_ABS, and on some
    processors RELATIVE_L2: stock float32 is itself further than that from float64 at single
    elements there, or half as far in all, see docs/numbers.md. The difference may be four times
    that distance, a factor chosen after seeing it.
    """
    assert ours.dtype == torch.float32
    for i, numbers in enumerate(compare(ours, checkpoint, mel)):
        limit, relative = MAX_ABS, RELATIVE_L2
        if i in noise:
            limit = max(limit, 4 * numbers.floor_max_abs)
            relative = max(relative, 4 * numbers.floor_relative_l2)
        assert numbers.max_abs <= limit
        assert numbers.edge_max_abs <= limit
        assert numbers.relative_l2 <= relative
        assert numbers.first_frames_relative_l2 <= RELATIVE_L2
        assert numbers.last_frames_relative_l2 <= RELATIVE_L2


def mel_of(what: str, speech: Path) -> torch.Tensor:
    """(1 or 3, 80, 3000): the inputs that each checkpoint is compared on."""
    if what == "batch of three":
        return torch.cat([first_window(speech), silence_mel(), noise_mel(2)])
    return {
        "speech": first_window(speech),
        "silence": silence_mel(),
        "noise": noise_mel(),
        "random mel": random_mel(),
    }[what]


INPUTS = pytest.mark.parametrize(
    "what", ["speech", "silence", "noise", "random mel", "batch of three"]
)
NOISE = {"noise": (0,), "batch of three": (2,)}


@INPUTS
def test_real_encoder_is_the_same_function(real_checkpoint, real_engine, jfk, what):
    mel = mel_of(what, jfk)
    assert_same(real_engine(mel), real_checkpoint, mel, NOISE.get(what, ()))


def test_real_encoder_on_speech_needs_no_exception(real_checkpoint, real_engine, jfk):
    """The limits as they stand, and the stock encoder's fused attention within them too."""
    mel = first_window(jfk)
    stock = stock_encoder(real_checkpoint)
    with torch.no_grad():
        for expected in (run_eager(stock, mel), stock(mel)):
            assert relative_l2(real_engine(mel), expected) <= RELATIVE_L2
            assert max_abs(real_engine(mel), expected) <= MAX_ABS


@INPUTS
def test_demo_encoder_is_the_same_function(demo_checkpoint, demo_engine, what):
    mel = mel_of(what, SAMPLES / "demo.flac")
    assert_same(demo_engine(mel), demo_checkpoint, mel)


def test_demo_encoder_on_every_sample(demo_checkpoint, demo_engine):
    for row in sample_rows():
        mel = first_window(SAMPLES / row["file"])
        assert_same(demo_engine(mel), demo_checkpoint, mel)


def test_a_batch_is_its_windows(demo_engine):
    """Row by row the batch gives what the window alone gives, to float32's noise."""
    mel = torch.cat([first_window(SAMPLES / "demo.flac"), noise_mel(3)])
    batch = demo_engine(mel)
    for row, window in zip(batch, mel, strict=True):
        assert relative_l2(row, demo_engine(window[None])[0]) <= 1e-6


def test_products_and_attention_are_the_operations_in_mojo(demo_checkpoint, demo_engine):
    """All of them, none of MAX's beside them; what follows a product is fused into it."""
    layers, ours = demo_checkpoint.dims.n_audio_layer, "custom__max_whisper."
    for name, count in (("conv1d", 2), ("linear", 6 * layers), ("qkv_attention", layers)):
        assert len([k for k in demo_engine.kernels if f"{ours}{name}" in k]) == count, name
    for name in ("matmul", "flash_attention", "softmax", "mo.gelu", "mo.erf"):
        assert not [k for k in demo_engine.kernels if name in k], name
    gelu = [k for k in demo_engine.kernels if "mo.div" in k]  # its quotient, the only one
    assert len(gelu) == 2 + layers
    assert all(ours in k for k in gelu)


def perturbed(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint with one element of one tensor changed by 0.5."""
    tensor = checkpoint.tensors[name].clone()
    tensor.view(-1)[0] += 0.5
    return replace(checkpoint, tensors={**checkpoint.tensors, name: tensor})


@pytest.mark.parametrize(
    "name",
    [
        "encoder.conv1.weight",
        "encoder.positional_embedding",
        "encoder.blocks.0.attn.key.weight",
        "encoder.blocks.3.mlp.2.bias",
        "encoder.ln_post.weight",
    ],
)
def test_our_code_ran(demo_checkpoint, demo_engine, name):
    """One weight perturbed in what is bound to MAX: the output changes, as the reference's does."""
    mel = first_window(SAMPLES / "demo.flac")
    other = perturbed(demo_checkpoint, name)
    changed = Engine(other, "cpu")(mel)
    assert relative_l2(changed, demo_engine(mel)) > 2 * RELATIVE_L2
    assert_same(changed, other, mel)


def test_a_later_call_does_not_overwrite_an_earlier_result(demo_engine):
    first = demo_engine(first_window(SAMPLES / "demo.flac"))
    kept = first.clone()
    for seed in range(3):
        demo_engine(noise_mel(seed))
    assert torch.equal(first, kept)
    first.zero_()  # the caller's memory: writing to it changes no later result
    assert torch.equal(demo_engine(first_window(SAMPLES / "demo.flac")), kept)
    assert first.abs().max() == 0


def test_two_engines_keep_their_own_weights(demo_checkpoint, demo_engine):
    mel = noise_mel()
    before = demo_engine(mel)
    other = Engine(perturbed(demo_checkpoint, "encoder.ln_post.bias"), "cpu")
    assert not torch.equal(other(mel), before)
    assert torch.equal(demo_engine(mel), before)


def test_input_is_read_without_change_and_need_not_be_contiguous(demo_engine):
    mel = noise_mel()
    transposed = mel.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    assert not transposed.is_contiguous()
    kept = mel.clone()
    assert torch.equal(demo_engine(transposed), demo_engine(mel))
    assert torch.equal(mel, kept)


@pytest.mark.parametrize(
    "mel",
    [
        torch.zeros(1, 80, 2999),
        torch.zeros(1, 128, 3000),
        torch.zeros(80, 3000),
        torch.zeros(0, 80, 3000),
        torch.zeros(1, 80, 3000, dtype=torch.float16),
    ],
    ids=lambda m: f"{tuple(m.shape)} {m.dtype}",
)
def test_the_engine_refuses_other_input(demo_engine, mel):
    with pytest.raises(ValueError, match="expected"):
        demo_engine(mel)


def test_weights_are_checked_by_name_and_shape(demo_checkpoint):
    """MAX does not check what is bound to an artifact read from a file; the engine does."""
    tensors = dict(demo_checkpoint.tensors)
    del tensors["encoder.ln_post.bias"]
    with pytest.raises(EngineError, match=r"encoder\.ln_post\.bias: found nothing"):
        Engine(replace(demo_checkpoint, tensors=tensors), "cpu")
    wrong = {**demo_checkpoint.tensors, "encoder.conv2.bias": torch.zeros(80)}
    with pytest.raises(EngineError, match=r"conv2\.bias: found \(80,\), .* expects \(384,\)"):
        Engine(replace(demo_checkpoint, tensors=wrong), "cpu")


def test_unknown_device(demo_checkpoint):
    with pytest.raises(EngineError, match="device is 'tpu'"):
        Engine(demo_checkpoint, "tpu")


@pytest.mark.skipif(encoder.engine.accelerator_count() > 0, reason="MAX sees an accelerator here")
def test_gpu_without_one_is_an_error(demo_checkpoint):
    with pytest.raises(EngineError, match="MAX sees none"):
        Engine(demo_checkpoint, "gpu")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="timer slack is Linux's")
def test_threads_of_an_execution_sleep_long_and_its_caller_as_before():
    libc, found = ctypes.CDLL(None), []
    before = libc.prctl(encoder.engine.GET_TIMER_SLACK)

    def ask() -> None:
        found.append(libc.prctl(encoder.engine.GET_TIMER_SLACK))

    thread = threading.Thread(target=ask)
    with encoder.engine.calm():
        thread.start()
        thread.join()
    assert found == [encoder.engine.TIMER_SLACK] != [before]
    assert libc.prctl(encoder.engine.GET_TIMER_SLACK) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_no_thread_of_a_process_that_waits_keeps_waking():
    """MAX starts one with the first execution; it would wake some thousand times in this time."""
    program = (
        "import time, torch, weights, pathlib, contextlib\n"
        "from encoder.engine import Engine\n"
        "Engine(weights.load('demo', offline=True))(torch.zeros(1, 80, 3000))\n"
        "def wakes():\n"
        "    found = {}\n"
        "    for task in pathlib.Path('/proc/self/task').iterdir():\n"
        "        with contextlib.suppress(OSError):  # it has just ended\n"
        "            for line in (task / 'status').read_text().splitlines():\n"
        "                if line.startswith('voluntary'):\n"
        "                    found[task.name] = int(line.split()[1])\n"
        "    return found\n"
        "time.sleep(1)\n"
        "before = wakes(); time.sleep(1); after = wakes()\n"
        "print(max(after[name] - before.get(name, 0) for name in after))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=1200
    )
    assert int(ran.stdout.splitlines()[-1]) < 500


@pytest.mark.parametrize("dtype", [DType.float16, DType.bfloat16], ids=str)
def test_another_dtype_is_between_float32_and_float32(demo_checkpoint, dtype):
    """mel and features are float32, every tap between is of `dtype`, and so are the tensors that
    products read, as they are bound; biases, norms and positions are bound in float32."""
    found: dict[str, DType] = {}

    def tap(name, x):
        found[name] = x.dtype
        return x

    dims, cpu = demo_checkpoint.dims, DeviceRef.CPU()
    weight = encoder.graph.external_weights(encoder.graph.encoder_shapes(dims), cpu, dtype)
    with Graph("dtypes", input_types=[encoder.graph.mel_type(dims, cpu)]) as graph:
        encoder.graph.encoder(graph.inputs[0].tensor, weight, dims, tap, dtype)
        kept = {name: weight(name).dtype for name in encoder.graph.encoder_shapes(dims)}
    assert found.pop("mel") == DType.float32
    assert set(found.values()) == {dtype}
    assert {name for name, of in kept.items() if of == dtype} == {
        name
        for name, tensor in demo_checkpoint.encoder_tensors().items()
        if tensor.ndim > 1 and name != "positional_embedding"
    }
    (features,) = encoder.graph.build(dims, cpu, dtype).output_types
    assert features.dtype == DType.float32


def test_one_artifact_serves_every_checkpoint_of_the_same_encoder(demo_checkpoint):
    """The decoder's sizes and the weights are no part of the name; the encoder's sizes are."""
    device = encoder.engine.select_device("cpu")
    dims = demo_checkpoint.dims
    name = encoder.engine.artifact_name(dims, device)
    tiny = replace(dims, n_text_layer=4, n_vocab=51865)
    assert encoder.engine.artifact_name(tiny, device) == name
    for other in (replace(dims, n_mels=128), replace(dims, n_audio_layer=6)):
        assert encoder.engine.artifact_name(other, device) != name


def test_a_damaged_artifact_is_not_read(demo_engine, demo_checkpoint, tmp_path):
    device = encoder.engine.select_device("cpu")
    name = encoder.engine.artifact_name(demo_checkpoint.dims, device)
    kept = encoder.engine.artifact_folder() / name
    copy = tmp_path / name
    assert encoder.engine.read_artifact(copy) is None  # nothing there
    copy.write_bytes(kept.read_bytes())
    copy.with_suffix(".sha256").write_text(kept.with_suffix(".sha256").read_text())
    assert encoder.engine.read_artifact(copy) is not None
    copy.write_bytes(kept.read_bytes()[:-100])
    assert encoder.engine.read_artifact(copy) is None


def test_progress_says_why_and_how_long(capsys):
    with encoder.engine.progress("It takes minutes.", "compiling"):
        pass
    assert capsys.readouterr().err == "It takes minutes.\ncompiling: 0 s\n"


def test_progress_on_a_terminal_is_one_short_live_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    threads = SimpleNamespace(Thread=threading.Thread, Event=lambda: Ticks(3))
    monkeypatch.setattr(encoder.engine, "threading", threads)
    with encoder.engine.progress("It takes minutes.", "compiling"):
        pass
    reason, *lines = re.split(r"[\r\n]", capsys.readouterr().err)
    assert reason == "It takes minutes."
    assert lines == ["compiling: 0 s"] * 4 + [""]


class Ticks:
    """An event that is not set for the first `count` waits, whatever the time."""

    def __init__(self, count: int):
        self.left = count

    def wait(self, seconds: float) -> bool:
        assert seconds == 1
        self.left -= 1
        return self.left < 0

    def set(self) -> None:
        pass


class FakeCompiled:
    """What the compiler returns, as far as the artifact folder sees it."""

    def __init__(self, content: bytes):
        self.content = content

    def export_mef(self, path: Path) -> None:
        Path(path).write_bytes(self.content)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An artifact folder of its own; nothing is compiled, what is compiled is counted."""
    compiled = []

    def compile_encoder(dims, device, kind):
        compiled.append(dims)
        return FakeCompiled(b"artifact %d" % len(compiled))

    monkeypatch.setenv("MAX_WHISPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoder.engine, "compile_encoder", compile_encoder)
    monkeypatch.setattr(encoder.engine, "read", lambda path: FakeCompiled(path.read_bytes()))
    return compiled


def kept(demo_checkpoint: Checkpoint) -> FakeCompiled:
    device = encoder.engine.select_device("cpu")
    return encoder.engine.compiled_encoder(demo_checkpoint.dims, device)


def test_it_compiles_once(demo_checkpoint, cache, tmp_path):
    assert kept(demo_checkpoint).content == b"artifact 1"
    assert kept(demo_checkpoint).content == b"artifact 1"
    assert len(cache) == 1
    suffixes = {p.suffix for p in (tmp_path / "cache").iterdir()}
    assert suffixes == {".mef", ".sha256", ".lock"}  # nothing temporary is left


def test_a_damaged_artifact_is_compiled_again(demo_checkpoint, cache, tmp_path, capsys):
    kept(demo_checkpoint)
    (artifact,) = (tmp_path / "cache").glob("*.mef")
    artifact.write_bytes(b"artif")
    assert kept(demo_checkpoint).content == b"artifact 2"
    assert capsys.readouterr().err == f"{artifact} is damaged and will be compiled again\n"
    assert kept(demo_checkpoint).content == b"artifact 2"
    assert len(cache) == 2


def test_a_failed_write_leaves_no_artifact(demo_checkpoint, cache, tmp_path, monkeypatch):
    def export_mef(self, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("no space left\nand more")

    monkeypatch.setattr(FakeCompiled, "export_mef", export_mef)
    with pytest.raises(EngineError, match=r"MAX cannot write .*: no space left$"):
        kept(demo_checkpoint)
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".lock"}


def test_a_second_process_waits_and_does_not_compile(demo_checkpoint, cache, monkeypatch, capsys):
    """Two threads with their own file locks stand for two processes."""
    compiling, go = threading.Event(), threading.Event()
    once = encoder.engine.compile_encoder

    def slowly(dims, device, kind):
        compiling.set()
        assert go.wait(30)
        return once(dims, device, kind)

    monkeypatch.setattr(encoder.engine, "compile_encoder", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kept, demo_checkpoint)
        assert compiling.wait(30)
        second = pool.submit(kept, demo_checkpoint)
        for _ in range(300):
            if "Another process is compiling" in (said := capsys.readouterr().err):
                break
            time.sleep(0.1)
        go.set()
        assert first.result(30).content == second.result(30).content == b"artifact 1"
    assert "Another process is compiling" in said
    assert len(cache) == 1


def test_a_cache_that_cannot_be_written_is_one_sentence(demo_checkpoint, cache, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(
        EngineError, match=r"cannot keep the compiled encoder in .*MAX_WHISPER_CACHE"
    ):
        kept(demo_checkpoint)


def test_what_max_raises_is_an_engine_error(demo_checkpoint, demo_engine, monkeypatch):
    def execute(*_):
        raise RuntimeError("out of memory\nstack")

    monkeypatch.setattr(demo_engine, "_model", type("Model", (), {"execute": execute})())
    with pytest.raises(EngineError, match=r"MAX cannot run the encoder: out of memory$"):
        demo_engine(noise_mel())
