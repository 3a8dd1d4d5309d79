"""The encoder on an NVIDIA GPU: is it right, how fast is it, what text comes of it.

    python docs/gpu/measure.py OUT.json float32 graph TINY_EN.safetensors JFK.flac
    python docs/gpu/measure.py OUT.json taps bfloat16 JFK.flac
    python docs/gpu/measure.py OUT.json products
    python docs/gpu/measure.py OUT.json torch TINY_EN.safetensors JFK.flac

float32, or bfloat16, or float16; `graph` is encoder/graph.py as it is, `halves` has three products
of halves in place of each in float32, `flash` has MAX's own attention kernel for GPUs in it. Each
call compiles one graph, compares it with stock openai-whisper in float32 on the CPU, and times it;
`taps` compares every tap of one window; `products` compares single matrix products with
float64; `torch` does for PyTorch on CUDA what the first does for MAX. docs/gpu.md has the results.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from max.driver import CPU, Accelerator, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType, TensorValue, ops
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_gpu
from safetensors.torch import load_file
from torch import Tensor, nn

import encoder.graph as graph
import weights
from decoder_bridge.model import stock_model
from encoder.audio import load_audio, windows
from validation.metrics import relative_l2
from validation.reference import Reference

DTYPES = {
    "float32": (DType.float32, torch.float32),
    "bfloat16": (DType.bfloat16, torch.bfloat16),
    "float16": (DType.float16, torch.float16),
}
SHAPES = [(240, 384), (384, 384), (384, 1536), (1536, 384), (1152, 384)]  # in, out
ROWS = [1, 2, 7, 8, 9, 16, 64, 100, 1500, 3000, 12000]
BATCHES = [1, 2, 4, 8, 32]
LECTURE = Path(__file__).parents[2] / "samples" / "lecture.flac"

matmul = TensorValue.__matmul__
Encode = Callable[[Tensor], Tensor]  # float32 on the CPU, both


def flash(q: TensorValue, k: TensorValue, v: TensorValue, n_head: int, mask: Any = None) -> Any:
    """As `encoder.graph.qkv_attention`."""
    batch, n_ctx, n_state = q.shape
    n_head_state = int(n_state) // n_head

    def heads(y: TensorValue) -> TensorValue:
        return ops.reshape(y, [y.shape[0], y.shape[1], n_head, n_head_state])

    wv = flash_attention_gpu(
        heads(q), heads(k), heads(v), MHAMaskVariant.NULL_MASK, n_head_state**-0.5
    )
    return ops.reshape(wv, [batch, n_ctx, n_state])


def on_cpu(results: list[Buffer]) -> list[Tensor]:
    return [torch.from_dlpack(result.to(CPU())).clone() for result in results]


def halves(x: TensorValue) -> tuple[TensorValue, TensorValue]:
    """x -> two tensors whose sum is x, the first with 11 significant bits (Dekker, "A
    floating-point technique for extending the available precision", 1971)."""
    up = x * (2.0**13 + 1)
    upper = up - (up - x)
    return upper, x - upper


def of_halves(x: TensorValue, y: TensorValue) -> TensorValue:
    """x @ y from three products, without that of the lower halves."""
    (x1, x2), (y1, y2) = halves(x), halves(y)
    return matmul(x1, y1) + (matmul(x1, y2) + matmul(x2, y1))


def products(gpu: Accelerator) -> dict[str, Any]:
    ways = [(*dtypes, matmul) for dtypes in DTYPES.values()]
    ways.append((*DTYPES["float32"], of_halves))
    names = [*DTYPES, "float32, of halves"]
    types = []
    for n_in, n_out in SHAPES:
        types.append(TensorType(DType.float32, ["m", n_in], DeviceRef.GPU()))
        types.append(TensorType(DType.float32, [n_in, n_out], DeviceRef.GPU()))
    with Graph("products", input_types=types) as made:
        given = [value.tensor for value in made.inputs]
        made.output(
            *(
                ops.cast(multiply(ops.cast(x, dtype), ops.cast(w, dtype)), DType.float32)
                for dtype, _, multiply in ways
                for x, w in zip(given[::2], given[1::2], strict=True)
            )
        )
    session = InferenceSession(devices=[gpu])
    model = session.init(session.compile(made))
    rows = []
    for m in ROWS:
        generator = torch.Generator().manual_seed(m)
        tensors = []
        for n_in, n_out in SHAPES:
            tensors.append(torch.randn(m, n_in, generator=generator))
            tensors.append(torch.randn(n_in, n_out, generator=generator))
        answers = on_cpu(model.execute(*[Buffer.from_dlpack(x).to(gpu) for x in tensors]))
        for name, (_, dtype, _) in zip(names, ways, strict=True):
            for x, w in zip(tensors[::2], tensors[1::2], strict=True):
                x, w = x.to(dtype), w.to(dtype)
                right = x.double() @ w.double()
                rows.append(
                    {
                        "dtype": name,
                        "M": m,
                        "K": w.shape[0],
                        "N": w.shape[1],
                        "max": relative_l2(answers.pop(0), right),
                        "torch": relative_l2((x.cuda() @ w.cuda()).cpu(), right),
                    }
                )
    return {"rows": rows}


def clips(jfk: str) -> dict[str, Tensor]:
    """mel (windows, 80, 3000) of speech, of the bundled lecture and of noise."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(480000).astype(np.float32)
    return {
        "jfk": windows(load_audio(jfk), 80)[:1],
        "lecture": windows(load_audio(str(LECTURE)), 80)[:2],
        "noise": windows(noise, 80)[:1],
    }


def encoders(tiny_en: str) -> dict[str, nn.Module]:
    """Stock encoders in float32 on the CPU: of `demo`, and with OpenAI's tiny.en weights."""
    demo = weights.load("demo")
    found = {"demo": stock_model(demo).encoder, "tiny.en": stock_model(demo).encoder}
    real = load_file(tiny_en)
    found["tiny.en"].load_state_dict(
        {n.removeprefix("encoder."): t.float() for n, t in real.items() if "decoder." not in n}
    )
    return found


def parity(encode: Encode, stock: nn.Module, mels: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for clip, mel in mels.items():
        for i in range(len(mel)):
            with torch.no_grad():
                right = stock(mel[i : i + 1])
            answer = encode(mel[i : i + 1])
            rows.append(
                {
                    "clip": clip,
                    "window": i,
                    "relative_l2": relative_l2(answer, right),
                    "max_abs": float((answer - right).abs().max()),
                }
            )
    return rows


def timing(run: Callable[[int], Callable[[], None]]) -> list[dict[str, Any]]:
    """`run(batch)` gives what is timed, device memory in and out, to the end of the work."""
    rows = []
    for batch in BATCHES:
        once = run(batch)
        for _ in range(5):
            once()
        seconds = []
        for _ in range(30):
            began = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - began)
        rows.append({"batch": batch, "median_ms": 1e3 * float(np.median(seconds))})
    return rows


def weights_of(stock: nn.Module, name: str) -> dict[str, Tensor]:
    """The encoder's tensors as a graph in this dtype binds them."""
    dtype, torch_dtype = DTYPES[name]
    bound = {}
    for key, shape in graph.encoder_shapes(weights.load("demo").dims).items():
        narrow = graph.kept_as(key, shape, dtype) == dtype
        bound[key] = stock.state_dict()[key].to(torch_dtype if narrow else torch.float32)
    return bound


def of_max(name: str, form: str, tiny_en: str, jfk: str) -> dict[str, Any]:
    dtype = DTYPES[name][0]
    gpu = Accelerator()
    if form == "flash":
        graph.qkv_attention = flash
    if form == "halves":
        TensorValue.__matmul__ = of_halves
    demo = weights.load("demo")
    session = InferenceSession(devices=[gpu])
    compiled = session.compile(graph.build(demo.dims, DeviceRef.GPU(), dtype))
    mels, found = clips(jfk), {"dtype": name, "form": form, "parity": []}
    models = {}
    for which, stock in encoders(tiny_en).items():
        bound = weights_of(stock, name)
        models[which] = model = session.init(compiled, weights_registry=bound)

        def encode(mel: Tensor, model: Any = model) -> Tensor:
            return on_cpu(model.execute(Buffer.from_dlpack(mel.contiguous()).to(gpu)))[0]

        found["parity"] += [{"weights": which, **row} for row in parity(encode, stock, mels)]
    model = models["demo"]

    def run(batch: int) -> Callable[[], None]:
        x = Buffer.from_dlpack(mels["lecture"][:1].repeat(batch, 1, 1).contiguous()).to(gpu)

        def once() -> None:
            model.execute(x)
            gpu.synchronize()

        return once

    found["timing"] = timing(run)

    class Encoder(nn.Module):
        def forward(self, mel: Tensor) -> Tensor:
            x = Buffer.from_dlpack(mel.float().contiguous())
            torch.cuda.synchronize()
            y = torch.from_dlpack(model.execute(x)[0])
            gpu.synchronize()
            return y.to(mel.dtype)

    ours = stock_model(demo).to("cuda")
    ours.encoder = Encoder()
    found["transcripts"] = transcripts(ours)
    return found


def taps(name: str, jfk: str) -> dict[str, Any]:
    """Every tap of the network in one dtype against the stock encoder's in float32."""
    dtype = DTYPES[name][0]
    gpu, demo = Accelerator(), weights.load("demo")
    session = InferenceSession(devices=[gpu])
    compiled = session.compile(graph.build_tapped(demo.dims, DeviceRef.GPU(), dtype))
    reference = Reference(demo)
    model = session.init(compiled, weights_registry=weights_of(reference.stock, name))
    mel = clips(jfk)["jfk"]
    answers = on_cpu(model.execute(Buffer.from_dlpack(mel.contiguous()).to(gpu)))
    right = reference.taps(mel)
    rows = [
        {"tap": tap, "relative_l2": relative_l2(answer, right[tap])}
        for tap, answer in zip(graph.tap_names(demo.dims), answers, strict=True)
    ]
    return {"dtype": name, "rows": rows}


def of_torch(tiny_en: str, jfk: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "rows": [],
    }
    mels = clips(jfk)
    for which, stock in encoders(tiny_en).items():
        on_gpu = encoders(tiny_en)[which].cuda()
        for mode in ("float32", "tf32", "bfloat16", "float16"):
            torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
            torch.backends.cudnn.allow_tf32 = mode == "tf32"
            dtype = DTYPES["float32" if mode == "tf32" else mode][1]

            def encode(mel: Tensor, on_gpu: Any = on_gpu, dtype: Any = dtype) -> Tensor:
                with torch.no_grad():
                    return on_gpu(mel.cuda().to(dtype)).float().cpu()

            def run(batch: int, on_gpu: Any = on_gpu, dtype: Any = dtype) -> Callable[[], None]:
                x = mels["lecture"][:1].repeat(batch, 1, 1).cuda().to(dtype)

                def once() -> None:
                    with torch.no_grad():
                        on_gpu(x)
                    torch.cuda.synchronize()

                return once

            row = {"weights": which, "mode": mode, "parity": parity(encode, stock, mels)}
            found["rows"].append({**row, "timing": timing(run)})
    found["transcripts"] = transcripts(stock_model(weights.load("demo")).to("cuda"))
    return found


def transcripts(model: Any) -> list[dict[str, Any]]:
    audio, found = load_audio(str(LECTURE)), []
    for fp16 in (False, True):
        said = model.transcribe(audio, fp16=fp16, temperature=0.0, language="en")
        tokens = [token for segment in said["segments"] for token in segment["tokens"]]
        found.append({"fp16": fp16, "text": said["text"], "tokens": tokens})
    return found


def main(out: str, what: str, *rest: str) -> None:
    if what == "products":
        found = products(Accelerator())
    elif what == "taps":
        found = taps(*rest)
    elif what == "torch":
        found = of_torch(*rest)
    else:
        found = of_max(what, *rest)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
