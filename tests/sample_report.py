"""A parity report as the command writes it (schema 1), with invented figures: no model has run."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from whisper.model import ModelDimensions

from validation.stages import Stage, stages

DIMS = ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)  # tiny.en
FAULT = "blocks.2.attn.out"  # where the failing report begins to differ


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def metrics(relative: float, rng: np.random.Generator) -> dict[str, Any]:
    """All measures of a tap of size one at this relative L2; a NaN error is a NaN in the tap."""
    finite = bool(np.isfinite(relative))
    reference = float(rng.normal())
    return {
        "relative_l2": relative,
        "max_abs": relative * float(rng.uniform(9, 30)),
        "mean_abs": relative * 0.7,
        "p999_abs": relative * 5,
        "sqnr_db": float(-20 * np.log10(relative)) if relative else float("inf"),
        "cosine": 1 - relative**2 / 2,
        "worst_index": [int(rng.integers(1500)), int(rng.integers(384))],
        "worst_candidate": reference + relative * 9,
        "worst_reference": reference,
        "nonfinite": 0 if finite else 384,
        "edge_relative_l2": relative * float(rng.uniform(0.5, 2)),
        "candidate_mean": 0.011 if finite else relative,
        "candidate_std": 1.013 if finite else relative,
        "reference_mean": 0.011,
        "reference_std": 1.013,
    }


def tap(stage: Stage, depth: float, failing: str | None, rng: np.random.Generator) -> dict:
    """`depth` 0 ... 1; `failing` is "here" where the fault sits, "after" behind it, else None."""
    if stage.kind == "mel":
        floor = own_floor = free = own = 0.0
    else:
        # As tiny.en does: float32 noise piles up over the blocks, one stage alone adds little.
        floor = 1.1e-7 * 10 ** (1.15 * depth) * float(rng.uniform(0.75, 1.3))
        noise = {"gelu": 4e-8, "residual": 3e-8, "positions": 3e-8, "attention": 3e-7}
        own_floor = noise.get(stage.kind, 2e-7) * float(rng.uniform(0.8, 1.2))
        free, own = floor * float(rng.uniform(1.2, 2.2)), own_floor * float(rng.uniform(1, 1.6))
        if failing is not None:
            free = 3.1e-2 if failing == "here" else 10 ** float(rng.uniform(-2.4, -1.4))
        if failing == "here":
            own = 3.1e-2
    limit = max(10 * floor, 4e-6) if stage.kind != "mel" else 0.0
    own_limit = max(12 * own_floor, 4e-6) if stage.kind != "mel" else 0.0
    return {
        "name": stage.name,
        "kind": stage.kind,
        "file": "jfk.flac",
        "window": 0,
        "free": metrics(free, rng),
        "injected": metrics(own, rng),
        "own": None if stage.kind == "mel" else metrics(own, rng),
        "floor": {"relative_l2": floor},
        "own_floor": {"relative_l2": own_floor},
        "limit": limit,
        "injected_limit": own_limit,
        "passed": free <= limit and own <= own_limit,
        "minimum_tolerance": max(free, own),
        "suggested_tolerance": {"rtol": 1e-5, "atol": 40 * free},
    }


def plots(name: str, relative: float, rng: np.random.Generator) -> dict[str, Any]:
    """1500 frames of speech padded from 11 s, 384 channels, 2000 points."""
    frames = relative * np.exp(rng.normal(0, 0.35, 1500))
    frames[550:] *= 0.6
    reference = rng.normal(0, 1, 2000) ** 3 / 3
    candidate = reference + relative * rng.normal(0, 4, 2000)
    channels = relative * np.exp(rng.normal(0, 0.8, 384))
    return {
        "frames": {"tap": name, "relative_l2": frames.tolist()},
        "channels": {"tap": name, "relative_l2": channels.tolist()},
        "scatter": {"tap": name, "reference": reference.tolist(), "candidate": candidate.tolist()},
    }


def semantic(failed: bool) -> dict[str, Any]:
    said = "And so, my fellow Americans, ask not what your country can do for you"
    heard = said.replace("fellow", "yellow") if failed else said
    window = {"seek": 0, "start": 0.0, "end": 11.0, "identical": not failed, "wer": 0.07 * failed}
    difference = {"window": 0, "index": 4, "time": 1.2, "reference": " fellow"}
    return {
        "candidate_failed": None,
        "positions": 27,
        "kl_mean": 2.1e-3 if failed else 1.3e-11,
        "kl_p99": 4.4e-2 if failed else 9.0e-11,
        "kl_max": 0.31 if failed else 2.2e-10,
        "same_top1": 0.963 if failed else 1.0,
        "tokens_identical": not failed,
        "first_difference": {**difference, "candidate": " yellow"} if failed else None,
        "wer": 0.045 if failed else 0.0,
        "cer": 0.012 if failed else 0.0,
        "text": {"reference": said, "candidate": heard},
        "windows": [{**window, "reference": said, "candidate": heard}],
    }


def sample_report(verdict: str = "pass") -> dict[str, Any]:
    """A new report of 55 taps. "fail": the bias of FAULT is missing, and the text suffers."""
    rng, failed = np.random.default_rng(1), verdict == "fail"
    every = stages(DIMS)
    fault = [stage.name for stage in every].index(FAULT) if failed else len(every)
    taps = []
    for i, stage in enumerate(every):
        failing = None if i < fault else "here" if i == fault else "after"
        taps.append(tap(stage, i / len(every), failing, rng))
    worst = taps[fault] if failed else max(taps[1:], key=lambda t: t["free"]["relative_l2"])
    cause = {
        "id": "missing_bias",
        "sentence": f"{FAULT}: explained to 1e-6 by `{FAULT}.bias` missing",
        "tensor": f"{FAULT}.bias",
        "score": 1.1e-6,
        "baseline": 3.1e-2,
    }
    tensors = [
        {
            "name": name,
            "shape": [384, 384] if name.endswith("weight") else [384],
            "dtype": "float16",
            "sha256": sha256(name),
            "candidate_sha256": sha256("zeros")
            if failed and name == f"{FAULT}.bias"
            else sha256(name),
        }
        for stage in every
        for name in stage.weights
    ]
    final = taps[-1]["free"]["relative_l2"]
    return {
        "schema": 1,
        "verdict": verdict,
        "first_diverging": FAULT if failed else None,
        "cause": cause if failed else None,
        "observer": 3.2e-7,
        "model": "tiny.en.safetensors",
        "candidate": "max",
        "candidate_model": "damaged.safetensors" if failed else None,
        "final": taps[-1],
        "taps": taps,
        "files": [file_line("jfk.flac", taps, worst["name"], 1, verdict)],
        "inputs": {
            "audio": sha256("audio"),
            "mel": sha256("mel"),
            "weights": sha256("weights"),
            "candidate_weights": sha256("damaged") if failed else None,
            "tensors": tensors,
        },
        "alive": {
            "hooked_equals_unhooked": True,
            "fused_relative_l2": 8.7e-7,
            "functional_worst_tap": "blocks.3.mlp.0",
            "limit": 2e-5,
        },
        "ran": {
            "perturbed": "ln_post.bias",
            "output_changed_by": 0.41,
            "kernels": {"matmul": 26, "fused_attention": 4, "layer_norm": 9},
        },
        "semantic": semantic(failed),
        "plots": plots(worst["name"], worst["free"]["relative_l2"] or final, rng),
        "versions": {"max": "26.7.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", "python": "3.11.7"},
        "cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz",
        "threads": 2,
        "command": "python -m validation parity jfk.flac --model tiny.en.safetensors --html r.html",
        "commit": "0d4f86a1b2c3d4e5f60718293a4b5c6d7e8f9012",
        "seconds": 21.4,
    }


def file_line(name: str, taps: list[dict], worst: str, windows: int, verdict: str) -> dict:
    return {
        "file": name,
        "windows": windows,
        "verdict": verdict,
        "first_diverging": FAULT if verdict == "fail" else None,
        "final_relative_l2": taps[-1]["free"]["relative_l2"],
        "worst_tap": worst,
        "worst_ratio": 7.7e3 if verdict == "fail" else 0.31,
        "sha256": {"audio": sha256(name), "mel": sha256(f"mel of {name}")},
    }


def several_files(report: dict) -> dict:
    """`report` as if it were of three files, the last with a name of awkward characters; of the
    semantic stage the worst, and each file's."""
    taps, worst = report["taps"], report["files"][0]["worst_tap"]
    names = ("jfk.flac", "silence.wav", "<b>|*odd*|</b> & `co`.flac")
    verdicts = (report["verdict"], "pass", report["verdict"])
    report["files"] = [
        file_line(name, taps, worst, i + 1, verdict)
        for i, (name, verdict) in enumerate(zip(names, verdicts, strict=True))
    ]
    one, kept = report["semantic"], ("kl_mean", "kl_p99", "kl_max", "wer", "cer", "same_top1")
    report["semantic"] = {
        "files": [{**one, "file": name} for name in names],
        **{key: one[key] for key in (*kept, "tokens_identical")},
    }
    return report


def one_tap(report: dict) -> dict:
    """`report` of a candidate that gives ln_post alone, into which nothing can be injected."""
    report["taps"] = [{**report["final"], "injected": None, "own": None}]
    report["final"] = report["taps"][0]
    if report["verdict"] == "fail":
        report["first_diverging"], report["cause"] = "ln_post", None
    return report


def with_nan(report: dict) -> dict:
    """`report` (a failing one) whose fault gives NaN, from FAULT on to the end."""
    rng, names = np.random.default_rng(2), [t["name"] for t in report["taps"]]
    for t in report["taps"][names.index(FAULT) :]:
        t["free"] = metrics(float("nan"), rng)
        t["minimum_tolerance"] = float("nan")
        t["suggested_tolerance"] = {"rtol": 1e-5, "atol": float("nan")}
    report["plots"] = plots(FAULT, 0.03, rng)
    for values in (report["plots"]["frames"], report["plots"]["channels"]):
        values["relative_l2"][100:200] = [float("nan")] * 100
    report["plots"]["scatter"]["candidate"][:50] = [float("nan")] * 50
    report["cause"] = None
    return report
