"""The benchmark's statistics, its tables, what it refuses, and a small run from end to end."""

from __future__ import annotations

import json
import os
import signal
import xml.etree.ElementTree as ET
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from safetensors.torch import save_file
from test_peers import ENGLISH

import encoder.engine
from encoder.engine import EngineError
from validation import benchmark, benchmark_measure
from validation.benchmark_measure import (
    BenchmarkError,
    Heard,
    Part,
    Plan,
    enough_windows,
    measure_encoders,
    measure_transcripts,
)
from validation.benchmark_plot import svg_ratios
from validation.benchmark_report import markdown, peers_better, targets
from validation.benchmark_statistics import ratio_of_medians
from validation.benchmark_systems import BATCHED_NAME, OURS, Job, system
from validation.benchmark_worker import FEATURES, Answer, Worker, WorkerError, peak_memory
from validation.peers import PEERS
from validation.peers import Heard as Said
from weights import expected_shapes

# ---------------------------------------------------------------- statistics


def test_the_ratio_is_that_of_the_medians():
    ratio = ratio_of_medians([1.0, 2.0, 9.0], [4.0, 4.0, 1.0])
    assert (ratio.value, ratio.low, ratio.high) == (0.5, None, None)


def test_a_machine_that_slows_both_sides_does_not_widen_the_interval():
    """Rounds are drawn, both sides together; drawn apart the interval would be wide."""
    slow = np.array([1.0, 3.0, 1.5, 7.0, 2.0, 5.0, 1.2])
    ratio = ratio_of_medians(list(0.5 * slow), list(slow))
    assert ratio.value == ratio.low == ratio.high == pytest.approx(0.5)


def test_the_interval_holds_what_the_rounds_leave_open():
    rng = np.random.default_rng(1)
    ours, base = 0.8 + 0.1 * rng.random(21), 1 + 0.1 * rng.random(21)
    ratio = ratio_of_medians(list(ours), list(base))
    assert ratio.low is not None
    assert ratio.high is not None
    assert 0.7 < ratio.low < ratio.value < ratio.high < 0.95
    assert ratio == ratio_of_medians(list(ours), list(base))  # the seed decides


@pytest.mark.parametrize("base", [[], [1.0, 2.0]])
def test_rounds_that_do_not_pair_are_refused(base: list[float]):
    with pytest.raises(ValueError, match="do not pair"):
        ratio_of_medians([1.0][: len(base)], base)


def test_windows_are_all_different():
    mel = np.random.default_rng(1).random((2, 3, 3000), np.float32)
    found = enough_windows(mel, 5)
    assert np.array_equal(found[:2], mel)
    assert len({row.tobytes() for row in found}) == 5
    assert np.array_equal(enough_windows(mel, 1), mel[:1])


# ---------------------------------------------------------------- systems


def test_every_variant_and_peer_is_a_system():
    assert [system(name).name for name in (*OURS, *PEERS)] == [*OURS, *PEERS]
    assert system("gpu-float16").precision == "float16"
    assert system("gpu").precision == system("max-gpu").precision == "tf32"  # docs/gpu.md
    assert system("max").precision == "float32"
    assert not system(BATCHED_NAME).encodes
    assert not system(BATCHED_NAME).compiles
    assert system("max-fast").compiles
    assert BATCHED_NAME in OURS


def test_max_gpu_asks_for_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder.engine, "accelerator_count", lambda: 0)
    one, said = system("max-gpu"), "device gpu was asked for and MAX sees none"
    assert said in str(one.cannot_run())
    with pytest.raises(EngineError, match=said):
        one.load(Job("max-gpu", "demo", True, 1, tmp_path))


