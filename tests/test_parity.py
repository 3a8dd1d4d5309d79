"""The parity command: one report about one candidate, and an exit status.

What a good parity suite has to show is a list of 18 points; each has a test here or where it says:
3 proof that MAX ran, 10 observer: test_taps.py and below; 4 names: test_taps.py; 5 measures:
test_metrics.py; 7 noise floor: test_reference.py; 16 reports: test_report.py, test_page.py;
17 faults: test_fingerprints.py and below.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLES, sample_rows
from safetensors.numpy import save_file

import encoder.engine
import weights
from encoder.audio import load_audio, windows
from validation import command, limits
from validation.__main__ import main
from validation.candidates import MaxCandidate
from validation.faults import FAULTS, Twin
from validation.golden import Golden
from validation.metrics import error
from validation.parity import Judged, ParityError, golden_of, judge, judge_window
from validation.reference import Reference
from validation.stages import stages
from weights import Checkpoint
from weights.export import export

DEMO = str(SAMPLES / "demo.flac")
DOCS = Path(__file__).parent.parent / "docs"
METRICS = set(
    "relative_l2 max_abs mean_abs p999_abs sqnr_db cosine worst_index nonfinite "
    "edge_relative_l2".split()
)


def run(*arguments: str, report: Path) -> tuple[int, dict]:
    """The command in this process: (exit status, the JSON report)."""
    status = main(["parity", *arguments, "--json", str(report)])
    return status, json.loads(report.read_text())


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """MAX on the embedded checkpoint, with everything that the command does by default."""
    folder = tmp_path_factory.mktemp("passed")
    truth = folder / "truth.txt"
    truth.write_text(next(r["text"] for r in sample_rows() if r["file"] == "demo.flac"))
    status, report = run(
        DEMO, "--model", "demo", "--truth", str(truth), "--html", str(folder / "r.html"),
        "--markdown", str(folder / "r.md"), report=folder / "r.json",
    )  # fmt: skip
    assert status == 0
    assert (folder / "r.html").read_text().lower().startswith("<!doctype html>")
    assert "blocks.3.mlp.2" in (folder / "r.md").read_text()
    return report


@pytest.fixture(scope="module")
def golden(demo_checkpoint: Checkpoint) -> Golden:
    mel = windows(load_audio(DEMO), 80)[:1]
    return golden_of(Reference(demo_checkpoint), mel, file="demo.flac")


@pytest.fixture(scope="module")
def tensors(demo_checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: t.float() for name, t in demo_checkpoint.encoder_tensors().items()}


def test_max_is_the_same_function(passed: dict, demo_checkpoint: Checkpoint):
    assert passed["schema"] == 1
    assert passed["verdict"] == "pass"
    assert passed["first_diverging"] is None
    assert passed["cause"] is None
    assert passed["final"]["free"]["relative_l2"] < 1e-5
    assert [t["name"] for t in passed["taps"]] == [s.name for s in stages(demo_checkpoint.dims)]
    assert all(t["passed"] for t in passed["taps"])


def test_the_report_has_the_keys_of_schema_1(passed: dict):
    for tap in passed["taps"]:
        assert set(tap["free"]) >= METRICS
        assert set(tap["injected"]) >= METRICS
        assert tap["name"] == "mel" or tap["floor"]["relative_l2"] > 0
        assert tap["limit"] >= 0
        assert tap["minimum_tolerance"] >= tap["free"]["relative_l2"]  # 12
        assert tap["suggested_tolerance"]["atol"] >= tap["free"]["max_abs"]
    assert set(passed["inputs"]) >= {"audio", "mel", "weights"}
    semantic = {"kl_mean", "kl_p99", "kl_max", "same_top1", "tokens_identical", "wer"}
    assert set(passed["semantic"]) >= semantic
    assert {"max", "torch", "numpy"} <= set(passed["versions"])
    assert passed["cpu"]
    assert passed["threads"] >= 1
    assert passed["command"].startswith("python -m validation parity")
    frames = passed["plots"]["frames"]["relative_l2"]
    assert len(frames) in (1500, 3000)


def test_1_both_sides_get_the_same_bytes_and_the_report_has_their_hashes(
    passed: dict, demo_checkpoint: Checkpoint
):
    audio = load_audio(DEMO)
    mel = windows(audio, 80)
    assert passed["inputs"]["audio"] == hashlib.sha256(audio.tobytes()).hexdigest()
    assert passed["inputs"]["mel"] == hashlib.sha256(mel[0].numpy().tobytes()).hexdigest()
    assert passed["inputs"]["weights"] == demo_checkpoint.source.sha256
    assert passed["taps"][0]["free"]["max_abs"] == 0


def test_2_the_reference_was_checked_against_itself(passed: dict):
    assert passed["alive"]["hooked_equals_unhooked"] is True
    assert passed["alive"]["repeatable"] is True
    assert 0 < passed["alive"]["functional_worst"] < 1e-4


def test_3_max_ran(passed: dict):
    assert passed["ran"]["kernels"]["max_whisper.qkv_attention"] == 4
    assert passed["ran"]["output_changed_by"] > 0.01


def test_6_own_error_is_apart_from_inherited_error(golden: Golden, demo_checkpoint, tensors):
    """A fault in block 1 is inherited by block 2; injected and own errors of block 2 are clean."""
    twin = Twin(demo_checkpoint, FAULTS["S14"], layer=1)
    judged, _ = judge_window(twin, golden, tensors, demo_checkpoint.dims)
    by_name = {j.stage.name: j for j in judged}
    wrong, heir = by_name["blocks.1.attn.query"], by_name["blocks.2.attn.query"]
    assert wrong.free.relative_l2 > wrong.limit
    assert wrong.own is not None
    assert wrong.own.relative_l2 > wrong.injected_limit
    assert heir.free.relative_l2 > heir.limit
    assert heir.injected is not None
    assert heir.own is not None
    assert heir.injected.relative_l2 < heir.injected_limit
    assert heir.own.relative_l2 < heir.injected_limit


def test_9_edge_frames_are_measured_apart(golden: Golden, demo_checkpoint: Checkpoint):
    reference = golden.taps["conv1"]
    broken = reference.clone()
    broken[0, 0] += 1.0
    found = error(broken[0], reference[0])
    assert found.edge_relative_l2 > 10 * found.relative_l2


def test_10_the_observer_changes_next_to_nothing(passed: dict):
    assert 0 <= passed["observer"] < 2e-6


def test_11_the_weights_stage_names_every_tensor(passed: dict, demo_checkpoint: Checkpoint):
    listed = {t["name"]: t for t in passed["inputs"]["tensors"]}
    for name, tensor in demo_checkpoint.encoder_tensors().items():
        assert listed[name]["shape"] == list(tensor.shape)
        assert listed[name]["dtype"] == "float16"
        digest = hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()
        assert listed[name]["sha256"] == digest


def test_13_and_14_the_transcript_is_judged_by_tokens_and_words(passed: dict):
    found = passed["semantic"]
    assert found["tokens_identical"] is True
    assert found["wer"] == 0
    assert found["same_top1"] == 1
    assert found["kl_max"] < 1e-8
    assert found["wer_truth_reference"] == found["wer_truth_candidate"]
    assert found["coverage"]["reference"] == found["coverage"]["candidate"]


@pytest.mark.parametrize("fault", ["S14", "E21"])
def test_17_a_damaged_checkpoint_is_diagnosed_through_max(
    fault: str, tmp_path: Path, demo_checkpoint: Checkpoint, capsys
):
    """Other weights bound to the compiled graph: located and named, exit status 1."""
    damaged = FAULTS[fault].damage(demo_checkpoint, None)
    tensors = {n: t for n, t in damaged.tensors.items() if n.startswith("encoder.")}
    export(replace(damaged, tensors=tensors), tmp_path / "damaged.safetensors")
    status, report = run(
        DEMO, "--model", "demo", "--candidate-model", str(tmp_path / "damaged.safetensors"),
        "--no-transcript", report=tmp_path / "r.json",
    )  # fmt: skip
    assert status == 1
    assert report["verdict"] == "fail"
    assert report["first_diverging"] == FAULTS[fault].diverges_at()
    assert report["cause"]["id"] == FAULTS[fault].cause
    assert report["first_diverging"] in capsys.readouterr().out
    differ = [
        t["name"] for t in report["inputs"]["tensors"] if t["sha256"] != t["candidate_sha256"]
    ]
    assert differ


def test_17_a_right_twin_passes(golden: Golden, demo_checkpoint: Checkpoint, tensors):
    judged, _ = judge_window(Twin(demo_checkpoint), golden, tensors, demo_checkpoint.dims)
    assert all(j.passed for j in judged)


def test_17_no_clean_run_of_the_calibration_is_over_four_fifths_of_a_limit():
    """200 runs and more, of two checkpoints. Where other limits were in force, of each tap the
    largest error and the largest multiple of its floor are known: if either is that far below
    today's, no run can have been over."""
    runs, files = 0, sorted((DOCS / "parity").glob("calibration-*.json"))
    for path in files:
        found = json.loads(path.read_text())
        runs += found["runs"]
        measured_with = {
            "free_multiple": limits.FREE_MULTIPLE,
            "free_absolute": limits.FREE_ABSOLUTE,
            "own_multiple": limits.OWN_MULTIPLE,
            "own_absolute": limits.OWN_ABSOLUTE,
        }
        if found["limits"] == measured_with:
            assert found["false_alarms"] == []
            assert found["worst"]["values"]["ratio_to_limit"] <= 0.8
            continue
        for tap in found["taps"].values():
            worst = tap["values"]
            for kind, multiple, absolute in (
                ("free", limits.FREE_MULTIPLE, limits.FREE_ABSOLUTE),
                ("injected", limits.OWN_MULTIPLE, limits.OWN_ABSOLUTE),
                ("own", limits.OWN_MULTIPLE, limits.OWN_ABSOLUTE),
            ):
                below = worst.get(f"{kind}_over_floor", 0) <= 0.8 * multiple
                assert below or worst[kind] <= 0.8 * absolute
    assert len(files) >= 2
    assert runs >= 200


