"""The operations in Mojo beside PyTorch: sizes at which tiles, blocks and panels do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, Module, TensorType
from torch import Tensor

from encoder import kernels
from encoder.engine import EngineError, compile_encoder, select_device
from encoder.graph import conv1d, linear, qkv_attention
from validation.metrics import relative_l2

FRAMES = (1, 2, 5, 6, 47, 48, 49, 97)  # tiles of 6 or 12 rows, blocks of 48
CHANNELS = (16, 32, 41, 48)  # panels of 16; 41 as of a vocabulary
SEQUENCES = (1, 7, 36, 37, 192, 193, 400)  # blocks of 36 queries and 192 keys
CPU = DeviceRef.CPU()
N_IN, N_HEAD = 24, 3


def f32(*shape: int | str) -> TensorType:
    return TensorType(DType.float32, shape, CPU)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """All graphs in one module, compiled once; their weights are inputs, the batch is any."""
    module, library = Module(), kernels.library(CPU)

    def graph(name: str, *types: TensorType) -> Graph:
        return Graph(name, input_types=types, module=module, kernel_library=library)

    x = f32("batch", "frames", N_IN)
    for out in CHANNELS:
        with graph(f"linear {out}", x, f32(out, N_IN), f32(out)) as g:
            g.output(linear(*(value.tensor for value in g.inputs)))
    with graph("linear of float16", x, TensorType(DType.float16, [41, N_IN], CPU)) as g:
        g.output(linear(*(value.tensor for value in g.inputs), None))
    for frames in FRAMES:
        for stride in (1, 2):
            if frames % stride == 0:
                types = f32("batch", frames, N_IN), f32(48, N_IN, 3), f32(48)
                with graph(f"conv1d {stride} {frames}", *types) as g:
                    g.output(conv1d(*(value.tensor for value in g.inputs), stride))
    for n_ctx in SEQUENCES:
        with graph(f"attention {n_ctx}", *[f32("batch", n_ctx, N_HEAD * 32)] * 3) as g:
            g.output(qkv_attention(*(value.tensor for value in g.inputs), N_HEAD))
    session = InferenceSession(devices=[select_device("cpu")])
    return session.init_all(session.compile(module, custom_extensions=[kernels.compiled()]))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model: Model, *inputs: Tensor) -> Tensor:
    assert any("custom__max_whisper." in kernel for kernel in model.kernel_summaries)
    return torch.from_dlpack(model.execute(*inputs)[0])


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", CHANNELS)
def test_linear(models, channels, batch, frames):
    x, w, b = random(batch, frames, N_IN), random(channels, N_IN, seed=1), random(channels, seed=2)
    found = run(models[f"linear {channels}"], x, w, b)
    assert relative_l2(found, F.linear(x.double(), w.double(), b.double())) <= 1e-6


@pytest.mark.parametrize("frames", FRAMES)
def test_float16_is_a_way_to_keep_weights(models, frames):
    """Each is made float32 as it is read: the sums are float32's."""
    x, w = random(1, frames, N_IN), random(41, N_IN, seed=1).half()
    found = run(models["linear of float16"], x, w)
    assert relative_l2(found, F.linear(x.double(), w.double())) <= 1e-6


@pytest.mark.parametrize(
    ("stride", "frames"), [(s, t) for s in (1, 2) for t in FRAMES if t % s == 0]
)
def test_conv1d(models, stride, frames):
    """Also where one output reads both edges, and where the last frame is an edge or is not."""
    x, w, b = random(3, frames, N_IN), random(48, N_IN, 3, seed=1), random(48, seed=2)
    found = run(models[f"conv1d {stride} {frames}"], x, w, b)
    y = F.conv1d(x.double().transpose(1, 2), w.double(), b.double(), stride, 1)
    assert relative_l2(found, y.transpose(1, 2)) <= 1e-6


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], N_HEAD, -1).transpose(1, 2)


def expected_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wv = F.scaled_dot_product_attention(*(heads(x.double()) for x in (q, k, v)))
    return wv.transpose(1, 2).reshape(q.shape)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e-3])
@pytest.mark.parametrize("n_ctx", SEQUENCES)
def test_qkv_attention(models, n_ctx, size):
    """Scores of all sizes: with large ones a row is one key, with small ones all keys alike."""
    q, k, v = (random(2, n_ctx, N_HEAD * 32, seed=i) for i in range(3))
    found = run(models[f"attention {n_ctx}"], q * size, k, v)
    # a score of 30 * 30 * 32 / 32**0.5 is rounded by 3e-4 in float32, and so is its exponential
    assert relative_l2(found, expected_attention(q * size, k, v)) <= 1e-6 * max(1, size * 5)


def test_later_keys_may_score_higher_or_lower(models):
    """What earlier blocks of keys gave is made smaller as it must be, at 340 nats too; scores so
    large are rounded, by PyTorch as well."""
    n_ctx = 400
    q, v = torch.ones(1, n_ctx, N_HEAD * 32), random(1, n_ctx, N_HEAD * 32)
    for slope in (torch.linspace(-30, 30, n_ctx), torch.linspace(30, -30, n_ctx)):
        k = slope[None, :, None].expand(1, n_ctx, N_HEAD * 32).contiguous()
        found = run(models[f"attention {n_ctx}"], q, k, v)
        theirs = F.scaled_dot_product_attention(*map(heads, (q, k, v))).transpose(1, 2)
        expected = expected_attention(q, k, v)
        error = relative_l2(theirs.reshape(q.shape), expected)
        assert error > 1e-6
        assert relative_l2(found, expected) <= 4 * error


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(models, which, bad):
    """NaN is where PyTorch has NaN."""
    given = [random(1, 193, N_HEAD * 32, seed=i) for i in range(3)]
    given[which][0, 100, 40] = bad
    found = run(models["attention 193"], *given)
    assert torch.equal(found.isfinite(), expected_attention(*given).isfinite())


def test_a_graph_without_the_library_has_maxs_own(demo_checkpoint):
    """As on a GPU, and in another dtype: none of ours is asked for there."""
    assert kernels.library(CPU, DType.float16) is None
    assert kernels.library(DeviceRef.GPU()) is None
    types = [f32(1, 6, 32), f32(48, 32), f32(48)]
    with Graph("plain", input_types=types) as graph:
        graph.output(linear(*(value.tensor for value in graph.inputs)))
    assert "max_whisper" not in str(graph)
    with Graph("own", input_types=types, kernel_library=kernels.library(CPU)) as graph:
        graph.output(linear(*(value.tensor for value in graph.inputs)))
    assert "max_whisper.linear" in str(graph)


def test_source_that_does_not_compile_is_one_sentence(demo_checkpoint, monkeypatch, tmp_path):
    (tmp_path / "__init__.mojo").write_text("from .nothing import Nowhere\n")
    monkeypatch.setattr(kernels, "MOJO", tmp_path)
    for cached in (kernels.compiled, kernels._library):
        cached.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"Mojo cannot compile .*error:") as raised:
            compile_encoder(demo_checkpoint.dims, select_device("cpu"), "encoder")
    finally:
        for cached in (kernels.compiled, kernels._library):
            cached.cache_clear()
    assert "\n" not in str(raised.value)