class FakeWorker:
    """Answers at once: the reference's features times `factor`, or a failure."""

    factor: dict[str, float]
    fails: dict[str, str]
    texts: dict[str, str]
    reference: np.ndarray

    def __init__(self, job: Job, changes: Any = None):
        self.job, self.start = job, 1.0
        if self.fails.get(job.system) == "start":
            raise WorkerError("it does not start")
        self.loaded = Answer(0.0, 1, {"flushes_denormals": False})
        self.calls = 0

    def ask(self, what: str, *arguments: Any) -> Answer:
        name = self.job.system
        self.calls += 1
        if self.fails.get(name) == "later" and self.calls > 2:
            raise WorkerError("it broke down")
        if what == "encoder":
            features = self.reference[: arguments[0]] * self.factor.get(name, 1.0)
            np.save(self.job.folder / FEATURES.format(name), features)
            return Answer(2.0 if name == "cpu" else 1.0, 100)
        return Answer(1.0, 100, Said(self.texts.get(name, "red tree"), [1, 2, 50400]))

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    FakeWorker.factor, FakeWorker.fails, FakeWorker.texts = {}, {}, {}
    FakeWorker.reference = np.random.default_rng(1).standard_normal((2, 4, 4))
    monkeypatch.setattr(benchmark_measure, "Worker", FakeWorker)
    return FakeWorker


def part_of(names: list[str], folder: Path, *first: Any, rounds: int = 5) -> Part:
    def job(name: str) -> Job:
        return Job(name, "demo", True, 1, folder)

    return Part({name: system(name) for name in names}, job, Plan(rounds, 1, 0), first, {})