def test_nan_in_the_candidate_fails_at_its_tap(golden: Golden, demo_checkpoint, tensors):
    taps = dict(golden.taps)
    taps["blocks.1.mlp.0"] = taps["blocks.1.mlp.0"].clone()
    taps["blocks.1.mlp.0"][0, 7, 9] = float("nan")
    judged = judge(taps, None, golden, tensors, demo_checkpoint.dims)
    failed = [j.stage.name for j in judged if not j.passed]
    assert failed == ["blocks.1.mlp.0"]


def dump(path: Path, taps: dict[str, torch.Tensor]) -> Path:
    np.savez(path, **{name: x[0].numpy() for name, x in taps.items()})
    return path


def test_another_mel_is_the_first_thing_that_is_named(
    tmp_path: Path, golden: Golden, demo_checkpoint: Checkpoint
):
    shifted = torch.roll(golden.mel, 2, dims=2)
    path = dump(tmp_path / "dump.npz", Twin(demo_checkpoint).taps(shifted))
    status, report = run(
        DEMO, "--model", "demo", "--candidate", f"npz:{path}", report=tmp_path / "r.json"
    )
    assert status == 1
    assert report["first_diverging"] == "mel"
    assert report["observer"] is None
    assert report["semantic"] is None


def test_a_dump_of_some_taps_is_judged_by_those(
    tmp_path: Path, golden: Golden, demo_checkpoint: Checkpoint
):
    taps = Twin(demo_checkpoint).taps(golden.mel)
    few = {name: taps[name] for name in ("conv1", "blocks.1", "ln_post")}
    contiguous = {name: np.ascontiguousarray(x[0].numpy()) for name, x in few.items()}
    save_file(contiguous, tmp_path / "dump.safetensors")
    candidate = f"npz:{tmp_path / 'dump.safetensors'}"
    status, report = run(DEMO, "--model", "demo", "--candidate", candidate, report=tmp_path / "r")
    assert status == 0
    assert [t["name"] for t in report["taps"]] == list(few)
    assert all(t["injected"] is None for t in report["taps"])


