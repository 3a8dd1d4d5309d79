"""`python -m validation kernels`: where the encoder's time goes, kernel by kernel, MAX and PyTorch.

    python -m validation kernels --model demo --json docs/benchmark/kernels.json

Each kernel of one window alone, by the functions of `encoder/graph.py` and by PyTorch's, on the
same random numbers and the checkpoint's weights, in turns that are shuffled anew in each round; and
the whole encoder, both. A kernel's share is its median times how often the encoder runs it. What
the whole takes beyond the sum is what lies between the kernels; below it, what is fused.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from max.dtype import DType
from max.graph import DeviceRef, Graph, Module, TensorType, TensorValue
from rich.console import Console
from rich.table import Table
from torch import Tensor
from whisper.model import ModelDimensions

import encoder.graph
import weights
from encoder.engine import KINDS, Bound, Engine, EngineError, Kind, float32_weights
from encoder.graph import (
    LAYER_NORM_EPSILON,
    conv1d,
    encoder_shapes,
    external_weights,
    layer_norm,
    linear,
    qkv_attention,
)
from encoder.kernels import operations
from validation.metrics import relative_l2
from validation.parity import commit, processor
from validation.reference import stock_encoder
from validation.report import dumps, write
from weights import Checkpoint, WeightsError

BLOCK = "blocks.0"
AGREE = 1e-4  # relative L2 of a kernel between the two: else it is not the same kernel
COOL = 0.02  # seconds between two kernels, in which the other side's threads fall asleep

SIDES = ("max", "torch")
Weight = Callable[[str], TensorValue]


@dataclass(frozen=True)
class Kernel:
    """
    name : of the table, and of its graph
    shapes : of its inputs, without the batch
    count : how often the encoder runs it for a window
    flop : multiplications and additions
    ours : the graph's part: inputs and weights -> what it gives
    torch : the same in PyTorch
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    count: int
    flop: int
    ours: Callable[[list[TensorValue], Weight], TensorValue]
    torch: Callable[[list[Tensor], Mapping[str, Tensor]], Tensor]


def kernels_of(dims: ModelDimensions) -> list[Kernel]:
    """Every kernel of the encoder, in the order in which a block runs them."""
    n, state, layers, mels = (
        dims.n_audio_ctx,
        dims.n_audio_state,
        dims.n_audio_layer,
        dims.n_mels,
    )
    heads = dims.n_audio_head

    def product(name: str, tensor: str, n_in: int, n_out: int, count: int) -> Kernel:
        w, b = f"{BLOCK}.{tensor}.weight", f"{BLOCK}.{tensor}.bias"
        return Kernel(
            name,
            ((n, n_in),),
            count,
            2 * n * n_in * n_out,
            lambda x, weight: linear(x[0], weight(w), weight(b)),
            lambda x, weight: F.linear(x[0], weight[w], weight[b]),
        )

    def convolution(number: int, frames: int, n_in: int, stride: int) -> Kernel:
        w, b = f"conv{number}.weight", f"conv{number}.bias"
        return Kernel(
            f"conv{number}",
            ((frames, n_in),),
            1,
            2 * (frames // stride) * 3 * n_in * state,
            lambda x, weight: conv1d(x[0], weight(w), weight(b), stride),
            lambda x, weight: F.conv1d(
                x[0].transpose(1, 2), weight[w], weight[b], stride, 1
            ).transpose(1, 2),
        )

    def gelu(name: str, shape: tuple[int, int], count: int) -> Kernel:
        return Kernel(
            name,
            (shape,),
            count,
            0,
            lambda x, _: encoder.graph.gelu(x[0]),
            lambda x, _: F.gelu(x[0]),
        )

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    def attention(x: list[Tensor], _: Mapping[str, Tensor]) -> Tensor:
        q, k, v = map(split, x)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x[0].shape)

    norm = f"{BLOCK}.attn_ln"
    return [
        convolution(1, 2 * n, mels, 1),
        gelu("conv1.gelu", (2 * n, state), 1),
        convolution(2, 2 * n, state, 2),
        gelu("conv2.gelu", (n, state), 1),
        Kernel(
            "layer_norm",
            ((n, state),),
            2 * layers + 1,
            0,
            lambda x, weight: layer_norm(x[0], weight, norm),
            lambda x, weight: F.layer_norm(
                x[0], (state,), weight[f"{norm}.weight"], weight[f"{norm}.bias"], LAYER_NORM_EPSILON
            ),
        ),
        product("query, key, value, out", "attn.query", state, state, 4 * layers),
        Kernel(
            "qkv_attention",
            ((n, state),) * 3,
            layers,
            4 * n * n * state,
            lambda x, _: qkv_attention(x[0], x[1], x[2], heads),
            attention,
        ),
        product("mlp.0", "mlp.0", state, 4 * state, layers),
        gelu("mlp.1", (n, 4 * state), layers),
        product("mlp.2", "mlp.2", 4 * state, state, layers),
        Kernel(
            "residual",
            ((n, state),) * 2,
            2 * layers,
            0,
            lambda x, _: x[0] + x[1],
            lambda x, _: x[0] + x[1],
        ),
    ]


