"""Shared fixtures: one compiled encoder for all tests, and three tiers of data.

1. no data: random tensors, files that the test makes
2. the embedded checkpoint `demo` and `samples/`
3. real weights and real speech, in the folder named by MAX_WHISPER_TEST_DATA; skipped without it:
   whisper-tiny.en/encoder.safetensors       OpenAI's tiny.en, the encoder alone
   whisper-tiny.en/tiny.en.refit-v0.safetensors   with a decoder whose embedding was fitted anew
   audio/jfk.flac                            11 s of speech
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import whisper
from torch import Tensor
from whisper.audio import N_FRAMES

import weights
from decoder_bridge.model import MaxAudioEncoder, bridged_model, stock_model
from encoder.audio import load_audio, windows
from encoder.engine import Engine, StagesEngine, TappedEngine
from weights import Checkpoint

SAMPLES = Path(__file__).parent.parent / "samples"


@dataclass(frozen=True)
class Pair:
    """The stock model and ours, from one checkpoint."""

    stock: whisper.Whisper
    ours: whisper.Whisper


def shared(name: str) -> Path:
    """A file of the third tier; skips the test, with the reason, where there is none."""
    folder = os.environ.get("MAX_WHISPER_TEST_DATA")
    if not folder:
        pytest.skip("MAX_WHISPER_TEST_DATA is not set: no real weights here")
    path = Path(folder, name)
    if not path.exists():
        pytest.skip(f"{name} is not in MAX_WHISPER_TEST_DATA")
    return path


def first_window(path: Path) -> Tensor:
    """(1, 80, 3000): the first 30 s of a file as `whisper.transcribe` sees them."""
    mel = windows(load_audio(path), 80)[:1]
    assert mel.shape == (1, 80, N_FRAMES)
    return mel


def sample_rows() -> list[dict]:
    return json.loads((SAMPLES / "samples.json").read_text())


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    return weights.load("demo", offline=True)


@pytest.fixture(scope="session")
def demo(demo_checkpoint: Checkpoint) -> Pair:
    return Pair(stock_model(demo_checkpoint), bridged_model(demo_checkpoint, "cpu"))


@pytest.fixture(scope="session")
def demo_engine(demo: Pair) -> Engine:
    assert isinstance(demo.ours.encoder, MaxAudioEncoder)
    return demo.ours.encoder.engine


@pytest.fixture(scope="session")
def real_checkpoint() -> Checkpoint:
    path = shared("whisper-tiny.en/encoder.safetensors")
    return weights.load(str(path), offline=True, encoder_only=True)


@pytest.fixture(scope="session")
def real_engine(real_checkpoint: Checkpoint) -> Engine:
    return Engine(real_checkpoint, "cpu")


@pytest.fixture(scope="session")
def refit() -> Pair:
    checkpoint = weights.load(str(shared("whisper-tiny.en/tiny.en.refit-v0.safetensors")))
    return Pair(stock_model(checkpoint), bridged_model(checkpoint, "cpu"))


@pytest.fixture(scope="session")
def jfk() -> Path:
    return shared("audio/jfk.flac")


@pytest.fixture(scope="session")
def demo_tapped(demo_checkpoint: Checkpoint) -> TappedEngine:
    return TappedEngine(demo_checkpoint, "cpu")


@pytest.fixture(scope="session")
def stages_engine(demo_checkpoint: Checkpoint) -> StagesEngine:
    """Serves every checkpoint of tiny's width: the weights are inputs."""
    return StagesEngine(demo_checkpoint.dims, "cpu")