def test_16_a_golden_takes_the_place_of_the_reference(
    tmp_path: Path, golden: Golden, demo_checkpoint: Checkpoint, monkeypatch, capsys
):
    path = dump(tmp_path / "dump.npz", Twin(demo_checkpoint).taps(golden.mel))
    kept = str(tmp_path / "golden.safetensors")
    common = ["--model", "demo", "--candidate", f"npz:{path}"]
    status, first = run(DEMO, *common, "--save", kept, report=tmp_path / "1.json")
    assert status == 0
    monkeypatch.setattr(command, "Reference", None)  # nobody may run it now
    status, second = run("--load", kept, *common, report=tmp_path / "2.json")
    assert status == 0
    assert second["inputs"]["audio"] == first["inputs"]["audio"]
    assert [t["free"] for t in second["taps"]] == [t["free"] for t in first["taps"]]
    other = tmp_path / "other.safetensors"
    changed = {**demo_checkpoint.tensors}
    changed["encoder.conv1.bias"] = changed["encoder.conv1.bias"] + 1
    encoder = {n: t for n, t in changed.items() if n.startswith("encoder.")}
    export(replace(demo_checkpoint, tensors=encoder), other)
    capsys.readouterr()
    assert main(["parity", "--load", kept, "--model", str(other)]) == 2
    assert "SHA-256" in capsys.readouterr().err


