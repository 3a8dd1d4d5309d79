"""`python -m validation parity --part decoder`: the clean run passes, and what is wrong is found
where it is made: in a tensor, in a formula, in the mask, in a cache, in the text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from conftest import SAMPLES, Pair, first_window
from torch import Tensor, nn
from whisper.decoding import DecodingOptions

from decoder_bridge.decoding import MaxInference
from decoder_bridge.engine import TappedDecoder
from decoder_bridge.graph import decoder_shapes, tap_names
from decoder_bridge.model import stock_model
from encoder.audio import N_SAMPLES, load_audio, windows
from validation import decoder_parity
from validation.__main__ import main
from validation.command import Recording
from validation.decoder_parity import (
    DecoderCandidate,
    MaxDecoder,
    TorchDecoder,
    judge,
    step_limit,
    steps_of,
    transcripts,
)
from validation.decoder_reference import DecoderReference, Forced, Taps, decoder_stages
from validation.parity import Judged, first_diverging
from validation.reference import ReferenceBroken
from validation.semantic import tokenizer_of
from weights import Checkpoint
from weights.export import export

FILES = [str(SAMPLES / name) for name in ("demo.flac", "flite-slt.flac")]
COMMON = ["--part", "decoder", "--model", "demo"]


def run(*arguments: str, report: Path) -> tuple[int, dict]:
    """The command in this process: (exit status, the JSON report)."""
    status = main(["parity", *arguments, *COMMON, "--json", str(report)])
    return status, json.loads(report.read_text())


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """MAX on two recordings, with everything that the command does by default."""
    folder = tmp_path_factory.mktemp("passed")
    status, report = run(*FILES, "--markdown", str(folder / "r.md"), report=folder / "r.json")
    assert status == 0
    text = (folder / "r.md").read_text()
    assert "blocks.1.cross_attn.qkv_attention" in text
    assert "one token at a time against all at once" in text
    assert "transcript of flite-slt.flac, beam 5: the same tokens" in text
    return report


@pytest.fixture(scope="module")
def reference(demo_checkpoint: Checkpoint) -> DecoderReference:
    return DecoderReference(demo_checkpoint)


@pytest.fixture(scope="module")
def ours(demo_checkpoint: Checkpoint) -> MaxDecoder:
    return MaxDecoder(demo_checkpoint)


@pytest.fixture(scope="module")
def forced(reference: DecoderReference) -> Forced:
    found = reference.forced(first_window(SAMPLES / "demo.flac"))
    assert found.tokens.shape[1] > 6
    return found


@pytest.fixture(scope="module")
def stock_taps(reference: DecoderReference, forced: Forced) -> tuple[Taps, Taps]:
    """Of the stock decoder in float32, and of its float64 twin."""
    return reference.taps(forced), reference.exact(forced)


@pytest.fixture(scope="module")
def judged(reference, forced, stock_taps) -> Callable[[Taps], list[Judged]]:
    return lambda taps: judge(taps, forced, reference, *stock_taps)


def test_max_is_the_same_function(passed: dict, demo_checkpoint: Checkpoint):
    assert passed["schema"] == 1
    assert passed["part"] == "decoder"
    assert passed["verdict"] == "pass"
    assert passed["first_diverging"] is None
    assert passed["problems"] == []
    assert [t["name"] for t in passed["taps"]] == tap_names(demo_checkpoint.dims)
    assert passed["final"]["name"] == "logits"
    for tap in passed["taps"]:
        assert tap["ratio"] <= 1, tap["name"]
        assert tap["own"] is not None
        assert tap["injected"] is None
        assert {"relative_l2", "max_abs", "sqnr_db", "cosine"} <= set(tap["free"])
        assert tap["floor"]["relative_l2"] > 0 or tap["free"]["relative_l2"] == 0
    assert [f["file"] for f in passed["files"]] == ["demo.flac", "flite-slt.flac"]
    assert 0 < max(f["final_relative_l2"] for f in passed["files"]) < 1e-5
    assert 0 <= passed["observer"] < 1e-5
    assert passed["command"].startswith("python -m validation parity")
    assert "cause" not in passed


def test_logits_steps_and_transcripts(passed: dict):
    logits, steps = passed["logits"], passed["steps"]
    count = sum(len(window["tokens"]) for window in passed["windows"])
    assert logits["positions"] == count > 12
    assert logits["same_top1"] == 1
    assert 0 < logits["relative_l2"] < 1e-5
    assert logits["kl_mean"] <= logits["kl_p99"] <= logits["kl_max"] < 1e-8
    assert [len(w["kl"]) for w in passed["windows"]] == [
        len(w["tokens"]) for w in passed["windows"]
    ]
    assert 0 < steps["relative_l2"] <= steps["limit"]
    assert steps["floor"] > 0
    assert all(w["steps"]["passed"] for w in passed["windows"])
    found = [(t["file"], t["search"], t["tokens_identical"]) for t in passed["transcripts"]]
    names = ("demo.flac", "flite-slt.flac")
    assert found == [(f, s, True) for f in names for s in ("greedy", "beam 5")]
    assert all(t["tokens"] > 3 for t in passed["transcripts"])
    assert all(t["text"]["reference"] == t["text"]["candidate"] for t in passed["transcripts"])


def test_both_sides_get_the_same_bytes_and_the_report_has_their_hashes(
    passed: dict, demo: Pair, demo_checkpoint: Checkpoint
):
    def joined(parts: list[np.ndarray]) -> str:
        digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in parts]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    mel = [first_window(Path(path)) for path in FILES]
    with torch.no_grad():
        features = [demo.stock.encoder(m) for m in mel]
    options = DecodingOptions(language="en", fp16=False)
    said = [demo.stock.decode(x, options)[0].tokens for x in features]
    for window, tokens in zip(passed["windows"], said, strict=True):
        assert window["tokens"][window["n_prompt"] :] == tokens
        assert window["tokens"][0] == tokenizer_of(demo.stock, "en").sot
    inputs = passed["inputs"]
    assert inputs["mel"] == joined([m[0].numpy() for m in mel])
    assert inputs["features"] == joined([x.numpy() for x in features])
    assert inputs["tokens"] == joined([np.array([w["tokens"]]) for w in passed["windows"]])
    assert inputs["weights"] == inputs["candidate_weights"] == demo_checkpoint.source.sha256
    assert {t["name"] for t in inputs["tensors"]} == set(decoder_shapes(demo_checkpoint.dims))
    assert all(t["sha256"] == t["candidate_sha256"] for t in inputs["tensors"])


def test_the_reference_was_checked_and_max_ran(passed: dict, demo_checkpoint: Checkpoint):
    alive, layers = passed["alive"], demo_checkpoint.dims.n_text_layer
    assert alive["hooked_equals_unhooked"] is True
    assert alive["repeatable"] is True
    assert 0 < alive["functional_worst"] < 1e-4
    assert 0 < alive["float64_relative_l2"] < 1e-5
    for name in ("no_mask_flash_attention_cpu", "masked_flash_attention_cpu"):
        assert passed["ran"]["kernels"][name] == 2 * layers
    assert passed["ran"]["kernels"]["max_whisper.linear"] == 2 * layers + 2 * (8 * layers + 1)
    assert passed["ran"]["kernels"]["matmul"] == 0
    assert passed["ran"]["output_changed_by"] > 1e-3


def test_clean_errors_keep_away_from_the_limits(passed: dict):
    """At most four fifths, as the encoder's."""
    assert max(tap["ratio"] for tap in passed["taps"]) <= 0.8
    assert passed["steps"]["relative_l2"] <= 0.8 * passed["steps"]["limit"]


