"""`python -m validation calibrate`: which runs it makes, and that an alarm is counted as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from validation import calibrate, decoder_parity
from validation.calibrate import main

SAMPLE = str(Path(__file__).parent.parent / "samples" / "demo.flac")


@pytest.fixture
def one_input(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Only the speech itself is an input; the seeds that it was varied by."""
    seen: list[int] = []

    def varied(audio: np.ndarray, seed: int) -> np.ndarray:
        seen.append(seed)
        return audio * np.float32(0.5)

    monkeypatch.setattr(calibrate, "inputs", lambda speech: speech)
    monkeypatch.setattr(calibrate, "varied", varied)
    return seen


def test_the_decoder_is_clean(one_input, tmp_path, capsys):
    path = tmp_path / "clean.json"
    given = ["--model", "demo", "--part", "decoder", "--first", "3", "--seeds", "1"]
    assert main([SAMPLE, *given, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert one_input == [3, 4]
    assert found["runs"] == 2
    assert found["part"] == "decoder"
    assert found["command"] == (
        "python -m validation calibrate demo.flac --model demo --seeds 1 --part decoder --first 3"
    )
    assert found["false_alarms"] == []
    assert found["limits"]["own_multiple"] == decoder_parity.OWN_MULTIPLE
    worst = found["worst"]["values"]
    assert 0 < worst["ratio_to_limit"] < 1
    assert 0 < worst["steps"] < 1e-5
    assert 0 < worst["steps_ratio_to_limit"] < 1
    assert "injected" not in worst
    assert list(found["inputs"]) == ["demo.flac"]
    assert "logits" in found["inputs"]["demo.flac"]
    assert json.loads(capsys.readouterr().out)["runs"] == 2


def test_steps_over_their_limit_are_an_alarm(one_input, monkeypatch, tmp_path):
    monkeypatch.setattr(decoder_parity, "step_limit", lambda stock: 1e-12)
    path = tmp_path / "clean.json"
    assert main([SAMPLE, "--model", "demo", "--part", "decoder", "--json", str(path)]) == 0
    (alarm,) = json.loads(path.read_text())["false_alarms"]
    assert (alarm["tap"], alarm["seed"]) == ("steps", 0)
    assert alarm["ratio"] > 1
    assert one_input == []  # seed 0 is the input itself


def test_a_tap_over_its_limit_is_an_alarm(one_input, monkeypatch, tmp_path):
    monkeypatch.setattr("validation.limits.FREE_MULTIPLE", 1e-9)
    monkeypatch.setattr("validation.limits.FREE_ABSOLUTE", 1e-12)
    path = tmp_path / "clean.json"
    assert main([SAMPLE, "--model", "demo", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    (alarm,) = found["false_alarms"]
    assert alarm["tap"] == "conv1"
    assert found["part"] == "encoder"
    assert found["command"] == "python -m validation calibrate demo.flac --model demo --seeds 0"


def test_bad_input_is_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path / "no.flac"), "--model", "demo"]) == 2
    assert capsys.readouterr().err.startswith("validation calibrate: ")
