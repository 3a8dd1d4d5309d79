"""`python -m validation demo`: what it shows of the variants that run, and says of the others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import textwrap
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from conftest import SAMPLES, Pair, sample_rows
from rich.console import Console

from decoder_bridge.variants import VARIANTS, what_ran
from encoder.audio import load_audio
from encoder.engine import EngineError
from encoder.truth import word_errors
from validation import demo as command
from validation.__main__ import main as validation
from validation.demo import Lines, Live, Show, longest, main, run

FILE = str(SAMPLES / "demo.flac")
ARGV = [FILE, "--offline", "--variants"]


@pytest.fixture
def loaded(demo: Pair, monkeypatch) -> None:
    """cpu and max are the session's models; gpu cannot run, and the others are not asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, model in (("cpu", demo.stock), ("max", demo.ours)):
        given(monkeypatch, name, lambda *_, model=model: model)


def given(monkeypatch: pytest.MonkeyPatch, name: str, load: Callable[..., Any]) -> None:
    """A variant that can run and is loaded in this way."""
    variant = replace(VARIANTS[name], load=load, cannot_run=lambda _: None)
    monkeypatch.setitem(VARIANTS, name, variant)


class Otherwise:
    """The stock model, but for what it transcribes."""

    def __init__(self, stock: whisper.Whisper, transcribe: Callable[..., dict]):
        self.stock, self.transcribe = stock, transcribe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stock, name)


# ---------------------------------------------------------------- what it shows