def test_stock_in_fused_attention_passes_and_has_no_transcript_of_its_own(tmp_path: Path):
    status, report = run(FILES[0], "--candidate", "torch", report=tmp_path / "r.json")
    assert status == 0
    assert report["transcripts"] is None
    assert report["ran"]["kernels"] is None
    assert report["observer"] == 0


def test_stages_are_the_taps_and_use_every_tensor(demo_checkpoint: Checkpoint):
    dims = demo_checkpoint.dims
    found = decoder_stages(dims.n_text_layer)
    assert [stage.name for stage in found] == tap_names(dims)
    assert {w for stage in found for w in stage.weights} == set(decoder_shapes(dims))
    known = {"tokens", "audio_features"}
    for stage in found:
        assert set(stage.inputs) <= known, stage.name
        known.add(stage.name)


def test_a_reference_that_disagrees_with_itself_is_none(
    demo_checkpoint: Checkpoint, forced: Forced, stock_taps, monkeypatch
):
    other = DecoderReference(demo_checkpoint)
    other.check(forced, *stock_taps)
    name = "blocks.1.cross_attn.out.bias"
    monkeypatch.setitem(other.tensors, name, other.tensors[name] + 0.1)
    with pytest.raises(ReferenceBroken, match="by the plain formulas at "):
        other.check(forced, *stock_taps)
    with pytest.raises(ReferenceBroken, match=r"with hooks differs .*; by its float64 twin"):
        other.check(forced, *({k: x * 1.01 for k, x in taps.items()} for taps in stock_taps))