def test_every_system_takes_part_in_every_round(fake, tmp_path):
    part = part_of(["cpu", "max", "openvino"], tmp_path, "encoder", 1)
    rows = measure_encoders(part, [1, 2], fake.reference, tmp_path)
    assert [(row["system"], row["batch"]) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in ("cpu", "max", "openvino")
    ]
    assert all(len(row["seconds"]) == 5 for row in rows)
    assert rows[1]["ratio"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert rows[1]["times_real_time"] == 30.0
    assert part.starts["max"]["warm"] == [2.0]


@pytest.mark.parametrize("factor", [1.001, float("nan"), 0.0])
def test_wrong_features_are_not_timed(fake, tmp_path, factor):
    fake.factor["max"] = factor
    part = part_of(["cpu", "max"], tmp_path, "encoder", 1)
    rows = measure_encoders(part, [1], fake.reference, tmp_path)
    assert [row["system"] for row in rows] == ["cpu"]
    assert part.problems["max"].startswith("wrong output, not timed: batch 1 is ")


def test_a_lower_precision_may_be_further_from_the_reference(fake, tmp_path):
    fake.factor["openvino-bfloat16"] = 1.001
    part = part_of(["cpu", "openvino-bfloat16"], tmp_path, "encoder", 1)
    assert len(measure_encoders(part, [1], fake.reference, tmp_path)) == 2


@pytest.mark.parametrize(
    ("when", "said"), [("start", "it does not start"), ("later", "it broke down")]
)
def test_a_system_that_fails_is_a_sentence(fake, tmp_path, when, said):
    fake.fails["openvino"] = when
    part = part_of(["cpu", "openvino"], tmp_path, "encoder", 1)
    rows = measure_encoders(part, [1], fake.reference, tmp_path)
    assert [row["system"] for row in rows] == ["cpu"]
    assert part.problems == {"openvino": said}


def test_without_the_reference_there_is_no_benchmark(fake, tmp_path):
    fake.fails["cpu"] = "start"
    part = part_of(["cpu", "max"], tmp_path, "encoder", 1)
    with pytest.raises(BenchmarkError, match="cpu, to which all ratios are, failed: it does not"):
        measure_encoders(part, [1], fake.reference, tmp_path)


def test_transcripts_are_held_against_the_reference_and_the_truth(fake, tmp_path):
    fake.texts = {"max": "red three", "pywhispercpp": "blue bird"}
    part = part_of(["cpu", "max", "pywhispercpp"], tmp_path, "transcribe", 0, "en")
    rows = measure_transcripts(part, [Heard("a.flac", 10.0, "red tree")], "en", 50256)
    assert [row["system"] for row in rows] == ["cpu", "max"]
    assert [row["wer_truth"] for row in rows] == [0.0, 0.5]
    assert [row["wer_reference"] for row in rows] == [0.0, 0.5]
    assert rows[1]["tokens_identical"]
    assert rows[1]["times_real_time"] == 10.0
    assert part.problems["pywhispercpp"] == (
        "wrong text, not timed: 100 % of the words of a.flac differ from cpu's"
    )


# ---------------------------------------------------------------- what is printed


def timed(name: str, seconds: float, **more: Any) -> dict[str, Any]:
    rounds = [seconds] * 5
    ratio = asdict(ratio_of_medians(rounds, [1.0] * 5))
    return {
        "system": name,
        "seconds": rounds,
        "median": seconds,
        "ratio": ratio,
        "times_real_time": 30 / seconds,
        "peak_bytes": 2**20,
        **more,
    }


def encoder_row(name: str, seconds: float) -> dict[str, Any]:
    return timed(name, seconds, batch=1, relative_l2=1e-6, limit=1e-4)


def transcript_row(name: str, seconds: float, file: str = "a|b.flac") -> dict[str, Any]:
    return timed(
        name,
        seconds,
        file=file,
        text="one",
        tokens=[1],
        same_text_each_round=True,
        wer_truth=0.25,
        wer_reference=0.0,
        tokens_identical=False,
        text_tokens_identical=True,
    )


FOUND: dict[str, Any] = {
    "schema": 1,
    "kind": "benchmark",
    "model": "demo",
    "weights_sha256": "0" * 64,
    "systems": [
        {"name": n, "what": "it", "peer": n in PEERS, "precision": p, "problem": problem}
        for n, p, problem in [
            ("cpu", "float32", None),
            ("gpu", "float32", "there is none"),
            ("max", "float32", None),
            ("max-fast", "float32", None),
            (BATCHED_NAME, "float32", None),
            ("openvino", "float32", None),
            ("openvino-bfloat16", "bfloat16", None),
        ]
    ],
    "recordings": [
        {"file": "a|b.flac", "seconds": 20.0, "truth": True},
        {"file": "c.flac", "seconds": 2.0, "truth": True},
    ],
    "encoder": [
        encoder_row("cpu", 1.0),
        encoder_row("max", 0.85),
        encoder_row("openvino", 0.8),
        encoder_row("openvino-bfloat16", 0.4),
    ],
    "encoder_starts": {
        "max": {"warm": [2.0], "cold": 200.0, "peak_bytes": 600 * 2**20},
        "openvino": {"warm": [1.0], "cold": None, "peak_bytes": 200 * 2**20},
    },
    "transcripts": [transcript_row("cpu", 1.0), transcript_row("max-fast", 0.5)],
    "transcript_starts": {},
    "remarks": ["pywhispercpp: otherwise."],
    "rounds": 5,
    "seed": 0,
    "threads": 2,
    "cpu": "a processor",
    "cpus": 2,
    "machine": "x86_64",
    "instructions": ["avx2"],
    "load": 0.25,
    "versions": {"max": "26.7.0"},
    "command": "python -m validation benchmark",
    "commit": None,
    "seconds": 60.0,
}
FOUND |= {"targets": targets(FOUND), "peers_better": peers_better(FOUND)}


def test_the_targets_are_judged_on_the_longest_recording():
    fast, batched, of_cpu, of_peer = targets(FOUND)
    assert fast["name"].startswith("max-fast, a|b.flac (20.0 s)")
    assert (fast["met"], fast["limit"], fast["ratio"]["value"]) == (True, 0.6, 0.5)
    assert (batched["met"], batched["ratio"]) == (None, None)
    assert (fast["wrong"], batched["wrong"]) == (None, None)
    assert of_cpu["met"]
    assert of_peer["name"].endswith("of the fastest float32 peer (openvino)")
    assert not of_peer["met"]
    assert of_peer["ratio"]["value"] == pytest.approx(0.85 / 0.8)


def test_no_wrong_text_meets_a_target():
    """max-fast must say what cpu says, a batch may have no more errors; both are fast enough."""
    wrong = deepcopy(FOUND)
    wrong["transcripts"][1]["text_tokens_identical"] = False
    batch = transcript_row(BATCHED_NAME, 0.3)
    wrong["transcripts"].append(batch)
    fast, batched, *_ = targets(wrong)
    assert (fast["met"], fast["wrong"]) == (False, "its text is not that of cpu")
    assert (batched["met"], batched["wrong"]) == (True, None)
    batch["wer_truth"] = 0.26
    assert targets(wrong)[1]["wrong"] == "WER 26.0 %, cpu 25.0 %"
    assert "missed: WER 26.0 %" in markdown(wrong | {"targets": targets(wrong)})
    batch["wer_truth"] = None
    assert not targets(wrong)[1]["met"]


def test_what_a_peer_does_better_is_said():
    said = peers_better(FOUND)
    assert said == [
        "openvino (float32), encoder: 0.94 (0.94 to 0.94) at batch 1 of max's time.",
        "openvino, features of one window: 200 MiB at most, max 600 MiB.",
        "openvino, features of one window: 1.0 s after an empty process, max 2.0 s.",
        "openvino-bfloat16 (bfloat16), encoder: 0.47 (0.47 to 0.47) at batch 1 of max's time.",
    ]
    slower = deepcopy(FOUND)
    for row in slower["encoder"][2:]:
        row["seconds"] = [2.0] * 5
    assert not any("encoder:" in sentence for sentence in peers_better(slower))


def test_an_interval_that_reaches_one_is_no_advantage():
    unsure = deepcopy(FOUND)
    unsure["encoder"][2]["seconds"] = [0.5, 0.5, 0.8, 1.2, 1.2]
    assert not any(s.startswith("openvino (float32), encoder") for s in peers_better(unsure))


def test_the_markdown_has_an_error_beside_every_time():
    text = markdown(FOUND)
    assert "| max | float32 | 0.850 | 0.85 (0.85 to 0.85) | 35 | 1.0e-6 | 1 |" in text
    assert "## Transcript of a\\|b.flac, 20.0 s" in text
    assert "| 25.0 % | 0.0 % | text identical |" in text
    assert "| gpu | there is none |" in text
    assert "- pywhispercpp: otherwise." in text
    assert "| missed |" in text
    assert "| not measured |" in text
    assert text.index("## What a peer does better") < text.index("## How it was measured")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_the_plot_has_a_dot_for_each_ratio():
    root = ET.fromstring(svg_ratios(FOUND))
    space = {"s": "http://www.w3.org/2000/svg"}
    titles = [title.text for title in root.findall(".//s:g/s:title", space)]
    assert len(titles) == 6
    assert any(t is not None and t.startswith("openvino-bfloat16: 0.40") for t in titles)
    assert "gpu" not in "".join(filter(None, titles))
    empty = FOUND | {"encoder": [], "transcripts": []}
    assert "nothing has a ratio" in svg_ratios(empty)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--starts", "0"], "--starts must be 1 or more"),
        (["--threads", "1000"], "--threads must be 1 to"),
        (["--batch", "1,x"], "--batch is '1,x', expected numbers"),
        (["--batch", "1,0"], "--batch is '1,0', expected numbers"),
        (["--batch", "2,2"], "names one size twice"),
        (["--variants", "max"], "--variants must name cpu"),
        (["--variants", "cpu,fast"], "--variants: 'fast' is none"),
        (["--peers", "torch"], "--peers: 'torch' is none"),
        (["--peers", "none,openvino"], "--peers is none, or some"),
        (["--truth", "a.txt"], "--truth belongs to audio files"),
        (["--language", "klingon"], "--language is 'klingon'"),
        (["--json", "no/such/folder/a"], "no/such/folder is no folder"),
        (["--json", "a", "--svg", "a"], "a is named twice"),
    ],
)
def test_what_cannot_hold_is_one_sentence(options, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["no-such.flac"], "no-such.flac: no such file."),
        ([str(SAMPLES / "demo.flac"), "--language", "de"], "knows English only, not de"),
        ([str(SAMPLES / "demo.flac"), "--model", "no-such.safetensors"], "no-such.safetensors"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(options, said, capsys):
    options = [*options, "--variants", "cpu", "--peers", "none", "--offline"]
    assert benchmark.main(options) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("validation benchmark: ")
    assert said in last


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a random model of one layer that listens to 30 s."""
    dims = replace(ENGLISH, n_audio_ctx=1500)
    generator = torch.Generator().manual_seed(3)
    shapes = expected_shapes(dims, decoder=True)
    tensors = {name: torch.randn(s, generator=generator).half() / 8 for name, s in shapes.items()}
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(tensors, path, {"dims": json.dumps(asdict(dims))})
    return path


def test_a_process_sleeps_until_it_is_asked_and_says_how_it_ended(tiny: Path, tmp_path: Path):
    np.save(tmp_path / "mel.npy", np.zeros((1, 80, 3000), np.float32))
    worker = Worker(Job("cpu", str(tiny), True, 1, tmp_path))
    try:
        pid = worker._process.pid
        assert pid is not None
        status = Path(f"/proc/{pid}/stat")
        if status.exists():
            assert status.read_text().rpartition(")")[2].split()[0] == "T"
        answer = worker.ask("encoder", 1)
        assert answer.seconds > 0
        assert answer.peak > worker.loaded.peak / 2
        assert np.load(tmp_path / FEATURES.format("cpu")).shape == (1, 1500, 64)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"gone|ended by SIGKILL"):
            worker.ask("encoder", 1)
    finally:
        worker.close()


def test_what_a_process_raises_is_a_sentence(tmp_path: Path):
    with pytest.raises(WorkerError, match=r"no-such\.safetensors"):
        Worker(Job("cpu", str(tmp_path / "no-such.safetensors"), True, 1, tmp_path))


def test_peak_memory_is_that_of_this_process():
    before = peak_memory()
    block = np.ones(64 * 2**20, np.uint8)
    assert peak_memory() >= max(before, block.nbytes)
    assert peak_memory() < 2**40


def test_a_small_run_from_end_to_end(tiny: Path, tmp_path: Path, capsys):
    for name in ("onnxruntime", "faster-whisper"):
        if reason := PEERS[name].cannot_run():
            pytest.skip(reason)
    outputs = {name: tmp_path / f"b.{name}" for name in ("json", "markdown", "svg")}
    status = benchmark.main(
        [
            str(SAMPLES / "espeak-ng-en-us.flac"),
            *("--truth", str(SAMPLES / "samples.json")),
            *("--model", str(tiny), "--variants", "cpu", "--peers", "onnxruntime,faster-whisper"),
            *("--rounds", "1", "--starts", "1", "--batch", "1,2", "--offline"),
            *(x for name, path in outputs.items() for x in (f"--{name}", str(path))),
        ]
    )
    assert status == 0
    found = json.loads(outputs["json"].read_text())
    assert [s["problem"] for s in found["systems"]] == [None] * 4
    assert [(r["system"], r["batch"]) for r in found["encoder"]] == [
        (name, batch) for batch in (1, 2) for name in ("cpu", "onnxruntime", "faster-whisper")
    ]
    assert all(r["relative_l2"] < 1e-4 for r in found["encoder"])
    rows = {r["system"]: r for r in found["transcripts"]}
    assert rows["cpu"]["tokens_identical"]
    assert rows["cpu"]["wer_truth"] is not None
    assert "faster-whisper" in rows
    assert found["schema"] == 1
    assert found["versions"]["onnxruntime"]
    assert "## Targets" in outputs["markdown"].read_text()
    ET.fromstring(outputs["svg"].read_text())
    assert "of cpu" in capsys.readouterr().out
