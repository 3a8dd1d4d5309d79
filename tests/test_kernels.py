"""The kernels whose time is measured are the encoder's, all of them; no graph is compiled here."""

from __future__ import annotations

import json
import re

import pytest
import torch
from max.graph import DeviceRef
from rich.console import Console

from validation import kernels
from validation.__main__ import main
from validation.reference import stock_encoder
from weights import Checkpoint


def test_they_are_as_many_as_the_stock_encoder_runs(demo_checkpoint: Checkpoint):
    """Counted by hooks on its modules: convolutions, norms, products; GELU and sums by layers."""
    module, ran = stock_encoder(demo_checkpoint), {"Conv1d": 0, "LayerNorm": 0, "Linear": 0}
    for part in module.modules():
        if type(part).__name__ in ran:
            part.register_forward_hook(
                lambda own, *_: ran.__setitem__(type(own).__name__, ran[type(own).__name__] + 1)
            )
    with torch.no_grad():
        module(torch.zeros(1, 80, 3000))
    count = {kernel.name: kernel.count for kernel in kernels.kernels_of(demo_checkpoint.dims)}
    assert count["conv1"] + count["conv2"] == ran["Conv1d"]
    assert count["layer_norm"] == ran["LayerNorm"]
    products = count["query, key, value, out"] + count["mlp.0"] + count["mlp.2"]
    assert products == ran["Linear"]
    layers = demo_checkpoint.dims.n_audio_layer
    assert count["qkv_attention"] == count["mlp.1"] == layers
    assert count["residual"] == 2 * layers


def test_their_work_is_the_encoders(demo_checkpoint: Checkpoint):
    """21.2 GFLOP of products, 13.8 of attention, 1.9 of convolutions, as counted by hand."""
    work = {k.name: k.count * k.flop / 1e9 for k in kernels.kernels_of(demo_checkpoint.dims)}
    assert work["conv1"] + work["conv2"] == pytest.approx(1.9, abs=0.05)
    assert work["qkv_attention"] == pytest.approx(13.8, abs=0.05)
    products = work["query, key, value, out"] + work["mlp.0"] + work["mlp.2"]
    assert products == pytest.approx(21.2, abs=0.05)


def test_each_graph_gives_the_shape_that_pytorch_gives(demo_checkpoint: Checkpoint):
    """The graphs are built, not compiled."""
    dims = demo_checkpoint.dims
    tensors = {n: t.float() for n, t in demo_checkpoint.encoder_tensors().items()}
    signature = re.compile(r'mo.graph @"?([^"(]+)"?\(.*\) -> !mo.tensor<\[([\d, ]+)\], f32>')
    shapes = dict(signature.findall(str(kernels.build(dims, DeviceRef.CPU()).mlir_module)))
    expected = {}
    for kernel in kernels.kernels_of(dims):
        out = kernel.torch([torch.zeros(1, *shape) for shape in kernel.shapes], tensors)
        expected[kernel.name] = ", ".join(map(str, out.shape))
    assert shapes == expected


def test_shares_are_shown_by_how_often_a_kernel_runs(capsys):
    side = {"seconds": 0.002, "gflops": 100.0}
    rows = [
        {"kernel": "mlp.0", "count": 4, "relative_l2": 0.0, "max": side, "torch": side},
        {
            "kernel": "encoder",
            "count": 1,
            "relative_l2": 0.0,
            "max": {"seconds": 0.3, "gflops": None},
            "torch": {"seconds": 0.3, "gflops": None},
        },
    ]
    kernels.show(rows, Console(width=120))
    out = capsys.readouterr().out
    assert [line.split()[2:4] for line in out.splitlines() if "mlp.0" in line] == [["│", "4"]]
    assert out.count("8.0") == 4  # the kernel's own, and the sum, on both sides


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rounds", "0"], "--rounds must be 1"), (["--model", "none.safetensors"], "none")],
)
def test_what_cannot_be_measured_is_a_sentence(arguments, said, capsys):
    try:
        status = main(["kernels", "--offline", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_calls_take_turns_and_the_first_round_is_not_kept():
    order: list[str] = []
    sides = {n: kernels.Timed(lambda n=n: order.append(n), []) for n in ("a", "b", "c")}
    kernels.interleaved(sides, 5, 1)
    assert len(order) == 18
    assert all(set(order[i : i + 3]) == {"a", "b", "c"} for i in range(0, 18, 3))
    assert all(len(side.seconds) == 5 for side in sides.values())
    assert len({tuple(order[i : i + 3]) for i in range(0, 18, 3)}) > 1
    assert json.dumps(sides["a"].median())