# Mistakes: where they are made is where they are found.


def damaged(checkpoint: Checkpoint, name: str, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    name = f"decoder.{name}"
    tensors = {**checkpoint.tensors, name: change(checkpoint.tensors[name].float()).contiguous()}
    return replace(checkpoint, tensors=tensors)


WRONG_TENSORS = {
    "token_embedding": ("token_embedding.weight", lambda x: x.roll(1, 0)),
    "positional_embedding": ("positional_embedding", lambda x: x.roll(-1, 0)),
    "blocks.0.attn_ln": ("blocks.0.attn_ln.weight", lambda x: x * 1.001),
    "blocks.0.attn.query": ("blocks.0.attn.query.weight", lambda x: x.T),
    "blocks.0.cross_attn.value": ("blocks.0.cross_attn.value.bias", torch.zeros_like),
    "blocks.1.attn.key": ("blocks.1.attn.key.weight", lambda x: x.flip(0)),
    "blocks.1.cross_attn.out": ("blocks.1.cross_attn.out.bias", torch.zeros_like),
    "blocks.1.mlp.0": ("blocks.1.mlp.0.weight", lambda x: x.bfloat16().float()),
    "ln": ("ln.bias", torch.zeros_like),
}


@pytest.mark.parametrize("tap", WRONG_TENSORS)
def test_a_wrong_tensor_is_found_at_its_tap(demo_checkpoint, forced, judged, tap: str):
    """Bound to the compiled graph; no other stage is blamed for it, but those that share it."""
    wrong = damaged(demo_checkpoint, *WRONG_TENSORS[tap])
    found = judged(TappedDecoder(wrong)(forced.tokens, forced.features))
    first = first_diverging(found)
    assert first is not None
    assert first.stage.name == tap
    blamed = {j.stage.name for j in found if j.own and j.own.relative_l2 > j.injected_limit}
    assert blamed == ({tap, "logits"} if tap == "token_embedding" else {tap})


@pytest.mark.parametrize("visible", [1, 448], ids=["the next token", "all tokens"])
def test_a_wrong_mask_is_found(demo_checkpoint, ours, forced, judged, monkeypatch, visible: int):
    """Later tokens are seen: the first block's attention, and no stage before it."""
    mask = torch.full_like(ours.tapped._mask, -torch.inf).triu_(1 + visible)
    monkeypatch.setattr(ours.tapped, "_mask", mask)
    first = first_diverging(judged(ours.taps(forced)))
    assert first is not None
    assert first.stage.name == "blocks.0.attn.qkv_attention"


def with_key_bias(model: whisper.Whisper) -> None:
    key = model.decoder.blocks[0].attn.key
    key.bias = nn.Parameter(torch.full((key.out_features,), 0.05))


def with_tanh(model: whisper.Whisper) -> None:
    model.decoder.blocks[1].mlp[1].approximate = "tanh"


def with_another_scale(model: whisper.Whisper) -> None:
    part = model.decoder.blocks[1].cross_attn
    stock = part.qkv_attention
    part.qkv_attention = lambda q, k, v, mask=None: stock(q * 0.999, k, v, mask)


@pytest.mark.parametrize(
    ("change", "tap"),
    [
        (with_key_bias, "blocks.0.attn.key"),
        (with_tanh, "blocks.1.mlp.1"),
        (with_another_scale, "blocks.1.cross_attn.qkv_attention"),
    ],
)
def test_a_wrong_formula_is_found_at_its_tap(demo_checkpoint, forced, judged, change, tap: str):
    """Made in a stock decoder: no weights of the compiled graph can make them."""
    model = stock_model(demo_checkpoint)
    change(model)
    first = first_diverging(judged(TorchDecoder(model).taps(forced)))
    assert first is not None
    assert first.stage.name == tap


def test_values_that_are_not_finite_fail_at_their_tap(judged, stock_taps):
    taps = dict(stock_taps[0])
    taps["blocks.1.mlp.0"] = taps["blocks.1.mlp.0"].clone()
    taps["blocks.1.mlp.0"][0, 3, 9] = torch.nan
    assert [j.stage.name for j in judged(taps) if not j.passed] == ["blocks.1.mlp.0"]


def off_by_one(inference: MaxInference) -> None:
    inference.cache.length -= 1


def keys_lost(inference: MaxInference) -> None:
    inference.cache._cross[0].zero_()


def first_row_lost(inference: MaxInference) -> None:
    inference.cache._own[:, :, 0] = 0


class Faulty(MaxInference):
    """A cache to which something happens after its first answer."""

    happens: Callable[[MaxInference], None]

    def logits(self, tokens: Tensor, audio_features: Tensor) -> Tensor:
        begun = self.cache is not None
        found = super().logits(tokens, audio_features)
        if not begun:
            type(self).happens(self)
        return found


class FaultyDecoder(MaxDecoder):
    def inference(self, n_prompt: int) -> Faulty:
        return Faulty(self.decoder, 1, tuple(range(n_prompt)))


@pytest.mark.parametrize("happens", [off_by_one, keys_lost, first_row_lost])
def test_a_cache_gone_wrong_is_found(
    demo_checkpoint, ours: MaxDecoder, forced: Forced, monkeypatch, happens
):
    """All tokens at once go without a cache, and agree: only the steps can tell."""
    at_once = ours.logits(forced)
    stock = TorchDecoder(stock_model(demo_checkpoint))
    limit = step_limit(steps_of(stock, forced, stock.logits(forced)).relative_l2)
    assert steps_of(ours, forced, at_once).relative_l2 < limit
    monkeypatch.setattr(Faulty, "happens", happens, raising=False)
    faulty = FaultyDecoder(demo_checkpoint)
    faulty.__dict__["decoder"] = ours.decoder  # bound already
    candidate: DecoderCandidate = faulty
    found = steps_of(candidate, forced, at_once)
    assert found.relative_l2 > 100 * limit
    assert found.position >= found.n_prompt


# The command.


def test_a_wrong_tensor_through_the_command(tmp_path: Path, demo_checkpoint: Checkpoint, capsys):
    wrong = damaged(demo_checkpoint, "blocks.1.attn.value.bias", torch.zeros_like)
    export(wrong, tmp_path / "wrong.safetensors")
    status, report = run(
        FILES[0], "--candidate-model", str(tmp_path / "wrong.safetensors"), "--no-transcript",
        "--fail-fast", report=tmp_path / "r.json",
    )  # fmt: skip
    assert status == 1
    assert report["verdict"] == "fail"
    assert report["first_diverging"] == report["taps"][-1]["name"] == "blocks.1.attn.value"
    assert report["final"] is None
    assert report["transcripts"] is None
    assert report["problems"] == []
    assert report["steps"]["passed"] is True
    differ = [
        t["name"] for t in report["inputs"]["tensors"] if t["sha256"] != t["candidate_sha256"]
    ]
    assert differ == ["blocks.1.attn.value.bias"]
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("fail: first differs at blocks.1.attn.value (")


def test_other_tokens_and_other_steps_fail_though_every_tap_is_right(
    tmp_path: Path, demo_checkpoint: Checkpoint, monkeypatch, capsys
):
    model = stock_model(damaged(demo_checkpoint, "positional_embedding", lambda x: -x))
    monkeypatch.setattr(MaxDecoder, "model", lambda self: model)
    monkeypatch.setattr(Faulty, "happens", off_by_one, raising=False)
    monkeypatch.setattr(decoder_parity, "MaxInference", Faulty)
    status, report = run(FILES[0], report=tmp_path / "r.json")
    assert status == 1
    assert report["first_diverging"] is None
    assert all(tap["passed"] for tap in report["taps"])
    assert report["steps"]["passed"] is False
    assert [t["tokens_identical"] for t in report["transcripts"]] == [False, False]
    assert report["transcripts"][0]["first_difference"]["index"] >= 0
    assert len(report["problems"]) == 3
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("fail: every tap is within its limits, but the logits of one token at ")
    assert last.endswith("and the tokens of demo.flac by beam 5 are not the same")


def test_taps_that_do_not_speak_for_production_are_no_verdict(monkeypatch, capsys):
    right = MaxDecoder.logits
    monkeypatch.setattr(MaxDecoder, "logits", lambda self, forced: right(self, forced) * 1.001)
    assert main(["parity", FILES[0], *COMMON, "--no-transcript"]) == 2
    assert "the logits with taps are 1.0e-03 from those without" in capsys.readouterr().err


def test_transcripts_of_the_first_windows(demo: Pair, monkeypatch):
    """Of two windows the one that is asked for, by both searches; nothing is cut from a file that
    has no more."""
    transcribe, asked = demo.stock.transcribe, []

    def watched(audio: np.ndarray, **options: Any) -> dict[str, Any]:
        asked.append((options["clip_timestamps"], options.get("beam_size")))
        return transcribe(audio, **options)

    monkeypatch.setattr(demo.stock, "transcribe", watched)
    speech = load_audio(FILES[0])
    for audio, clip in ((np.pad(speech, (0, N_SAMPLES)), [0.0, 30.0]), (speech, "0")):
        recording = Recording("speech.wav", audio, windows(audio, 80)[:1])
        found = transcripts(demo.stock, demo.stock, recording, 1)
        assert [(t["search"], t["tokens_identical"]) for t in found] == [
            ("greedy", True),
            ("beam 5", True),
        ]
        assert found[0]["tokens"] > 3
        assert asked == [(clip, None)] * 2 + [(clip, 5)] * 2
        asked.clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "r.html"], "--html is for the encoder alone"),
        (["--svg", "r.svg"], "--svg is for the encoder alone"),
        (["--save", "g.safetensors"], "--save is for the encoder alone"),
        (["--truth", "t.txt"], "--truth is for the encoder alone"),
        (["--candidate", "npz:taps.npz"], "npz:taps.npz is no decoder to compare"),
        (["--candidate", "onnx:a.onnx"], "--part decoder knows max and torch"),
        (["--candidate", "torch", "--transcript"], "give it with --candidate max"),
    ],
)
def test_what_is_for_the_encoder_is_refused(options: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["parity", FILES[0], *COMMON, *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_golden_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["parity", *COMMON, "--load", "g.safetensors"])
    assert stopped.value.code == 2
    assert "--load is for the encoder alone" in capsys.readouterr().err


def test_a_checkpoint_without_a_decoder_is_refused(tmp_path: Path, demo_checkpoint, capsys):
    part = {k: x for k, x in demo_checkpoint.tensors.items() if k.startswith("encoder.")}
    export(replace(demo_checkpoint, tensors=part), tmp_path / "encoder.safetensors")
    path = str(tmp_path / "encoder.safetensors")
    assert main(["parity", FILES[0], "--part", "decoder", "--model", path]) == 2
    assert "holds the encoder alone" in capsys.readouterr().err
    given = ["--model", "demo", "--candidate-model", path]
    assert main(["parity", FILES[0], "--part", "decoder", *given]) == 2
    assert "holds the encoder alone" in capsys.readouterr().err