def test_16_fail_fast_stops_at_the_first_failing_tap(
    tmp_path: Path, golden: Golden, demo_checkpoint: Checkpoint
):
    twin = Twin(demo_checkpoint, FAULTS["S14"], layer=1)
    path = dump(tmp_path / "dump.npz", twin.taps(golden.mel))
    status, report = run(
        DEMO, "--model", "demo", "--candidate", f"npz:{path}", "--fail-fast", report=tmp_path / "r"
    )
    assert status == 1
    assert report["taps"][-1]["name"] == report["first_diverging"] == "blocks.1.attn.query"


def test_several_files_give_one_report_with_a_line_for_each(tmp_path: Path):
    files = [DEMO, str(SAMPLES / sample_rows()[0]["file"])]
    status, report = run(
        *files, "--model", "demo", "--candidate", "torch", "--no-transcript", report=tmp_path / "r"
    )
    assert status == 0
    assert [f["file"] for f in report["files"]] == [Path(f).name for f in files]
    worst = max(f["worst_ratio"] for f in report["files"])
    assert worst == pytest.approx(max(t["ratio"] for t in report["taps"]))


def test_a_module_as_candidate(tmp_path: Path, monkeypatch):
    """A foreign encoder behind an import: here stock's with one bias lost on the way."""
    (tmp_path / "their_port.py").write_text(
        "from validation.reference import stock_encoder\n"
        "def encoder(checkpoint):\n"
        "    module = stock_encoder(checkpoint)\n"
        "    module.blocks[2].attn.out.bias.data.zero_()\n"
        "    return module\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    status, report = run(
        DEMO, "--model", "demo", "--candidate", "module:their_port:encoder", "--no-transcript",
        report=tmp_path / "r",
    )  # fmt: skip
    assert status == 1
    assert report["first_diverging"] == "blocks.2.attn.out"
    assert "blocks.2.attn.out.bias" in report["cause"]["sentence"]