def build(dims: ModelDimensions, device: DeviceRef) -> Module:
    """A graph for each kernel, in one module; batch 1."""
    module = Module()
    for kernel in kernels_of(dims):
        types = [TensorType(DType.float32, [1, *shape], device) for shape in kernel.shapes]
        with Graph(
            kernel.name, input_types=types, module=module, kernel_library=operations(device)
        ) as graph:
            weight = external_weights(encoder_shapes(dims), device)
            graph.output(kernel.ours([value.tensor for value in graph.inputs], weight))
    return module


KINDS["kernels"] = Kind(build, "the encoder's single kernels", (*encoder.graph.SOURCES, __file__))


class Kernels(Bound):
    """The compiled kernels with a checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint):
        tensors = float32_weights(checkpoint.encoder_tensors(), encoder_shapes(checkpoint.dims))
        super().__init__("kernels", checkpoint.dims, "cpu", tensors)

    def __call__(self, name: str, inputs: list[Tensor]) -> Tensor:
        """What the kernel gives for its inputs, (1, ...) float32."""
        return self._execute(*inputs, graph=name)[0]


@dataclass
class Timed:
    """One side of one row: a call, and the seconds that it took in each round."""

    call: Callable[[], Any]
    seconds: list[float]

    def median(self) -> float:
        return float(np.median(self.seconds))


def interleaved(sides: Mapping[str, Timed], rounds: int, seed: int) -> None:
    """Every call in every round, in another order each time; the first round is not kept."""
    order, rng = list(sides.values()), random.Random(seed)
    for number in range(rounds + 1):
        rng.shuffle(order)
        for side in order:
            time.sleep(COOL)
            began = time.perf_counter()
            side.call()
            if number:
                side.seconds.append(time.perf_counter() - began)


@torch.no_grad()
def measured(checkpoint: Checkpoint, rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row for each kernel, and last of the whole encoder; raises EngineError, also where the two
    sides do not compute the same."""
    dims, generator = checkpoint.dims, torch.Generator().manual_seed(seed)
    tensors = float32_weights(checkpoint.encoder_tensors(), encoder_shapes(dims))
    ours, module = Kernels(checkpoint), stock_encoder(checkpoint)
    engine, listed = Engine(checkpoint, "cpu"), kernels_of(dims)
    mel = torch.randn(1, dims.n_mels, 2 * dims.n_audio_ctx, generator=generator)
    sides = {
        "max: encoder": Timed(lambda: engine(mel), []),
        "torch: encoder": Timed(lambda: module(mel), []),
    }
    errors = {"encoder": relative_l2(engine(mel), module(mel))}
    for kernel in listed:
        given = [torch.randn(1, *shape, generator=generator) for shape in kernel.shapes]

        def max_call(kernel: Kernel = kernel, given: list[Tensor] = given) -> Tensor:
            return ours(kernel.name, given)

        def torch_call(kernel: Kernel = kernel, given: list[Tensor] = given) -> Tensor:
            return kernel.torch(given, tensors)

        errors[kernel.name] = relative_l2(max_call(), torch_call())
        sides[f"max: {kernel.name}"] = Timed(max_call, [])
        sides[f"torch: {kernel.name}"] = Timed(torch_call, [])
    for name, error in errors.items():
        if not error <= AGREE:
            raise EngineError(f"{name}: MAX and PyTorch are {error:.1e} apart, nothing is timed")
    interleaved(sides, rounds, seed)
    rows = []
    for name, count, flop in [*((k.name, k.count, k.flop) for k in listed), ("encoder", 1, 0)]:
        row: dict[str, Any] = {"kernel": name, "count": count, "relative_l2": errors[name]}
        for side in SIDES:
            seconds = sides[f"{side}: {name}"].median()
            row[side] = {"seconds": seconds, "gflops": flop / seconds / 1e9 if flop else None}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Milliseconds for a window, and GFLOP/s of the products."""
    table = Table()
    for label in ("kernel", "times", "MAX ms", "PyTorch ms", "MAX GFLOP/s", "PyTorch GFLOP/s"):
        table.add_column(label, justify="left" if label == "kernel" else "right")
    for row in rows:
        sides = [row[side] for side in SIDES]
        table.add_row(
            row["kernel"],
            str(row["count"]),
            *(f"{1e3 * row['count'] * side['seconds']:.1f}" for side in sides),
            *("-" if side["gflops"] is None else f"{side['gflops']:.0f}" for side in sides),
        )
    totals = [sum(row["count"] * row[side]["seconds"] for row in rows[:-1]) for side in SIDES]
    table.add_row("sum but for the last", "", *(f"{1e3 * x:.1f}" for x in totals), "", "")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m validation kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--offline", action="store_true", help="never touch the network")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error("--rounds must be 1 or more")
    try:
        checkpoint = weights.load(args.model, offline=args.offline, encoder_only=True)
        rows = measured(checkpoint, args.rounds, args.seed)
        if args.json:
            found = {
                "schema": 1,
                "command": f"python -m validation kernels --model {Path(args.model).name} "
                f"--rounds {args.rounds}",
                "model": Path(checkpoint.source.name).name,
                "weights_sha256": checkpoint.source.sha256,
                "kernels": rows,
                "rounds": args.rounds,
                "cpu": processor(),
                "threads": torch.get_num_threads(),
                "versions": {p: version(p) for p in ("max", "torch")},
                "commit": commit(),
            }
            write(args.json, dumps(found))
    except (WeightsError, EngineError) as error:
        print(f"validation kernels: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"validation kernels: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    show(rows, Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
