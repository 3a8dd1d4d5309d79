"""encoder/run.py with a model and an engine that are made up here: no compiler, no download."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from safetensors import safe_open
from whisper.model import ModelDimensions

from encoder.audio import load_audio, windows
from encoder.run import build_parser, main, transcribe_options

original = importlib.import_module("whisper.transcribe")  # whisper.transcribe is the function

DIMS = ModelDimensions(80, 1500, 8, 2, 1, 51865, 448, 8, 2, 1)


class WeightsError(Exception):
    pass


class EngineError(Exception):
    pass


class Model:
    """Says how long the recording is, one segment a second, in place of `whisper.Whisper`."""

    is_multilingual = True
    dims = DIMS
    encoder = types.SimpleNamespace(engine=types.SimpleNamespace(device="cpu"))

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.failure: Exception | None = None

    def transcribe(self, audio: np.ndarray, *, verbose: bool | None, **options: object) -> dict:
        self.calls.append({"audio": audio, "verbose": verbose, **options})
        if self.failure is not None:
            raise self.failure
        segments = [
            {"start": float(s), "end": s + 1.0, "text": f" second {s} ü", "words": []}
            for s in range(len(audio) // 16000)
        ]
        for segment in segments if options.get("word_timestamps") else ():
            segment["words"] = [{"word": segment["text"], "start": 0.0, "end": 1.0}]
        if verbose is not None:
            print("Detected language: Danish")
        if verbose:
            for segment in segments:
                print(f"[{segment['start']}] {segment['text']}")
        text = "".join(s["text"] for s in segments)
        return {"text": text, "segments": segments, "language": options.get("language") or "da"}


class Engine:
    """The mean of each pair of mel frames, in every one of n_audio_state places."""

    def __init__(self, checkpoint: types.SimpleNamespace, device: str = "auto"):
        self.dims, self.device = checkpoint.dims, device

    def __call__(self, mel: torch.Tensor) -> torch.Tensor:
        assert mel.shape == (1, 80, 3000)
        pairs = mel.mean(1).reshape(1, 1500, 2).mean(2)
        return pairs[:, :, None].expand(1, 1500, self.dims.n_audio_state).clone()


@dataclasses.dataclass
class World:
    """The modules that run.py imports when it needs them, and what it asked of them."""

    model: Model = dataclasses.field(default_factory=Model)
    loads: list[dict] = dataclasses.field(default_factory=list)
    failure: Exception | None = None

    def load_model(self, name: str, **how: object) -> Model:
        self.loads.append({"name": name, **how})
        if self.failure is not None:
            raise self.failure
        return self.model

    def load(self, spec: str, **how: object) -> types.SimpleNamespace:
        self.loads.append({"name": spec, **how})
        if self.failure is not None:
            raise self.failure
        source = types.SimpleNamespace(name=spec, revision=None, sha256="ab" * 32, path=Path(spec))
        return types.SimpleNamespace(dims=DIMS, source=source)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    for name, members in {
        "decoder_bridge": {"load_model": made.load_model},
        "encoder.engine": {"Engine": Engine, "EngineError": EngineError},
        "weights": {"load": made.load, "WeightsError": WeightsError},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def record(path: Path, seconds: float = 2) -> str:
    """A wav of noise at 16 kHz."""
    samples = np.random.default_rng(int(seconds * 100)).integers(-9000, 9000, int(seconds * 16000))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(samples.astype("<i2").tobytes())
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence of a usage error."""
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    usage, sentence = err.splitlines()
    assert usage.startswith("usage: ")
    return sentence


# ---------------------------------------------------------------- the options


def openai_parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that openai-whisper's `cli()` builds."""

    class Built(Exception):
        pass

    def parse_args(self: argparse.ArgumentParser, *_: object) -> None:
        raise Built(self)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Built) as built:
            original.cli()
    return built.value.args[0]


OTHER_DEFAULTS = {
    "--model": "tiny",
    "--device": "auto",
    "--output_dir": None,
    "--output_format": None,
    "--verbose": False,
    "--fp16": False,
}