def port(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> str:
    """An importable module with `text` in it, as a candidate."""
    name = f"port_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return f"module:{name}:encoder"


def test_a_candidate_that_changes_weights_in_place_does_not_reach_the_reference(
    tmp_path: Path, monkeypatch
):
    candidate = port(
        tmp_path,
        monkeypatch,
        "from validation.reference import stock_encoder\n"
        "def encoder(checkpoint):\n"
        "    checkpoint.tensors['encoder.blocks.2.attn.out.bias'].zero_()\n"
        "    return stock_encoder(checkpoint)\n",
    )
    status, report = run(
        DEMO, "--model", "demo", "--candidate", candidate, "--no-transcript", report=tmp_path / "r"
    )
    assert status == 1
    assert report["first_diverging"] == "blocks.2.attn.out"


@pytest.mark.parametrize(
    "body",
    [
        "    class Theirs(Exception): pass\n    raise Theirs('broken')\n",
        "    import sys; sys.exit(0)\n",
        "    return lambda mel: {'mel': mel}\n",
    ],
)
def test_a_candidate_that_cannot_be_compared_is_a_sentence_and_status_2(
    body: str, tmp_path: Path, monkeypatch, capsys
):
    candidate = port(tmp_path, monkeypatch, "def encoder(checkpoint):\n" + body)
    assert main(["parity", DEMO, "--model", "demo", "--candidate", candidate]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_candidate_of_some_taps_has_no_transcript(tmp_path: Path, monkeypatch):
    """By default the stage is left out; a pass says how far it can tell."""
    candidate = port(
        tmp_path,
        monkeypatch,
        "from validation.faults import Twin\n"
        "def encoder(checkpoint):\n"
        "    twin = Twin(checkpoint)\n"
        "    return lambda mel: {n: x for n, x in twin.taps(mel).items() if n == 'conv2'}\n",
    )
    status, report = run(DEMO, "--model", "demo", "--candidate", candidate, report=tmp_path / "r")
    assert status == 0
    assert report["final"] is None
    assert report["semantic"] is None


def test_an_observer_that_changes_the_graph_gives_no_verdict(
    monkeypatch, golden: Golden, demo_checkpoint: Checkpoint
):
    candidate = MaxCandidate(demo_checkpoint)
    moved = golden.taps["ln_post"] * 1.001
    monkeypatch.setattr(candidate, "tapped", lambda mel: {"ln_post": moved})
    monkeypatch.setattr(candidate, "engine", lambda mel: golden.taps["ln_post"])
    monkeypatch.setattr(command, "ran", lambda *a: {"perturbed": "x", "output_changed_by": 1.0})
    with pytest.raises(ParityError, match="production"):
        command.check_max(candidate, golden.mel)
    monkeypatch.setattr(candidate, "tapped", lambda mel: golden.taps)
    monkeypatch.setattr(command, "ran", lambda *a: {"perturbed": "x", "output_changed_by": 0.0})
    with pytest.raises(ParityError, match="did MAX run"):
        command.check_max(candidate, golden.mel)


def test_an_interrupt_is_a_sentence(monkeypatch, capsys):
    def interrupted(args, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", interrupted)
    assert main(["parity", DEMO, "--model", "demo"]) == 130
    assert capsys.readouterr().err == "validation parity: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.flac", "--model", "demo"], "missing.flac"),
        ([DEMO, "--model", "missing.safetensors"], "missing.safetensors"),
        ([DEMO, "--model", "demo", "--candidate", "tensorflow"], "tensorflow"),
        ([DEMO, "--model", "demo", "--candidate", "npz:missing.npz"], "missing.npz"),
        (["--load", "missing.golden", "--model", "demo"], "missing.golden"),
        ([DEMO, "--model", "demo", "--truth", "missing.txt"], "missing.txt"),
        ([DEMO, "--model", "demo", "--json", "/missing/r.json"], "/missing"),
        ([DEMO, "--load", "x", "--model", "demo"], "--load"),
        (["--model", "demo"], "audio"),
        ([DEMO, "--model", "demo", "--windows", "0"], "--windows"),
        ([DEMO, "--candidate", "npz:x.npz", "--candidate-model", "demo"], "own weights"),
        ([DEMO, "--candidate", "npz:x.npz", "--transcript"], "transcript"),
        ([DEMO, "--truth", "x", "--windows", "1"], "--truth"),
        ([DEMO, "--save", "x", "--fail-fast"], "--save"),
        ([DEMO, "--json", "x", "--html", "x"], "twice"),
        ([DEMO, "--json", "."], "folder"),
        ([DEMO, "--device", "gpu", "--candidate", "torch"], "of the candidate max alone"),
        ([DEMO, "--device", "gpu", "--part", "decoder"], "for the encoder"),
    ],
)
def test_what_cannot_be_done_is_a_sentence_and_status_2(arguments: list[str], said: str, capsys):
    try:
        status = main(["parity", *arguments])
    except SystemExit as leaving:  # argparse, about the usage
        status = int(str(leaving.code))
    assert status == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_gpu_that_is_not_there_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(encoder.engine, "accelerator_count", lambda: 0)
    arguments = [DEMO, "--model", "demo", "--device", "gpu", "--no-transcript"]
    assert main(["parity", *arguments]) == 2
    assert "device gpu was asked for and MAX sees none" in capsys.readouterr().err


