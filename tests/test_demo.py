"""The embedded checkpoint keeps what its card says, and its recipe does what it claims."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLES, sample_rows
from whisper.tokenizer import get_tokenizer

import weights
from weights.demo import export, speech, text, train
from weights.demo.train import Batches, Corpus, Trainee, Window, tokens_of, used_tokens

FOLDER = Path(weights.__file__).parent / "demo"
TOKENIZER = get_tokenizer(multilingual=False)


def test_the_file_is_small_and_is_the_one_that_was_evaluated(demo_checkpoint):
    assert (FOLDER / "demo.safetensors").stat().st_size <= 40_000_000
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["sha256"] == demo_checkpoint.source.sha256
    assert evaluation["sentences"] >= 400
    assert evaluation["clean"]["wer"] <= 0.05


def test_the_encoder_has_tinys_sizes(demo_checkpoint):
    d = demo_checkpoint.dims
    sizes = (d.n_mels, d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
    assert sizes == (80, 1500, 384, 6, 4)
    assert d.n_vocab == 51864


def test_samples_are_spoken_in_the_vocabulary_and_their_files_are_there():
    rows = sample_rows()
    assert {w for row in rows for w in row["text"].split()} <= set(text.VOCABULARY)
    assert {row["file"] for row in rows} == {p.name for p in SAMPLES.glob("*.flac")}
    assert {row["voice"] for row in rows} == set(speech.VOICES)


def test_the_vocabulary_is_closed_and_large_enough():
    assert len(text.VOCABULARY) >= 100
    assert len(set(text.VOCABULARY)) == len(text.VOCABULARY)
    rng = random.Random(1)
    said = {w for _ in range(2000) for w in text.sentence(rng).split()}
    assert said <= set(text.VOCABULARY)
    assert len(said) == len(text.VOCABULARY)


def test_an_utterance_depends_on_its_index_alone():
    assert speech.utterance("train", 1, 7, 0.3) == speech.utterance("train", 1, 7, 0.3)
    assert speech.utterance("train", 1, 7, 0.3) != speech.utterance("train", 2, 7, 0.3)


def test_tokens_of_a_window_are_whispers():
    window = Window(np.zeros(16_000, np.float32), [("the cat", 0.0, 0.5), ("a dog", 0.72, 1.0)])
    stamped = tokens_of(window, TOKENIZER, timestamps=True)
    decoded = TOKENIZER.decode_with_timestamps(stamped)
    assert (
        decoded
        == "<|startoftranscript|><|0.00|> the cat<|0.50|><|0.72|> a dog<|1.00|><|endoftext|>"
    )
    plain = TOKENIZER.decode(tokens_of(window, TOKENIZER, timestamps=False))
    assert plain == "<|startoftranscript|><|notimestamps|> the cat a dog<|endoftext|>"
    silent = TOKENIZER.decode(tokens_of(Window(window.samples, []), TOKENIZER, timestamps=True))
    assert silent == "<|startoftranscript|><|nospeech|><|endoftext|>"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Six utterances of noise, 0.4 to 0.9 s, in one shard."""
    rng = np.random.default_rng(1)
    lengths = [6400 + 1600 * i for i in range(6)]
    np.save(tmp_path / "train-000.npy", rng.integers(-9000, 9000, sum(lengths), np.int16))
    starts = [sum(lengths[:i]) for i in range(6)]
    rows = [
        {
            "text": f"{w} cat",
            "voice": "flite:slt",
            "pace": 1.0,
            "pitch": 50,
            "start": s,
            "length": n,
        }
        for w, s, n in zip(text.ADJECTIVES, starts, lengths, strict=False)
    ]
    (tmp_path / "train-000.json").write_text(json.dumps(rows))
    return Corpus(tmp_path, "train")


def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus):
    first, again = Batches(corpus, TOKENIZER, 1)(5), Batches(corpus, TOKENIZER, 1)(5)
    assert torch.equal(first.mel, again.mel)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.characters, again.characters)
    other = Batches(corpus, TOKENIZER, 1)(6)
    assert first.mel.shape != other.mel.shape or not torch.equal(first.mel, other.mel)


def test_the_compact_loss_is_the_full_softmax(corpus: Corpus, monkeypatch):
    """Cross-entropy over all 51,864 rows, written out, equals the one over the used rows."""
    torch.manual_seed(1)
    batches = Batches(corpus, TOKENIZER, 1)
    model = Trainee(len(batches.row)).eval()
    batch = batches(3)
    compact = torch.nn.functional.cross_entropy
    seen = {}

    def spy(logits, targets, ignore_index):
        seen.update(logits=logits, targets=targets)
        return compact(logits, targets, ignore_index=ignore_index)

    monkeypatch.setattr(train.F, "cross_entropy", spy)
    with torch.no_grad():
        cross_entropy, _ = model(batch)
        used = used_tokens(TOKENIZER)
        logits = seen["logits"].double()
        unused_logit = logits[:, -1:] - model.log_unused
        full = unused_logit.repeat(1, train.DIMS.n_vocab)
        full[:, used] = logits[:, :-1]
        keep = seen["targets"] >= 0
        targets = torch.tensor(used)[seen["targets"][keep]]
        expected = torch.nn.functional.nll_loss(full[keep].log_softmax(-1), targets)
    assert float(cross_entropy) == pytest.approx(float(expected), rel=1e-5)


def test_export_round_trip(tmp_path: Path, monkeypatch):
    """What is trained is what `weights.load` reads, to float16; unused tokens share one row."""
    torch.manual_seed(1)
    used = used_tokens(TOKENIZER)
    model = Trainee(len(used))
    torch.save({"model": model.state_dict(), "step": 3, "seed": 1}, tmp_path / "checkpoint.pt")
    out = tmp_path / "demo.safetensors"
    assert export.main(["--run", str(tmp_path), "--out", str(out)]) == 0
    loaded = weights.load(str(out))
    table = loaded.tensors["decoder.token_embedding.weight"]
    trained = model.whisper.decoder.token_embedding.weight.detach().half()
    assert torch.equal(table[used], trained[:-1])
    unused = sorted(set(range(train.DIMS.n_vocab)) - set(used))
    assert torch.equal(table[unused], trained[-1:].expand(len(unused), -1))
    assert torch.equal(
        loaded.tensors["encoder.conv1.weight"], model.whisper.encoder.conv1.weight.detach().half()
    )


def test_another_recipe_does_not_go_on_in_the_same_folder(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(speech.shutil, "which", lambda program: program)
    assert speech.main(["--out", str(tmp_path), "--train", "0", "--held-out", "0"]) == 0
    assert speech.main(["--out", str(tmp_path), "--train", "0", "--held-out", "0"]) == 0
    again = ["--out", str(tmp_path), "--train", "0", "--held-out", "0", "--seed", "2"]
    assert speech.main(again) == 1
    assert "another recipe" in capsys.readouterr().err