def test_options_and_defaults_are_openais_but_for_the_stated_ones(monkeypatch):
    ours, theirs = build_parser()._option_string_actions, openai_parser(monkeypatch)
    assert len(theirs._option_string_actions) > 30
    differing = {}
    for flag, action in theirs._option_string_actions.items():
        assert flag in ours, flag
        assert ours[flag].dest == action.dest
        assert ours[flag].nargs == action.nargs
        if flag not in {"--model", "--device"}:
            assert (ours[flag].type or str) is (action.type or str), flag
            assert ours[flag].choices == action.choices, flag
        if ours[flag].default != action.default:
            differing[flag] = ours[flag].default
    assert differing == {**OTHER_DEFAULTS, "-o": None, "-f": None}
    assert set(ours) - set(theirs._option_string_actions) == {
        "--offline",
        "--features",
        "--truth",
        "--variant",
        "--batch_size",
    }


def test_help_states_every_difference():
    text = " ".join(build_parser().format_help().split())
    stated = text[text.index("what differs from openai-whisper") :]
    for flag in [*OTHER_DEFAULTS, "--offline", "--features", "--truth", "--threads", "--model_dir"]:
        assert flag in stated, flag
    assert "--variant" in stated
    assert "--batch_size" in stated


def test_transcribe_gets_what_openais_cli_gives_it(world, tmp_path, monkeypatch):
    """The very call of the original command line, but for the audio, which is decoded here."""
    path, seen = record(tmp_path / "a.wav"), []
    argv = "--temperature 0.4 --beam_size 3 --language English --clip_timestamps 0,1 --patience 2"
    argv += " --initial_prompt hej --suppress_tokens 1,2 --word_timestamps True"

    def their_transcribe(model: object, audio: str, **options: object) -> dict:
        seen.append(options)
        return {"segments": [], "text": ""}

    monkeypatch.setattr(whisper, "load_model", lambda *_, **__: None)
    monkeypatch.setattr(original, "transcribe", their_transcribe)
    theirs = ["whisper", "--output_dir", str(tmp_path), "--fp16", "False", path, *argv.split()]
    monkeypatch.setattr(sys, "argv", theirs)
    original.cli()

    assert main([path, *argv.split()]) == 0
    (call,) = world.model.calls
    np.testing.assert_array_equal(call.pop("audio"), load_audio(path))
    assert call.pop("verbose") is None
    assert seen[0].pop("verbose") is True
    assert call == seen[0]