def test_the_module_lists_its_commands(capsys):
    assert main([]) == 2
    assert "parity" in capsys.readouterr().out
    assert main(["pairty"]) == 2
    assert "pairty" in capsys.readouterr().err


def test_18_max_is_asked_once_a_window(monkeypatch, golden: Golden, demo_checkpoint, tensors):
    """No hidden second run: one of the tapped graph, one of the stages."""
    candidate = MaxCandidate(demo_checkpoint)
    runs = []
    monkeypatch.setattr(candidate, "tapped", lambda mel: runs.append("taps") or golden.taps)
    monkeypatch.setattr(candidate, "stages", lambda r, t: runs.append("stages") or golden.taps)
    judge_window(candidate, golden, tensors, demo_checkpoint.dims)
    assert runs == ["taps", "stages"]


class TestOnRealWeights:
    """Third tier: OpenAI's encoder on real speech, and a tiny.en with a re-fitted embedding."""

    def test_the_real_encoder_passes(self, real_checkpoint: Checkpoint, jfk: Path, tmp_path: Path):
        status, report = run(
            str(jfk), "--model", real_checkpoint.source.name, report=tmp_path / "r"
        )
        assert status == 0
        assert report["semantic"] is None  # no decoder
        assert report["final"]["free"]["relative_l2"] < 1e-5

    def test_a_fault_on_the_real_encoder(
        self, real_checkpoint: Checkpoint, jfk: Path, tmp_path: Path
    ):
        fault = "S16"
        damaged = FAULTS[fault].damage(real_checkpoint, None)
        export(damaged, tmp_path / "damaged.safetensors")
        status, report = run(
            str(jfk), "--model", real_checkpoint.source.name, "--candidate-model",
            str(tmp_path / "damaged.safetensors"), report=tmp_path / "r",
        )  # fmt: skip
        assert status == 1
        assert report["first_diverging"] == FAULTS[fault].diverges_at()
        assert report["cause"]["id"] == FAULTS[fault].cause

    def test_the_refitted_checkpoint_passes_down_to_the_tokens(self, jfk: Path, tmp_path: Path):
        from conftest import shared

        path = str(shared("whisper-tiny.en/tiny.en.refit-v0.safetensors"))
        assert weights.load(path).has_decoder
        status, report = run(str(jfk), "--model", path, report=tmp_path / "r")
        assert status == 0
        assert report["semantic"]["tokens_identical"] is True


def test_the_worst_ratio_counts_every_kind_of_error(golden: Golden, demo_checkpoint, tensors):
    judged = judge(golden.taps, golden.taps, golden, tensors, demo_checkpoint.dims)
    j: Judged = next(j for j in judged if j.stage.name == "blocks.1")
    assert j.ratio <= 1
    far = error(golden.taps["blocks.1"][0] * 1.001, golden.taps["blocks.1"][0])
    assert replace(j, injected=far).ratio > 1
    assert replace(j, own=far).ratio > 1
    assert replace(j, free=far).ratio > 1