def test_the_table(loaded, demo, capsys):
    """Text as it comes, a line for each variant, and the reason of the one that cannot run."""
    assert main([*ARGV, "max,gpu,cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines.index(f"cpu: {VARIANTS['cpu'].what}") < lines.index(f"max: {VARIANTS['max'].what}")
    spoken = demo.stock.transcribe(load_audio(FILE), fp16=False)["segments"][0]["text"]
    assert len([line for line in lines if line.startswith("[00:") and spoken in line]) == 2
    header = next(i for i, line in enumerate(lines) if line.startswith("variant"))
    columns = ["variant", "seconds", "speed (cpu = 1)", "RTF", "WER", "tokens as cpu's"]
    assert re.split(r"  +", lines[header].strip()) == columns
    rows = [line.split() for line in lines[header + 1 : header + 3]]
    assert [row[0] for row in rows] == ["cpu", "max"]
    assert rows[0][2] == "1.00"
    assert [row[-1] for row in rows] == ["all", "all"]
    assert f"cpu: {what_ran(demo.stock)}" in lines
    assert f"max: {what_ran(demo.ours)}" in lines
    assert lines[-2] == (
        "variant gpu cannot run: PyTorch sees no CUDA device here; use another --variant"
    )
    assert lines[-1] == "Each ran once, one after another: an impression, no benchmark."
    assert "\x1b" not in out


def test_json_on_stdout_is_all_that_is_there(loaded, demo, capsys):
    assert main([*ARGV, "cpu,gpu,max", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["schema"] == 1
    assert [row["variant"] for row in found["cannot_run"]] == ["gpu"]
    cpu, ours = found["variants"]
    assert (cpu["variant"], ours["variant"]) == ("cpu", "max")
    audio = load_audio(FILE)
    assert found["audio_seconds"] == len(audio) / 16000
    expected = demo.stock.transcribe(audio, fp16=False)
    (row,) = (row for row in sample_rows() if row["file"] == "demo.flac")
    assert found["truth"] == row["text"]
    errors = word_errors(row["text"], expected["text"], "en")
    for one, model in ((cpu, demo.stock), (ours, demo.ours)):
        assert one["text"] == expected["text"]
        assert [s["tokens"] for s in one["segments"]] == [s["tokens"] for s in expected["segments"]]
        assert one["wer"]["rate"] == errors.rate
        assert one["tokens_identical_to_cpu"] is True
        assert one["what_ran"] == what_ran(model)
        assert one["seconds"] > 0
        assert one["real_time_factor"] == pytest.approx(one["seconds"] / found["audio_seconds"])
        assert one["speed_against_cpu"] == pytest.approx(cpu["seconds"] / one["seconds"])
    assert cpu["speed_against_cpu"] == 1


def test_json_in_a_file_beside_the_lines(loaded, tmp_path, capsys):
    path = tmp_path / "demo.json"
    assert validation(["demo", *ARGV, "max", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    (row,) = found["variants"]
    assert row["speed_against_cpu"] is row["tokens_identical_to_cpu"] is None
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("max  ")).split()[2] == "-"
    assert os.listdir(tmp_path) == ["demo.json"]


def test_other_tokens_and_wrong_words_are_seen(loaded, demo, monkeypatch, tmp_path, capsys):
    def transcribe(audio: np.ndarray, **options: object) -> dict:
        result = demo.stock.transcribe(audio, **options)
        result["segments"][0]["tokens"] = result["segments"][0]["tokens"][:-2]
        return result

    given(monkeypatch, "max", lambda *_: Otherwise(demo.stock, transcribe))
    (tmp_path / "truth.txt").write_text("not this")
    argv = [*ARGV, "cpu,max", "--truth", str(tmp_path / "truth.txt")]
    assert main([*argv, "--json", str(tmp_path / "demo.json")]) == 0
    cpu, other = json.loads((tmp_path / "demo.json").read_text())["variants"]
    assert (cpu["tokens_identical_to_cpu"], other["tokens_identical_to_cpu"]) == (True, False)
    said = word_errors("not this", cpu["text"], "en")
    assert cpu["wer"]["rate"] == said.rate >= 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(("cpu ", "max "))}
    assert (rows["cpu"][-1], rows["max"][-1]) == ("all", "no")
    assert f" {100 * said.rate:.1f} % " in next(line for line in lines if line.startswith("max  "))


def test_without_a_truth_there_is_no_rate(loaded, tmp_path, capsys):
    copy = tmp_path / "speech.flac"
    copy.write_bytes(Path(FILE).read_bytes())
    assert main([str(copy), "--offline", "--variants", "cpu", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["truth"] is None
    assert found["variants"][0]["wer"] is None


def test_the_recording_is_the_lecture_or_else_the_longest(tmp_path):
    assert (
        longest(SAMPLES).name
        == max(sample_rows(), key=lambda row: (row["file"] == "lecture.flac", row["seconds"]))[
            "file"
        ]
    )
    rows = [{"file": "a.flac", "seconds": 9}, {"file": "lecture.flac", "seconds": 8}]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    assert longest(tmp_path).name == "lecture.flac"
    (tmp_path / "samples.json").write_text(json.dumps(rows[:1]))
    assert longest(tmp_path).name == "a.flac"


# ---------------------------------------------------------------- while it runs


class Seen(Show):
    """What a run says, and how many seconds it says are done."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[float] = []

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)

    def running(self, variant: str, seconds: float) -> Any:
        return contextlib.nullcontext(self.done.append)


def test_progress_follows_the_segments(demo):
    """The end of each segment, never beyond the recording's; the text before the run is over."""
    shown = Seen()
    counts: list[int] = []

    def transcribe(audio: np.ndarray, *, verbose: bool, fp16: bool) -> dict:
        assert verbose
        print("Detected language: Danish")
        print("[00:00.000 --> 00:02.500]  one")
        counts.append(len(shown.lines))
        print("[00:02.500 --> 01:00:01.000]  two")
        return demo.stock.transcribe(audio, fp16=fp16)

    variant = replace(VARIANTS["cpu"], load=lambda *_: Otherwise(demo.stock, transcribe))
    recording = command.Recording("noise", np.zeros(160_000, np.float32), None)
    ran = run(variant, None, recording, shown)
    assert shown.done == [2.5, 10.0, 10.0]
    assert shown.lines[1:4] == [
        "Detected language: Danish",
        "[00:00.000 --> 00:02.500]  one",
        "[00:02.500 --> 01:00:01.000]  two",
    ]
    assert counts == [3]
    assert ran.seconds > 0


def test_lines_are_handed_on_when_they_are_complete():
    taken: list[str] = []
    lines = Lines(taken.append)
    print("a", end="", file=lines)
    assert taken == []
    print("b\nc\nd", end="", file=lines)
    assert taken == ["ab", "c"]


def test_a_terminal_shows_progress_and_keeps_the_text():
    out = io.StringIO()
    show = Live(Console(file=out, force_terminal=True, width=100))
    with show.running("max-fast", 20.0) as done:
        show.say("[red]a text[/red] \x1b[2J")
        done(5.0)
        done(20.0)
    text = out.getvalue()
    assert "[red]a text[/red] \\x1b[2J" in text
    assert "max-fast" in text
    assert re.search(r"20\.0 of 20\.0 s of audio", text)
    assert re.search(r"RTF \d\.\d\d", text)


PROGRAM = """
    import sys, types, numpy as np, torch
    from dataclasses import replace
    from decoder_bridge.variants import VARIANTS
    from validation import demo
    class Model:
        dims = types.SimpleNamespace(n_mels=80, n_audio_layer=4, n_audio_state=384)
        device = torch.device("cpu")
        encoder = types.SimpleNamespace(engine=types.SimpleNamespace(device="cpu"))
        def decode(self, *_): pass
        def transcribe(self, audio, verbose, fp16):
            print("[00:00.000 --> 00:03.000]  a text")
            sys.stdin.read()
            return {"text": " a text", "segments": [], "language": "en"}
    VARIANTS["max"] = replace(VARIANTS["max"], load=lambda *_: Model())
    raise SystemExit(demo.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def program(stdout: int, stderr: int) -> Iterator[subprocess.Popen]:
    """The command as a program with a made-up model, which ends when its stdin does."""
    argv = [sys.executable, "-c", textwrap.dedent(PROGRAM), FILE, "--variants", "max"]
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        yield process
        process.kill()


def test_in_a_terminal():
    master, slave = pty.openpty()
    with program(slave, slave) as process:
        os.close(slave)
        seen = b""
        while b"a text" not in seen:
            seen += os.read(master, 65536)
        assert process.stdin is not None
        process.stdin.close()
        # On Linux the end of a terminal whose other side is closed is an OSError.
        with contextlib.suppress(OSError):
            while piece := os.read(master, 65536):
                seen += piece
        assert process.wait(60) == 0
    os.close(master)
    text = seen.decode()
    assert "[00:00.000 --> 00:03.000]  a text" in text
    assert "of audio" in text
    assert "no benchmark" in text
    assert "Traceback" not in text


def test_a_reader_that_leaves():
    with program(subprocess.PIPE, subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"max: ")
        process.stdout.close()
        process.stdin.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


# ---------------------------------------------------------------- what goes wrong


def test_an_interrupt_is_one_sentence(loaded, demo, monkeypatch, tmp_path, capsys):
    def transcribe(*_: object, **__: object) -> dict:
        raise KeyboardInterrupt

    given(monkeypatch, "cpu", lambda *_: Otherwise(demo.stock, transcribe))
    out = tmp_path / "demo.json"
    stdout = sys.stdout
    assert main([*ARGV, "cpu,max", "--json", str(out)]) == 130
    assert sys.stdout is stdout
    assert capsys.readouterr().err == "validation demo: interrupted\n"
    assert not out.exists()


def test_a_variant_that_breaks_down_is_listed_and_the_others_run(loaded, monkeypatch, capsys):
    def load(*_: object) -> None:
        raise EngineError("MAX cannot do it.\nmore")

    given(monkeypatch, "max", load)
    assert main([*ARGV, "cpu,max", "--json", "-"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in found["variants"]] == ["cpu"]
    reason = "variant max broke down: MAX cannot do it."
    assert found["cannot_run"] == [{"variant": "max", "reason": reason}]
    assert main([*ARGV, "max"]) == 2
    assert capsys.readouterr().err == f"validation demo: {reason[:-1]}\n"


def test_where_none_can_run(loaded, capsys):
    assert main([*ARGV, "gpu", "--model", "no-such"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("validation demo: variant gpu cannot run: PyTorch sees no CUDA device")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["absent.flac"], "absent.flac: no such file"),
        (["short.wav"], "short.wav is shorter than 10 ms"),
        ([FILE, "--truth", "absent.txt"], "absent.txt cannot be read: No such file or directory"),
        ([FILE, "--model", "no-such/path.pt"], "no-such/path.pt"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(loaded, tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    with wave.open("short.wav", "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(200))
    assert main([*argv, "--offline", "--variants", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1


def test_without_samples_a_recording_must_be_named(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "SAMPLES", tmp_path)
    assert main(["--offline", "--variants", "cpu"]) == 2
    assert "there are no bundled recordings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--variants", "cpu,tpu"], "'tpu' is no variant, expected some of cpu, gpu, max-att"),
        (["--variants", "cpu,cpu"], "cpu is named twice"),
        (["--variants", ""], "'' is no variant"),
        (["--json", "absent/a.json"], "absent/a.json cannot be written: absent is no folder"),
        (["--json", "."], ". is a folder, a file is expected"),
        (["a.flac", "--json", "a.flac"], "a.flac is named twice"),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, capsys, argv, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


def test_a_full_disk_is_one_sentence(loaded, monkeypatch, capsys):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main([*ARGV, "cpu"]) == 2
    says = "validation demo: nothing can be printed: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == says