def test_without_an_increment_there_is_one_temperature():
    args = build_parser().parse_args(["a", "--temperature_increment_on_fallback", "None"])
    assert transcribe_options(args)["temperature"] == [0]
    args = build_parser().parse_args(["a"])
    assert transcribe_options(args)["temperature"] == pytest.approx((0, 0.2, 0.4, 0.6, 0.8, 1.0))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--fp16 True", "--fp16 True cannot be done"),
        ("--highlight_words True", "--highlight_words requires --word_timestamps True"),
        ("--max_line_width 9", "--max_line_width requires --word_timestamps True"),
        ("--max_line_count 2", "--max_line_count requires --word_timestamps True"),
        ("--max_words_per_line 2", "--max_words_per_line requires --word_timestamps True"),
        ("--temperature 1.2", "--temperature above 1 needs"),
        ("--temperature_increment_on_fallback 0", "must be above 0"),
        ("--length_penalty 2", "--length_penalty must be between 0 and 1"),
        ("--patience 2 --beam_size None", "--patience requires --beam_size"),
        ("--clip_timestamps 1,x", "--clip_timestamps takes numbers"),
        ("--suppress_tokens x", "--suppress_tokens takes numbers"),
        ("--clip_timestamps=-1,2", "--clip_timestamps takes numbers"),
        ("--clip_timestamps 0,inf", "--clip_timestamps takes numbers"),
        ("--beam_size 0", "--beam_size must be 1 or more"),
        ("--best_of -1", "--best_of must be 1 or more"),
        ("--patience 0.05", "must round to 1 or more"),
        ("--temperature -1", "--temperature must be 0 or more"),
        ("--temperature_increment_on_fallback nan", "expected a finite number"),
        ("--logprob_threshold inf", "expected a finite number"),
        ("--device cuda", "invalid choice: 'cuda'"),
        ("--variant tpu", "invalid choice: 'tpu'"),
        ("--variant cpu --fp16 True", "variant cpu computes in float32"),
        ("--variant cpu --features f.safetensors", "--features is the output of MAX's encoder"),
        ("--batch_size 0", "--batch_size must be 1 or more"),
        ("--batch_size x", "invalid int value: 'x'"),
        ("--batch_size 2 --word_timestamps True", "--word_timestamps cannot hold with --batch_"),
        ("--batch_size 2 --condition_on_previous_text True", "--condition_on_previous_text cannot"),
        ("--batch_size 2 --initial_prompt a", "--initial_prompt cannot hold with --batch_size 2"),
        ("--batch_size 2 --carry_initial_prompt True", "--carry_initial_prompt cannot hold"),
        ("--batch_size 2 --clip_timestamps 1,2", "--clip_timestamps cannot hold"),
        ("--batch_size 2 --hallucination_silence_threshold 1", "threshold cannot hold"),
        ("--batch_size 2 --beam_size 5", "--beam_size with --batch_size needs --variant max-fast"),
        ("--batch_size 2 --features f.safetensors", "makes no transcript for --batch_size"),
        ("--language Klingon", "invalid choice: 'Klingon'"),
        ("b.wav --features f.safetensors", "--features takes exactly one audio file"),
        ("--features f.safetensors -o .", "--features makes no transcript"),
        ("--features f.safetensors --truth t.txt", "makes no transcript for --truth"),
        ("other/a.mp3 -f txt", "2 of the audio files would be written as a.*"),
    ],
)
def test_usage_errors(world, capsys, argv, says):
    assert says in refused(capsys, "a.wav", *argv.split())
    assert not world.loads


# ---------------------------------------------------------------- transcripts


def test_a_clip_ends_at_the_end_of_the_file(world, tmp_path, capsys):
    """Past it, whisper.transcribe would never return."""
    path = record(tmp_path / "a.wav")  # two seconds
    assert main([path, "--clip_timestamps", "0.5,1,1.5,100"]) == 0
    assert world.model.calls[-1]["clip_timestamps"] == "0.5,1.0,1.5,2.0"
    assert "past the end of the file, 2.0 s" in capsys.readouterr().err
    assert main([path, "--clip_timestamps", "0.5,2"]) == 0
    assert world.model.calls[-1]["clip_timestamps"] == "0.5,2"
    assert capsys.readouterr().err == ""


