"""The operations in Mojo beside PyTorch: sizes at which tiles, blocks and panels do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, Module, TensorType, ops
from torch import Tensor

from encoder import kernels
from encoder.engine import EngineError, compile_encoder, select_device
from encoder.graph import conv1d, gelu, linear, qkv_attention
from validation.metrics import relative_l2

FRAMES = (1, 2, 5, 6, 47, 48, 49, 97)  # tiles of 6 or 12 rows, blocks of 48
CHANNELS = (16, 41, 48, 1000, 1609)  # panels of 16, one not whole as of a vocabulary; many tasks
SEQUENCES = (1, 7, 36, 37, 192, 193, 400)  # blocks of 36 queries and 192 keys
SIZES = (16, 48, 64)  # of a head
CPU = DeviceRef.CPU()
N_IN, N_HEAD = 24, 3


def f32(*shape: int | str) -> TensorType:
    return TensorType(DType.float32, shape, CPU)


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """All graphs in one module, compiled once; their weights are inputs, the batch is any."""
    module, library = Module(), kernels.operations(CPU)

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
            types = f32("batch", frames, N_IN), f32(48, N_IN, 3), f32(48)
            with graph(f"conv1d {stride} {frames}", *types) as g:
                g.output(conv1d(*(value.tensor for value in g.inputs), stride))
    for n_ctx in SEQUENCES:
        for size in SIZES:
            types = [f32("batch", n_ctx, N_HEAD * size)] * 3
            with graph(f"attention {n_ctx} {size}", *types) as g:
                g.output(qkv_attention(*(value.tensor for value in g.inputs), N_HEAD))
    with graph("gelu", f32("n")) as g:
        g.output(gelu(g.inputs[0].tensor))
    views = f32("batch", 2 * N_IN, 12), f32(2 * N_IN, 3 * N_IN)
    with graph("views", *views) as g:  # of which a product and an attention read a part
        x, w = (value.tensor for value in g.inputs)
        y = ops.permute(x, [0, 2, 1])[:, 2:11, N_IN:]
        y = linear(y, w[: 2 * N_IN, N_IN : 2 * N_IN], None)
        g.output(qkv_attention(*(y[:, :, 16 * i : 16 * i + 16] for i in range(3)), 1))
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


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_conv1d(models, stride, frames):
    """Also where one output reads both edges, and where the last frame is an edge or is not."""
    x, w, b = random(3, frames, N_IN), random(48, N_IN, 3, seed=1), random(48, seed=2)
    found = run(models[f"conv1d {stride} {frames}"], x, w, b)
    y = F.conv1d(x.double().transpose(1, 2), w.double(), b.double(), stride, 1)
    assert found.shape == y.transpose(1, 2).shape
    assert relative_l2(found, y.transpose(1, 2)) <= 1e-6


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], N_HEAD, -1).transpose(1, 2)


def expected_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wv = F.scaled_dot_product_attention(*(heads(x.double()) for x in (q, k, v)))
    return wv.transpose(1, 2).reshape(q.shape)


@pytest.mark.parametrize("factor", [1.0, 30.0, 1e-3])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_ctx", SEQUENCES)
def test_qkv_attention(models, n_ctx, size, factor):
    """Scores of all sizes: with large ones a row is one key, with small ones all keys alike."""
    q, k, v = (random(2, n_ctx, N_HEAD * size, seed=i) for i in range(3))
    found = run(models[f"attention {n_ctx} {size}"], q * factor, k, v)
    # large scores are rounded by more in float32, and so are their exponentials
    assert relative_l2(found, expected_attention(q * factor, k, v)) <= 1e-6 * max(1, factor * 5)


def test_later_keys_may_score_higher_or_lower(models):
    """What earlier blocks of keys gave is made smaller as it must be, at 480 nats too; scores so
    large are rounded, by PyTorch as well."""
    n_ctx, size = 400, 64
    q, v = torch.ones(1, n_ctx, N_HEAD * size), random(1, n_ctx, N_HEAD * size)
    for slope in (torch.linspace(-30, 30, n_ctx), torch.linspace(30, -30, n_ctx)):
        k = slope[None, :, None].expand(1, n_ctx, N_HEAD * size).contiguous()
        found = run(models[f"attention {n_ctx} {size}"], q, k, v)
        theirs = F.scaled_dot_product_attention(*map(heads, (q, k, v))).transpose(1, 2)
        expected = expected_attention(q, k, v)
        error = relative_l2(theirs.reshape(q.shape), expected)
        assert relative_l2(found, expected) <= min(4 * max(error, 1e-6), 2e-4)


def test_gelu_is_the_exact_one(models):
    x = torch.cat([torch.linspace(-9, 9, 1_000_003), torch.tensor([0.0, 1e-30, 1e4, 1e30, -1e30])])
    (answer,) = models["gelu"].execute(x)
    right = F.gelu(x.double())
    error = (torch.from_dlpack(answer).double() - right).abs()
    assert (error <= 1.1e-6 * x.abs().clamp(max=1).double() + 2.4e-7 * right.abs()).all()
    tanh = (F.gelu(x.double(), approximate="tanh") - right).abs().max()
    assert tanh > 100 * error[x.abs() < 9].max()  # that it would be told apart


def test_gelu_does_not_hide_nan(models):
    (answer,) = models["gelu"].execute(torch.tensor([float("nan"), float("inf")]))
    assert torch.from_dlpack(answer).tolist()[1] == float("inf")
    assert torch.from_dlpack(answer).isnan().tolist() == [True, False]


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(models, which, bad):
    """NaN is where PyTorch has NaN, infinite is what is infinite there."""
    given = [random(1, 193, N_HEAD * 64, seed=i) for i in range(3)]
    given[which][0, 100, 40] = bad
    found, expected = run(models["attention 193 64"], *given), expected_attention(*given)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_products_do_not_hide_nan(models):
    x, w, b = random(3, 49, N_IN), random(41, N_IN, seed=1), random(41, seed=2)
    x[1, 48, 3] = torch.nan
    assert run(models["linear 41"], x, w, b).isnan().nonzero()[:, :2].unique(dim=0).tolist() == [
        [1, 48]
    ]
    w, b = random(48, N_IN, 3, seed=1), random(48, seed=2)
    found = run(models["conv1d 1 49"], x, w, b).isnan().nonzero()
    assert found[:, :2].unique(dim=0).tolist() == [[1, 47], [1, 48]]


def test_views_of_other_tensors(models):
    """What is no dense tensor is made one, or refused; it is never read as if it were one."""
    x, w = random(2, 2 * N_IN, 12), random(2 * N_IN, 3 * N_IN, seed=1)
    y = x.permute(0, 2, 1)[:, 2:11, N_IN:] @ w[:, N_IN : 2 * N_IN].T
    expected = F.scaled_dot_product_attention(*(y[:, :, 16 * i : 16 * i + 16] for i in range(3)))
    assert relative_l2(run(models["views"], x, w), expected) <= 1e-5


def test_a_graph_without_the_library_has_maxs_own(demo_checkpoint):
    """As on a GPU, and in another dtype: none of ours is asked for there."""
    assert kernels.operations(CPU, DType.float16) is None
    assert kernels.operations(DeviceRef.GPU()) is None
    types = [f32(1, 6, 32), f32(48, 32), f32(48)]
    with Graph("plain", input_types=types) as graph:
        graph.output(linear(*(value.tensor for value in graph.inputs)))
    assert "max_whisper" not in str(graph)
    with Graph("own", input_types=types, kernel_library=kernels.operations(CPU)) as graph:
        graph.output(linear(*(value.tensor for value in graph.inputs)))
    assert "max_whisper.linear" in str(graph)


def test_sizes_that_do_not_fit_are_refused_or_maxs(demo_checkpoint):
    types = [f32(2, 6, 32), f32(48, 33), f32(40, 32, 3), f32(40), f32(2, 6, 48), f32(2, 6, 24)]
    with Graph("sizes", input_types=types, kernel_library=kernels.operations(CPU)) as graph:
        x, matrix, kernel, bias, k, small = (value.tensor for value in graph.inputs)
        with pytest.raises(
            ValueError, match=r"linear cannot take float32 \(2, 6, 32\), float32 \(48, 33\)"
        ):
            kernels.linear(x, matrix)
        with pytest.raises(ValueError, match=r"linear cannot take"):
            kernels.linear(ops.cast(x, DType.float16), matrix)
        with pytest.raises(ValueError, match="conv1d cannot take"):
            kernels.conv1d(x, kernel, 1)
        with pytest.raises(ValueError, match="qkv_attention cannot take"):
            kernels.qkv_attention(x, k, k, 2)
        graph.output(conv1d(x, kernel, bias, 1), qkv_attention(small, small, small, 1))
    for name in ("linear", "conv1d", "qkv_attention"):
        assert f"max_whisper.{name}" not in str(graph)


def test_source_that_does_not_compile_is_one_sentence(demo_checkpoint, monkeypatch, tmp_path):
    (tmp_path / "__init__.mojo").write_text("from .nothing import Nowhere\n")
    monkeypatch.setattr(kernels, "MOJO", tmp_path)
    for cached in (kernels._compiled, kernels._library):
        cached.cache_clear()
    try:
        with pytest.raises(EngineError, match=r"Mojo cannot compile .*error:") as raised:
            compile_encoder(demo_checkpoint.dims, select_device("cpu"), "encoder")
    finally:
        for cached in (kernels._compiled, kernels._library):
            cached.cache_clear()
    assert "\n" not in str(raised.value)