def test_a_token_that_the_vocabulary_lacks(world, tmp_path, capsys):
    path = record(tmp_path / "a.wav")
    assert main([path, "--suppress_tokens=-1,99999"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"encoder.run: --suppress_tokens: 99999 is none of the {DIMS.n_vocab} tokens.\n"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_mels": 96}, "takes 96 mel bins, openai-whisper makes 80 or 128"),
        ({"n_audio_ctx": 750}, "takes windows of 1500 frames, openai-whisper makes 3000"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--features", "f.safetensors"]])
def test_a_checkpoint_that_whispers_mel_does_not_fit(
    world, tmp_path, capsys, monkeypatch, changes, says, extra
):
    monkeypatch.chdir(tmp_path)
    path = record(tmp_path / "a.wav")
    monkeypatch.setattr(sys.modules[__name__], "DIMS", dataclasses.replace(DIMS, **changes))
    monkeypatch.setattr(Model, "dims", DIMS)
    assert main([path, *extra]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert not (tmp_path / "f.safetensors").exists()


def test_one_line_a_segment_on_stdout_and_nothing_else(world, tmp_path, capsys):
    path = record(tmp_path / "a.wav")
    before = sorted(tmp_path.iterdir())
    assert main([path, "--model", "demo", "--model_dir", "cache", "--offline"]) == 0
    out, err = capsys.readouterr()
    assert out == "second 0 ü\nsecond 1 ü\n"
    assert err == ""
    assert world.loads == [
        {
            "name": "demo",
            "device": "auto",
            "download_root": "cache",
            "offline": True,
            "variant": "max",
        }
    ]
    assert sorted(tmp_path.iterdir()) == before


def test_on_a_terminal_the_bar_and_the_language_go_to_stderr(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([record(tmp_path / "a.wav")]) == 0
    out, err = capsys.readouterr()
    assert world.model.calls[0]["verbose"] is False
    assert out == "second 0 ü\nsecond 1 ü\n"
    assert err == "Detected language: Danish\n"


def test_verbose_is_openais_output_and_is_not_repeated(world, tmp_path, capsys):
    assert main([record(tmp_path / "a.wav"), "--verbose", "True"]) == 0
    assert world.model.calls[0]["verbose"] is True
    out = capsys.readouterr().out
    assert out == "Detected language: Danish\n[0.0]  second 0 ü\n[1.0]  second 1 ü\n"


@pytest.mark.parametrize("verbose", ["True", "False"])
def test_several_files_have_headings(world, tmp_path, capsys, verbose):
    first, second = record(tmp_path / "a.wav", 1), record(tmp_path / "b.wav", 1)
    assert main([first, second, "--verbose", verbose]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"==> {first} <=="
    assert lines[len(lines) // 2] == f"==> {second} <=="
    assert len(lines) == (6 if verbose == "True" else 4)


@pytest.mark.parametrize(("language", "warned"), [("da", True), ("English", False), (None, False)])
def test_an_english_model_is_told_english(world, tmp_path, capsys, language, warned):
    world.model.is_multilingual = False
    argv = ["--language", language] if language else []
    assert main([record(tmp_path / "a.wav"), *argv]) == 0
    assert world.model.calls[0]["language"] in {"en", "English"}
    assert ("knows English only, not da" in capsys.readouterr().err) == warned


# ---------------------------------------------------------------- the last line

SPEED = r"2\.0 s heard in \d+\.\d s \(\d+\.\d times real time\) · "
ENCODER = r"encoder: MAX 26\.\S+ on cpu, 1 layers of 8\n"


def test_verbose_ends_with_the_time_it_took_and_the_encoder(world, tmp_path, capsys):
    assert main([record(tmp_path / "a.wav"), "--verbose", "True"]) == 0
    assert re.fullmatch(SPEED + ENCODER, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("language", "truth", "wrong"),
    [
        ("en", "\ufeffSecond zero, ü:\nsecond one. Ü", "0.0 % (0 S, 0 D, 0 I of 6 words)"),
        ("da", "Second zero, ü:\nsecond one. Ü", "33.3 % (2 S, 0 D, 0 I of 6 words)"),
        ("en", "the second 0 ü second ü", "33.3 % (0 S, 1 D, 1 I of 6 words)"),
        ("en", "um", "undefined (0 S, 0 D, 6 I of 0 words)"),
    ],
)
def test_truth_counts_words_as_openai_does(world, tmp_path, capsys, language, truth, wrong):
    (tmp_path / "truth.txt").write_text(truth, encoding="utf-8")
    path = record(tmp_path / "a.wav")
    assert main([path, "--truth", str(tmp_path / "truth.txt"), "--language", language]) == 0
    out, err = capsys.readouterr()
    assert out == "second 0 ü\nsecond 1 ü\n"
    assert re.fullmatch(SPEED + re.escape(f"WER {wrong} · ") + ENCODER, err)


def test_a_translation_is_english(world, tmp_path, capsys):
    (tmp_path / "truth.txt").write_text("second zero ü second one ü")
    argv = ["--truth", str(tmp_path / "truth.txt"), "--language", "da", "--task", "translate"]
    assert main([record(tmp_path / "a.wav"), *argv]) == 0
    assert "WER 0.0 %" in capsys.readouterr().err


def test_truth_of_several_files_is_json(world, tmp_path, capsys):
    paths = [record(tmp_path / name, 1) for name in ("a.wav", "b.wav")]
    rows = [{"file": "b.wav", "text": "second 0"}, {"file": "a.wav", "text": "second 0 ü"}]
    (tmp_path / "truth.json").write_text(json.dumps(rows))
    assert main([*paths, "--truth", str(tmp_path / "truth.json")]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{paths[0]}: 1.0 s heard in ")
    assert "WER 0.0 % (0 S, 0 D, 0 I of 3 words)" in first
    assert second.startswith(f"{paths[1]}: 1.0 s heard in ")
    assert "WER 50.0 % (0 S, 0 D, 1 I of 2 words)" in second


@pytest.mark.parametrize(
    ("clips", "heard"), [("0", 2.0), ("0.5", 1.5), ("0,0.5,1", 1.5), ("0,0.5,1,99", 1.5), ("", 2.0)]
)
def test_only_the_clips_are_heard(world, tmp_path, capsys, clips, heard):
    argv = ["--verbose", "True", f"--clip_timestamps={clips}"]
    assert main([record(tmp_path / "a.wav"), *argv]) == 0
    assert f"{heard} s heard in" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.txt", None, "absent.txt cannot be read: No such file or directory."),
        ("latin.txt", "blåbær".encode("latin-1"), "latin.txt is not text in UTF-8."),
        ("empty.txt", b" ... \n", "empty.txt has no words for a.wav."),
        ("broken.json", b"[", "broken.json is not JSON: Expecting value"),
        ("text.json", b'"a"', "text.json is not a list of objects with a `file` and a `text`."),
        ("rows.json", b'[{"file": "a.wav"}]', "rows.json is not a list of objects"),
        ("other.json", b'[{"file": "b.wav", "text": "b"}]', "other.json has no text for a.wav."),
    ],
)
def test_truth_that_cannot_be_used_is_found_before_the_model(
    world, tmp_path, capsys, name, content, says
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main([record(tmp_path / "a.wav"), "--truth", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"encoder.run: {tmp_path}{os.sep}{says}")
    assert len(err.splitlines()) == 1
    assert not world.loads


def test_one_text_is_not_the_truth_of_two_files(world, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("second")
    paths = [record(tmp_path / name) for name in ("a.wav", "b.wav")]
    assert main([*paths, "--truth", str(tmp_path / "t.txt")]) == 1
    assert "is one text for 2 audio files" in capsys.readouterr().err
    assert not world.loads


# ---------------------------------------------------------------- a batch


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """What `transcribe_batched` is asked for."""
    asked: list[dict] = []

    def transcribe_batched(model: Model, audio: np.ndarray, batch_size: int, **options: object):
        asked.append({"model": model, "batch_size": batch_size, **options})
        return Model().transcribe(audio, **options)

    monkeypatch.setattr("encoder.run.transcribe_batched", transcribe_batched)
    return asked


def test_a_batch_is_asked_for_without_what_it_cannot_do(world, batches, tmp_path, capsys):
    path = record(tmp_path / "a.wav")
    assert main([path, "--batch_size", "8", "--verbose", "True", "--language", "da"]) == 0
    (asked,) = batches
    assert asked.pop("model") is world.model
    assert asked.pop("batch_size") == 8
    assert not world.model.calls
    assert asked["condition_on_previous_text"] is False
    assert asked["beam_size"] is None
    assert asked["best_of"] == 5
    out, err = capsys.readouterr()
    assert out.endswith("[1.0]  second 1 ü\n")
    batch = "up to 8 windows at once, without the text before them · "
    assert re.fullmatch(SPEED + batch + ENCODER, err)


def test_one_window_after_the_other_is_openais_own(world, batches, tmp_path, capsys):
    assert main([record(tmp_path / "a.wav"), "--batch_size", "1", "--verbose", "True"]) == 0
    assert not batches
    (call,) = world.model.calls
    assert call["beam_size"] == 5
    assert call["condition_on_previous_text"] is True
    assert "batch_size" not in call
    assert "windows at once" not in capsys.readouterr().err


def test_beams_in_a_batch_are_max_fasts(world, batches, tmp_path):
    argv = ["--batch_size", "2", "--beam_size", "3", "--variant", "max-fast"]
    assert main([record(tmp_path / "a.wav"), *argv]) == 0
    assert batches[0]["beam_size"] == 3


# ---------------------------------------------------------------- files


def test_files_are_openais_own(world, tmp_path, capsys):
    path = record(tmp_path / "a.b.wav")
    argv = "--word_timestamps True --highlight_words True --max_line_width 20 --max_line_count 1"
    out = tmp_path / "new" / "folder"
    assert main([path, "-o", str(out), *argv.split()]) == 0
    words = {"highlight_words": True, "max_line_width": 20, "max_line_count": 1}
    result = Model().transcribe(load_audio(path), verbose=None, word_timestamps=True)
    whisper.utils.get_writer("all", str(tmp_path))(result, path, max_words_per_line=None, **words)
    assert sorted(os.listdir(out)) == [
        f"a.b.{kind}" for kind in ("json", "srt", "tsv", "txt", "vtt")
    ]
    for file in out.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
        assert file.stat().st_mode == (tmp_path / file.name).stat().st_mode
    assert "<u>" in (out / "a.b.srt").read_text()
    assert capsys.readouterr().out == (out / "a.b.txt").read_text()


def test_a_format_alone_writes_to_the_working_folder(world, tmp_path, monkeypatch):
    path = record(tmp_path / "a.wav")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([path, "-f", "json"]) == 0
    assert os.listdir() == ["a.json"]
    assert len(json.loads(Path("a.json").read_text())["segments"]) == 2


def test_an_incomplete_file_is_never_in_place(world, tmp_path, monkeypatch, capsys):
    def broken(self: object, result: dict, file: object, **_: object) -> None:
        print("half", file=file, flush=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whisper.utils.WriteSRT, "write_result", broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.srt").write_text("the old one")
    assert main([record(tmp_path / "a.wav"), "-f", "srt", "-o", str(tmp_path / "out")]) == 1
    assert os.listdir(tmp_path / "out") == ["a.srt"]
    assert (tmp_path / "out" / "a.srt").read_text() == "the old one"
    assert "cannot be written to files: [Errno 28] No space left" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_is_found_before_the_model(world, tmp_path, capsys):
    path = record(tmp_path / "a.wav")
    assert main([path, "-o", f"{path}/out"]) == 1
    assert capsys.readouterr().err.startswith(f"encoder.run: {path}/out cannot be written to: ")
    assert not world.loads


# ---------------------------------------------------------------- what fails, and how


def test_files_that_cannot_be_read_are_named_before_the_model_is_loaded(world, tmp_path, capsys):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no audio\n" * 99)
    names = [str(tmp_path / name) for name in ("absent.wav", "empty.wav", "text.wav")]
    assert main(names) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(name)[0] for line, name in zip(err.splitlines(), names, strict=True)] == [
        "encoder.run: "
    ] * 3
    assert not world.loads


def test_the_other_files_are_transcribed_and_the_status_is_1(world, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no audio\n" * 99)
    good = record(tmp_path / "good.wav", 1)
    absent, text = str(tmp_path / "absent.wav"), str(tmp_path / "text.wav")
    assert main([good, text, absent, good]) == 1
    out, err = capsys.readouterr()
    assert out == f"==> {good} <==\nsecond 0 ü\n" * 2
    assert err.splitlines()[0] == f"encoder.run: {absent}: no such file."
    assert err.splitlines()[1].startswith(f"encoder.run: {text} is not audio that FFmpeg can open")
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("failure", [WeightsError("weights: no."), EngineError("engine: no.")])
@pytest.mark.parametrize("features", [False, True])
def test_a_model_that_cannot_be_loaded_is_one_sentence(world, tmp_path, capsys, failure, features):
    world.failure = failure
    argv = ["--features", str(tmp_path / "f.safetensors")] if features else []
    assert main([record(tmp_path / "a.wav"), *argv]) == 1
    assert capsys.readouterr() == ("", f"encoder.run: {failure}\n")


@pytest.mark.parametrize("failure", [EngineError("engine: no."), ValueError("no such token")])
def test_a_failure_within_a_file_is_one_sentence(world, tmp_path, capsys, failure):
    world.model.failure = failure
    assert main([record(tmp_path / "a.wav")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert str(failure) in err


def test_what_nobody_foresaw_is_not_hidden(world, tmp_path):
    world.model.failure = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        main([record(tmp_path / "a.wav")])


def test_an_interrupt_is_quiet_and_leaves_nothing_behind(world, tmp_path, capsys):
    world.model.failure = KeyboardInterrupt()
    assert main([record(tmp_path / "a.wav"), "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr() == ("", "")
    assert os.listdir(tmp_path / "out") == []


def test_a_warning_is_a_sentence(world, tmp_path, capsys):
    path = Path(record(tmp_path / "a.flac"))
    import av

    with av.open(str(path), "r") as source, av.open(str(tmp_path / "b.flac"), "w") as copy:
        stream = copy.add_stream("flac", rate=16000, layout="mono")
        for frame in source.decode(audio=0):
            copy.mux(stream.encode(frame))
        copy.mux(stream.encode(None))
    data = (tmp_path / "b.flac").read_bytes()
    (tmp_path / "b.flac").write_bytes(data[: len(data) // 2])
    assert main([str(tmp_path / "b.flac")]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"encoder.run: warning: {tmp_path / 'b.flac'}: 1 audio packets cannot ")
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------- features


def test_features_are_the_engines_output_for_every_window(world, tmp_path, capsys):
    path, output = record(tmp_path / "a.wav", 61), tmp_path / "f.safetensors"
    assert main([path, "--features", str(output), "--model", "demo", "--offline"]) == 0
    assert capsys.readouterr() == ("", "")
    assert world.loads == [
        {"name": "demo", "offline": True, "cache_dir": None, "encoder_only": True}
    ]
    assert not world.model.calls
    engine = Engine(types.SimpleNamespace(dims=DIMS))
    expected = torch.cat([engine(mel[None]) for mel in windows(load_audio(path), 80)])
    with safe_open(output, "pt") as file:
        assert list(file.keys()) == ["features"]
        found, metadata = file.get_tensor("features"), file.metadata()
    assert found.dtype == torch.float32
    assert found.shape == (3, 1500, 8)
    assert torch.equal(found, expected)
    assert json.loads(metadata.pop("dims")) == dataclasses.asdict(DIMS)
    assert metadata == {
        "model": "demo",
        "revision": "",
        "weights_sha256": "ab" * 32,
        "audio": "a.wav",
        "samples": str(61 * 16000),
        "sample_rate": "16000",
    }
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "f.safetensors"]
    assert output.stat().st_mode == Path(path).stat().st_mode


@pytest.mark.parametrize(
    ("seconds", "output", "says"),
    [
        (0.009, "f.safetensors", "is shorter than 10 ms"),
        (1, "absent/f.safetensors", "cannot be written to: No such file or directory."),
        (1, ".", "is a directory; --features takes the name of a file."),
    ],
)
def test_features_that_cannot_be_saved(world, tmp_path, capsys, seconds, output, says):
    path = record(tmp_path / "a.wav", seconds)
    assert main([path, "--features", str(tmp_path / output)]) == 1
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["a.wav"]


def test_features_of_a_missing_file(world, tmp_path, capsys):
    assert main([str(tmp_path / "a.wav"), "--features", str(tmp_path / "f")]) == 1
    assert capsys.readouterr().err == f"encoder.run: {tmp_path / 'a.wav'}: no such file.\n"


# ---------------------------------------------------------------- as a program


@contextlib.contextmanager
def program(*lines: str):
    """A Python process with a made-up model, whose `main` is called by the last line."""
    start = """
        import sys, types, warnings
        from encoder.run import main
        class Model:
            is_multilingual = True
            dims = types.SimpleNamespace(
                n_mels=80, n_audio_ctx=1500, n_vocab=51864, n_audio_layer=2, n_audio_state=8
            )
            def transcribe(self, audio, **options):
                return {"segments": [{"text": "word " * 30000}], "text": ""}
        class Absent(Exception): pass
        for name, members in {
            "decoder_bridge": {"load_model": lambda *_, **__: Model()},
            "encoder.engine": {"EngineError": Absent}, "weights": {"WeightsError": Absent},
        }.items():
            module = sys.modules[name] = types.ModuleType(name)
            vars(module).update(members)
    """
    code = textwrap.dedent(start) + "\n".join(lines)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        text=True,
    )
    with process:
        yield process
        process.kill()


def test_a_reader_that_leaves_is_no_error(tmp_path):
    path = record(tmp_path / "a.wav")
    with program(f"raise SystemExit(main([{path!r}]))") as process:
        assert process.stdout.read(4) == "word"
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""


def test_a_pipe_gets_every_segment_when_it_is_there(tmp_path):
    lines = [
        "def transcribe(self, audio, **options):",
        "    print('[00:00.000 --> 00:01.000]  one')",
        "    sys.stdin.read()",  # until the first segment has been read
        "    print('[00:01.000 --> 00:02.000]  two')",
        "    return {'segments': [], 'text': ''}",
        "Model.transcribe = transcribe",
        "Model.encoder = types.SimpleNamespace(engine=types.SimpleNamespace(device='cpu'))",
        f"raise SystemExit(main([{record(tmp_path / 'a.wav')!r}, '--verbose', 'True']))",
    ]
    with program(*lines) as process:
        assert process.stdout.readline().endswith("one\n")
        out, err = process.communicate(timeout=60)  # closes its stdin
    assert out.endswith("two\n")
    assert process.returncode == 0
    assert "2.0 s heard in" in err


def test_a_missing_file_does_not_wait_for_max_and_threads_are_bound(tmp_path):
    lines = ["import os, torch", "status = main(['absent.wav', '--threads', '1'])"]
    lines += ["print(status, [name for name in sys.modules if name.split('.')[0] == 'max'])"]
    lines += ["allowed = getattr(os, 'sched_getaffinity', lambda _: [0])(0)"]  # absent on macOS
    lines += ["print(torch.get_num_threads(), len(allowed))"]
    with program(*lines) as process:
        out, err = process.communicate(timeout=60)
    assert err == "encoder.run: absent.wav: no such file.\n"
    assert out == "1 []\n1 1\n"


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ([], "--model 'demo' --verbose True --truth 'samples/samples.json' 'samples/lecture.flac'"),
        (["AUDIO=talk.mp3", "MODEL=tiny"], "--model 'tiny' --verbose True  'talk.mp3'"),
        (["AUDIO=a.mp3", "TRUTH=a.txt"], "--model 'demo' --verbose True --truth 'a.txt' 'a.mp3'"),
    ],
)
def test_make_run(given, ends):
    """The truth goes with the samples, and with what the user gives one for."""
    command = ["make", "--dry-run", "--no-print-directory", "run", *given]
    root = Path(__file__).parent.parent
    outer = {"MAKEFLAGS", "AUDIO", "MODEL", "TRUTH"}  # of a `make test` around this
    env = {name: value for name, value in os.environ.items() if name not in outer}
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=env)
    assert result.stdout.splitlines()[-1].endswith(f"-m encoder.run {ends}")
