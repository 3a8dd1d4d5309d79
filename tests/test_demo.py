"""The embedded checkpoint keeps what its card says, and its recipe does what it claims."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import subprocess
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLES, sample_rows
from torch.func import functional_call
from whisper.audio import log_mel_spectrogram
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

import weights
from encoder.audio import load_audio
from weights.demo import decoder, export, speech, text, train
from weights.demo.evaluate import limits, table
from weights.demo.train import (
    Batches,
    Corpus,
    Said,
    Trainee,
    Window,
    tokens_of,
    used_tokens,
)

FOLDER = Path(weights.__file__).parent / "demo"
TOKENIZER = get_tokenizer(multilingual=False)


def test_the_file_is_small_and_is_the_one_that_was_evaluated(demo_checkpoint):
    assert (FOLDER / "demo.safetensors").stat().st_size <= 40_000_000
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["sha256"] == demo_checkpoint.source.sha256


def test_it_was_evaluated_on_whole_windows_of_every_voice():
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["held_out_sentences"] >= 400
    assert evaluation["clean"]["windows"] >= 4 * len(speech.VOICES)
    assert set(evaluation["clean"]["by_voice"]) == set(speech.VOICES)


def test_the_card_says_what_was_measured_limits_missed_too():
    evaluation = json.loads((FOLDER / "evaluation.json").read_text())
    assert evaluation["limits"] == limits(evaluation)
    assert evaluation["all_met"] == all(row["met"] for row in evaluation["limits"])
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert "\n".join(table(evaluation)) in card
    assert "(curves.svg)" in card
    assert (FOLDER / "curves.svg").exists()


def test_the_encoder_has_tinys_sizes(demo_checkpoint):
    d = demo_checkpoint.dims
    sizes = (d.n_mels, d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
    assert sizes == (80, 1500, 384, 6, 4)
    assert d.n_vocab == 51864


def test_samples_are_spoken_in_the_vocabulary_and_their_files_are_there():
    rows = sample_rows()
    assert {w for row in rows for w in row["text"].split()} <= set(text.VOCABULARY)
    assert {row["file"] for row in rows} == {p.name for p in SAMPLES.glob("*.flac")}
    single = {row["voice"] for row in rows if row["file"] != "lecture.flac"}
    assert single == set(speech.VOICES)


def test_the_lecture_is_161_5_s_and_its_sentences_are_where_samples_json_says():
    (row,) = (row for row in sample_rows() if row["file"] == "lecture.flac")
    audio = load_audio(SAMPLES / row["file"])
    assert len(audio) == round(161.5 * 16_000) == round(row["seconds"] * 16_000)
    sentences = row["sentences"]
    assert [s["text"] for s in sentences] == text.LECTURE
    assert row["text"] == " ".join(text.LECTURE)
    assert len({s["voice"] for s in sentences}) >= 4
    at = 0.0
    for sentence in [*sentences, {"start": row["seconds"], "end": row["seconds"]}]:
        assert 0.2 <= sentence["start"] - at <= 1.0
        first, last = (round(sentence[edge] * 16_000) for edge in ("start", "end"))
        assert not audio[round(at * 16_000) + 16 : first - 16].any()  # times are in milliseconds
        spoken = audio[first:last]
        assert not len(spoken) or np.sqrt(np.mean(spoken**2)) > 0.01
        at = sentence["end"]


def test_the_vocabulary_is_closed_and_large_enough():
    assert len(text.VOCABULARY) >= 1000
    assert len(set(text.VOCABULARY)) == len(text.VOCABULARY)
    named = {*text.DAYS, *text.MONTHS, *text.NUMBERS}
    assert {"Monday", "Sunday", "January", "twenty", "million"} <= named <= set(text.VOCABULARY)
    rng = random.Random(1)
    said = {w for _ in range(4000) for w in text.sentence(rng).split()}
    assert said <= set(text.VOCABULARY)
    assert len(said) == len(text.VOCABULARY)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
@pytest.mark.parametrize("voice", ["en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland"])
def test_no_two_words_sound_alike(voice):
    command = ["espeak-ng", "-q", "-x", "-v", voice, ".\n".join(text.VOCABULARY)]
    spoken = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    phonemes = [line.strip() for line in spoken.splitlines() if line.strip()]
    assert len(phonemes) == len(text.VOCABULARY)
    alike = defaultdict(list)
    for word, sound in zip(text.VOCABULARY, phonemes, strict=True):
        alike[sound.translate(str.maketrans("", "", "',_ "))].append(word)  # less stress, pauses
    assert not [words for words in alike.values() if len(words) > 1]


def test_no_training_sentence_has_four_words_of_the_lecture():
    rng = random.Random(1)
    lecture = set().union(*(runs_of(line.split(), 4) for line in text.LECTURE))
    assert not lecture & set().union(*(runs_of(text.sentence(rng).split(), 4) for _ in range(9999)))


def test_an_utterance_depends_on_its_index_alone():
    assert speech.utterance("train", 1, 7, 0.3) == speech.utterance("train", 1, 7, 0.3)
    assert speech.utterance("train", 1, 7, 0.3) != speech.utterance("train", 2, 7, 0.3)


SOUND = np.zeros(16_000, np.float32)
SENTENCES = [("the cat", 0.0, 0.5), ("a dog", 0.72, 1.0)]


def ids(said: list[Said]) -> list[int]:
    return [s.token for s in said]


def spelt(said: list[Said]) -> str:
    return TOKENIZER.decode_with_timestamps([t for t in ids(said) if t != train.IGNORED])


def test_tokens_of_a_window_are_whispers():
    given, said = tokens_of(Window(SOUND, SENTENCES), TOKENIZER, timestamps=True)
    words = "<|0.00|> the cat<|0.50|><|0.72|> a dog<|1.00|>"
    assert spelt(given) == "<|startoftranscript|>" + words
    assert spelt(said) == words + "<|endoftext|>"
    given, said = tokens_of(Window(SOUND, SENTENCES), TOKENIZER, timestamps=False)
    assert TOKENIZER.decode(ids(given)) == "<|startoftranscript|><|notimestamps|> the cat a dog"
    assert TOKENIZER.decode(ids(said)) == "<|notimestamps|> the cat a dog<|endoftext|>"


def test_every_token_is_known_to_be_spoken_in_its_sentence():
    """`the cat` has eight letters with its spaces, two tokens of four each."""
    _, said = tokens_of(Window(SOUND, SENTENCES), TOKENIZER, timestamps=True)
    assert [s.at for s in said[:4]] == pytest.approx([0.0, 0.125, 0.375, 0.5])
    assert said[-1].at is None  # <|endoftext|>
    _, plain = tokens_of(Window(SOUND, SENTENCES), TOKENIZER, timestamps=False)
    assert [s.at for s in plain[1:-1]] == [s.at for s in said if s.token < TOKENIZER.eot]


def test_a_cut_sentence_is_its_start_alone():
    window = Window(SOUND, SENTENCES[:1], cut=0.72, cut_text="a d")
    _, said = tokens_of(window, TOKENIZER, timestamps=True)
    assert spelt(said) == "<|0.00|> the cat<|0.50|><|0.72|><|endoftext|>"


def test_a_window_begins_no_later_than_stock_decoding_allows():
    _, said = tokens_of(Window(SOUND, [("the cat", 3.0, 3.5)]), TOKENIZER, timestamps=True)
    assert spelt(said) == "<|1.00|> the cat<|3.50|><|endoftext|>"


def test_a_prompt_has_no_loss():
    prompt = TOKENIZER.encode(" red birds")
    given, said = tokens_of(Window(SOUND, SENTENCES), TOKENIZER, False, prompt)
    assert ids(given)[: len(prompt) + 1] == [TOKENIZER.sot_prev, *prompt]
    assert ids(said)[: len(prompt) + 1] == [train.IGNORED] * (len(prompt) + 1)
    assert len(given) == len(said)
    assert given[len(prompt) + 2 :] == said[len(prompt) + 1 : -1]  # each says the next


@pytest.mark.parametrize("timestamps", [False, True])
def test_silence_is_no_speech_and_then_the_end(timestamps):
    given, said = tokens_of(Window(SOUND, []), TOKENIZER, timestamps)
    forced = TOKENIZER.timestamp_begin if timestamps else TOKENIZER.no_timestamps
    assert ids(given) == [TOKENIZER.sot, forced]
    assert ids(said) == [TOKENIZER.no_speech, TOKENIZER.eot]


def test_after_a_recordings_end_the_mel_is_zero_as_transcribe_has_it():
    sound = np.random.default_rng(1).standard_normal(16_000).astype(np.float32) / 9
    rng = random.Random(1)
    mel = Window(sound, SENTENCES, end=0.6).mel(rng)
    assert mel.shape == (80, 100)
    assert not mel[:, 60:].any()
    assert mel[:, :60].all()
    whole = log_mel_spectrogram(sound)
    floors = {round(float(Window(sound, []).mel(rng).min() - whole.min()), 3) for _ in range(40)}
    assert len(floors) > 5  # louder parts of a file raise it, in some
    assert min(floors) == 0.0
    assert max(floors) <= 0.5


def trainee() -> Trainee:
    used = used_tokens(TOKENIZER)
    return Trainee(len(used), sum(token < TOKENIZER.eot for token in used))


DECODER_STEP = next(until for until, decoder, _ in train.CURRICULUM if not decoder)


def test_the_alignment_loss_is_small_where_the_head_looks_at_the_word(corpus: Corpus):
    """Against attention written out; and without a step's decoder there is none."""
    torch.manual_seed(1)
    batches = Batches(corpus, TOKENIZER, 1)
    model = trainee().eval()
    assert model(batches(int(DECODER_STEP) - 1)).keys() == {"ctc"}
    batch = batches(int(DECODER_STEP))
    with torch.no_grad():
        found = model(batch)
        features = torch.randn(len(batch.mel), batch.mel.shape[-1] // 2, 384)
        rows = {"token_embedding.weight": model.token_embedding()}
        functional_call(model.whisper.decoder, rows, (batch.lines.tokens, features))
        ours = model.looks_elsewhere(1, features, batch.lines.said_at)
        cross = model.whisper.decoder.blocks[1].cross_attn
        weights_ = (
            cross.query(model.queries[1])[..., :64] @ cross.key(features)[..., :64].mT / 8
        ).softmax(-1)
    shares = []
    for row, times in zip(weights_, batch.lines.said_at, strict=True):
        for share, at in zip(row, times.tolist(), strict=True):
            near = [f for f in range(len(share)) if abs(0.02 * f - at) <= train.NEAR]
            if near:
                shares.append(-float(share[near].sum().log()))
    assert shares
    assert float(ours) == pytest.approx(np.mean(shares), rel=0.02)  # a frame may fall on the edge
    assert found.keys() == train.WEIGHTS.keys()
    assert all(torch.isfinite(value) for value in found.values())


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


def test_some_of_the_words_that_the_decoder_is_given_are_wrong(corpus: Corpus):
    batches, rng = Batches(corpus, TOKENIZER, 1), random.Random(1)
    word, stamp = TOKENIZER.encode(" " + text.NOUNS[0])[0], TOKENIZER.timestamp_begin + 7
    heard = [batches.misheard(Said(word, 1.5), rng, 0.08) for _ in range(4000)]
    wrong = [said.token for said in heard if said.token != word]
    assert len(wrong) / 4000 == pytest.approx(0.08, rel=0.2)
    assert len(set(wrong)) > 200
    assert {said.at for said in heard} == {1.5}
    assert {batches.misheard(Said(stamp, 0.14), rng, 0.08) for _ in range(99)} == {
        Said(stamp, 0.14)
    }


def test_prose_repeats_small_words():
    rng = random.Random(1)
    said = [text.some_words(rng) for _ in range(500)]
    assert {len(words) for words in said} == set(range(6, 17))
    every = [word for words in said for word in words]
    small = sum(word in text.SMALL or word in text.COMMON for word in every)
    assert 0.45 < small / len(every) < 0.65
    assert sum(len(set(words)) < len(words) for words in said) > 100
    assert not any(a == b for words in said for a, b in itertools.pairwise(words))


def test_prose_names_its_things_again():
    """Three things at most in a sentence, of which one often comes twice."""
    rng = random.Random(1)
    said = [text.connected(rng) for _ in range(500)]
    assert max(map(len, said)) <= 20
    assert min(map(len, said)) >= 4
    joining = (*text.ARTICLES, *text.LINKS, *text.AUXILIARIES, *text.QUALITIES, *text.ENDINGS)
    fixed = {w for words in (*joining, *text.OPENINGS, *text.JOINTS) for w in words.split()}
    things = {*text.TECHNICAL, *text.NOUNS} - fixed
    assert max(len(set(words) & things) for words in said) == 3
    assert sum(len(set(w)) < len(w) for w in ([x for x in s if x in things] for s in said)) > 100


def runs_of(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_prose_is_of_the_vocabulary_and_no_five_words_of_the_lecture():
    """In a row; its small words, and runs of three and four of them, are those of any prose."""
    rng = random.Random(1)
    said = [text.prose(rng).split() for _ in range(5000)]
    assert {word for words in said for word in words} <= set(text.VOCABULARY)
    lecture = set().union(*(runs_of(line.split(), 5) for line in text.LECTURE))
    assert not lecture & set().union(*(runs_of(words, 5) for words in said))


def test_sentences_that_run_on_are_one_sentence(corpus: Corpus):
    """Two utterances, one nearly at once after the other, with one text and one pair of times."""
    windows = [train.compose(corpus, random.Random(i), 6.0, run_on=1.0) for i in range(20)]
    sentences = [s for window in windows for s in window.sentences]
    joined = [s for s in sentences if len(s[0].split()) == 4]
    assert len(joined) > 0.5 * len(sentences)
    assert {len(s[0].split()) for s in sentences} == {2, 4}
    assert all(0.8 <= end - start <= 2 * 0.9 + 0.12 for _, start, end in joined)
    plain = [train.compose(corpus, random.Random(i), 6.0) for i in range(20)]
    assert {len(s[0].split()) for window in plain for s in window.sentences} == {2}


def test_previous_texts_that_are_wrong_in_places(corpus: Corpus, monkeypatch):
    """Before all windows of a batch or none, before the window's own tokens, without loss, 223 at
    most, some of them no words of it."""
    monkeypatch.setattr(train, "LOOPS", 0.0)
    batches, window = Batches(corpus, TOKENIZER, 1), Window(SOUND, [("red cat", 0.1, 0.9)])
    used = used_tokens(TOKENIZER)

    def starts_of(lines: train.Lines) -> list[int]:
        return [[used[i] for i in row].index(TOKENIZER.sot) for row in lines.tokens.tolist()]

    found = []
    for seed in range(100):
        given = batches.lines([window] * 2, random.Random(seed), train.WINDOW, 0.08, prompted=0.7)
        found.append([start > 0 for start in starts_of(given)])
    assert all(a == b for a, b in found)
    assert sum(a for a, _ in found) / 100 == pytest.approx(0.7, abs=0.1)
    lines = batches.lines([window] * 200, random.Random(1), train.WINDOW, 0.08, prompted=1.0)
    starts = starts_of(lines)
    assert min(starts) > 1
    assert max(starts) == train.MAX_PROMPT + 1
    known = {t for words in corpus.text for t in TOKENIZER.encode(" " + words)}
    given, wrong = 0, 0
    for row, targets, start in zip(lines.tokens, lines.targets, starts, strict=True):
        assert (targets[:start] == train.IGNORED).all()
        words = [t for i in row[:start].tolist() if (t := used[i]) < TOKENIZER.eot]
        given, wrong = given + len(words), wrong + sum(t not in known for t in words)
    assert wrong / given == pytest.approx(1 - 0.92**2, abs=0.02)  # drawn as a text, and as given


def test_a_previous_text_that_loops():
    rng, prompt = random.Random(1), list(range(100, 200))
    for _ in range(200):
        found = train.looped(prompt, rng)
        again = [t for t in set(found) if found.count(t) > 1]
        assert 1 <= len(again) <= 4
        assert {found.count(t) for t in again} <= set(range(4, 14))
        assert list(dict.fromkeys(found)) == prompt
    assert len(train.looped(list(range(223)), rng)) == train.MAX_PROMPT


def test_a_decoder_that_stutters_comes_back(corpus: Corpus, monkeypatch):
    """What is given again has no loss but at its end, where the same is asked for as before it."""
    monkeypatch.setattr(train, "STUTTER", 0.5)
    batches = Batches(corpus, TOKENIZER, 1)
    window = Window(SOUND, [("the small red cat sees a dog", 0.1, 0.9)])
    given, said = tokens_of(window, TOKENIZER, True, TOKENIZER.encode(" some words before"))
    begun = ids(given).index(TOKENIZER.sot)
    for seed in range(50):
        more, targets = batches.stuttered(given, said, random.Random(seed))
        assert len(more) == len(targets)
        i = 0
        while i < len(targets):  # what is given again was given before
            count = 0
            while targets[i + count].token == train.IGNORED and i > begun:
                count += 1
            if count:
                assert count <= 9
                assert more[i : i + count + 1] == more[i - count - 1 : i]
                assert targets[i + count] == targets[i - 1]
            i += count + 1
        pairs = zip(more, targets, strict=True)
        asked = [(g, t) for g, t in pairs if t.token != train.IGNORED]
        # Every pair is one of those without a stutter, in their order, some of them twice.
        assert list(dict.fromkeys(asked)) == [
            pair for pair in zip(given, said, strict=True) if pair[1].token != train.IGNORED
        ]
        assert ids(more)[:5] == ids(given)[:5]  # the previous text does not
    assert len(more) > len(given)


def test_the_decoder_alone_is_trained(corpus: Corpus, tmp_path: Path):
    """Its tensors change, no other does; a second run goes on after the first one's steps."""
    torch.manual_seed(1)
    model, run, out = trainee(), tmp_path / "run", tmp_path / "out"
    run.mkdir()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = {"model": before, "step": 7, "falling": 5, "seed": 1, "dims": {}}
    torch.save(state, run / "checkpoint.pt")
    (run / "losses.jsonl").write_text('{"step": 7}\n')
    given = ["--data", str(tmp_path), "--run", str(run), "--out", str(out)]
    assert decoder.main([*given, "--steps", "1"]) == 0
    found = torch.load(out / "checkpoint.pt", weights_only=True)
    assert found["step"] == 8
    changed = {n for n, x in found["model"].items() if not torch.equal(x, before[n])}
    assert changed
    assert all(name == "clock" or name.startswith("whisper.decoder.") for name in changed)
    assert decoder.main([*given, "--steps", "2"]) == 0
    again = torch.load(out / "checkpoint.pt", weights_only=True)
    assert again["step"] == 9
    assert (out / "losses.jsonl").read_text() == '{"step": 7}\n'
    assert decoder.main([*given[:2], "--run", str(tmp_path / "none"), "--out", str(out)]) == 1


def test_previous_texts_loop_and_decoders_stutter_in_the_decoders_own_training(
    corpus: Corpus, monkeypatch
):
    """And not in the training before it, which has neither."""
    window = Window(SOUND, [("red cat sees a dog", 0.1, 0.9)], cut=0.95)  # so it has timestamps
    batches = Batches(corpus, TOKENIZER, 1)

    def widths(prompted: float | None) -> tuple[int, int]:
        lines = batches.lines([window] * 40, random.Random(1), train.WINDOW, 0.0, prompted)
        return lines.tokens.shape[1], int((lines.targets != train.IGNORED).sum())

    monkeypatch.setattr(train, "STUTTER", 0.0)
    monkeypatch.setattr(train, "LOOPS", 0.0)
    calm, asked = widths(0.0)
    assert widths(None)[1] == asked
    monkeypatch.setattr(train, "STUTTER", 1.0)
    assert widths(0.0)[0] > calm
    assert widths(0.0)[1] > asked
    assert widths(None)[1] == asked
    seen = []
    monkeypatch.setattr(train, "looped", lambda prompt, rng: seen.append(prompt) or prompt)
    widths(1.0)
    assert not seen
    monkeypatch.setattr(train, "LOOPS", 1.0)
    widths(1.0)
    assert len(seen) == 40


def test_the_last_layer_looks_at_the_next_word_and_those_before_at_the_given_one(
    corpus: Corpus, monkeypatch
):
    batches, model, looked = Batches(corpus, TOKENIZER, 1), trainee().eval(), {}

    def looks(layer: int, features: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        looked[layer] = at
        return torch.zeros(())

    monkeypatch.setattr(model, "looks_elsewhere", looks)
    window = Window(SOUND, SENTENCES)
    lines = batches.lines([window], random.Random(1), 1.0, 0.0)
    with torch.no_grad():
        model.decode(torch.randn(1, 50, 384), lines)
    last = train.DIMS.n_text_layer - 1
    assert sorted(looked) == list(range(last + 1))
    assert looked[last] is lines.said_at
    assert all(looked[layer] is lines.given_at for layer in range(last))


def test_the_encoder_may_learn_along(corpus: Corpus, tmp_path: Path):
    """From an exported file, whose steps are counted on; then again from its own checkpoint, even
    when that file has become another one."""
    (tmp_path / "start").mkdir()
    torch.manual_seed(1)
    torch.save({"model": trainee().state_dict(), "step": 40}, tmp_path / "start" / "checkpoint.pt")
    init, out = tmp_path / "demo.safetensors", tmp_path / "out"
    assert export.main(["--run", str(tmp_path / "start"), "--out", str(init)]) == 0
    given = ["--data", str(tmp_path), "--init", str(init), "--out", str(out)]
    rate = ["--encoder-rate", "1e-4"]
    assert decoder.main([*given, *rate, "--steps", "1"]) == 0
    found = torch.load(out / "checkpoint.pt", weights_only=True)
    assert found["step"] == 41
    before = weights.load(str(init)).tensors
    moved = {
        name for name, x in before.items()
        if not name.endswith("token_embedding.weight")
        and not torch.equal(x, found["model"][f"whisper.{name}"].half())
    }  # fmt: skip
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("decoder.") for name in moved)
    assert export.main(["--run", str(out), "--out", str(init)]) == 0
    assert decoder.main([*given, *rate, "--steps", "2"]) == 0
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 42
    assert set(found) == {"optimizer", "encoder", "model", "step", "origin", "seed"}


def test_the_words_of_a_batch_are_those_heard_whole(corpus: Corpus):
    batches = Batches(corpus, TOKENIZER, 1)
    used = used_tokens(TOKENIZER)
    whole, before = " ".join(text.NOUNS[:2]), text.VERBS[0]
    heard = Window(SOUND, [(whole, 0.1, 0.9)], cut=1.0, cut_text=f"{before} sle")
    words = batches.words_of(heard)
    assert [used[w - 1] for w in words] == TOKENIZER.encode(f" {whole} {before}")
    assert max(words) <= trainee().words.out_features - 1
    assert batches.words_of(Window(SOUND, [], cut=1.0, cut_text="sle")) == []
    batch = batches(int(DECODER_STEP))
    assert int(batch.word_lengths.sum()) == len(batch.words) > 0


def test_the_rows_of_timestamps_are_one_row_and_an_image_of_their_times():
    model, used = trainee(), used_tokens(TOKENIZER)
    torch.nn.init.normal_(model.clock)
    table, own = model.token_embedding().detach(), model.whisper.decoder.token_embedding.weight
    assert table.shape == (len(used) + 1, 384)
    others = len(used) - train.STAMPS
    assert used[others] == TOKENIZER.timestamp_begin
    assert torch.equal(table[:others], own[:others])
    assert torch.equal(table[-1], own[-1])
    image = model.positions / 192**0.5 @ model.clock.detach()  # of 0.00, 0.02, ..., 29.98 s
    torch.testing.assert_close(table[others:-2], own[-2].detach() + image, atol=1e-4, rtol=1e-4)
    other = trainee()
    other.set_stamps(table[others:-1])
    torch.testing.assert_close(
        other.token_embedding()[others:-1], table[others:-1], atol=0.05, rtol=0
    )


def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus):
    first, again = Batches(corpus, TOKENIZER, 1)(5), Batches(corpus, TOKENIZER, 1)(5)
    assert torch.equal(first.mel, again.mel)
    assert torch.equal(first.lines.tokens, again.lines.tokens)
    assert torch.equal(first.characters, again.characters)
    other = Batches(corpus, TOKENIZER, 1)(6)
    assert first.mel.shape != other.mel.shape or not torch.equal(first.mel, other.mel)


def test_the_compact_loss_is_the_full_softmax(corpus: Corpus, monkeypatch):
    """Cross-entropy over all 51,864 rows, written out, equals the one over the used rows."""
    torch.manual_seed(1)
    batches = Batches(corpus, TOKENIZER, 1)
    model = trainee().eval()
    batch = batches(int(DECODER_STEP))
    compact = torch.nn.functional.cross_entropy
    seen = {}

    def spy(logits, targets, ignore_index):
        seen.update(logits=logits, targets=targets)
        return compact(logits, targets, ignore_index=ignore_index)

    monkeypatch.setattr(train.F, "cross_entropy", spy)
    with torch.no_grad():
        cross_entropy = model(batch)["cross_entropy"]
        used = used_tokens(TOKENIZER)
        logits = seen["logits"].double()
        unused_logit = logits[:, -1:] - model.log_unused
        full = unused_logit.repeat(1, train.DIMS.n_vocab)
        full[:, used] = logits[:, :-1]
        keep = seen["targets"] >= 0
        targets = torch.tensor(used)[seen["targets"][keep]]
        expected = torch.nn.functional.nll_loss(full[keep].log_softmax(-1), targets)
    assert float(cross_entropy) == pytest.approx(float(expected), rel=1e-5)


def test_an_earlier_demo_hands_on_what_it_knows(demo_checkpoint):
    used = used_tokens(TOKENIZER)
    model = trainee()
    before = model.whisper.decoder.token_embedding.weight.detach().clone()
    model.take_over(demo_checkpoint, used)
    after = model.whisper.decoder.token_embedding.weight.detach()
    table = demo_checkpoint.tensors["decoder.token_embedding.weight"].float()
    cat = TOKENIZER.encode(" cat")[0]
    assert torch.equal(after[used.index(cat)], table[cat])
    assert not torch.equal(before[used.index(cat)], table[cat])
    name = "encoder.blocks.2.attn.query.weight"
    assert torch.equal(model.whisper.state_dict()[name], demo_checkpoint.tensors[name].float())


def test_layers_that_an_earlier_demo_had_not_add_nothing_at_first(demo_checkpoint):
    torch.manual_seed(1)
    dims = replace(demo_checkpoint.dims, n_text_layer=1)
    tensors = {
        name: t for name, t in demo_checkpoint.tensors.items()
        if not name.startswith("decoder.blocks.") or name.startswith("decoder.blocks.0.")
    }  # fmt: skip
    earlier = Whisper(dims).eval()
    earlier.load_state_dict({name: t.float() for name, t in tensors.items()})
    model, used = trainee().eval(), used_tokens(TOKENIZER)
    model.take_over(replace(demo_checkpoint, dims=dims, tensors=tensors), used)
    table = model.token_embedding()
    tokens, features = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.randn(1, 1500, 384)
    with torch.no_grad():
        ours = functional_call(
            model.whisper.decoder, {"token_embedding.weight": table}, (tokens, features)
        )
        theirs = earlier.decoder(torch.tensor(used)[tokens], features)
    words = len(used) - train.STAMPS  # the rows that are taken over as they are
    torch.testing.assert_close(ours[..., :words], theirs[..., used[:words]], atol=1e-4, rtol=1e-4)


def test_the_learning_rate_rises_stays_and_falls_to_nothing():
    rates = [train.learning_rate(step, 1000, 200) for step in range(1001)]
    assert train.learning_rate(train.LATER, 10**6, 1) == train.LATER_LR
    assert max(rates) == train.PEAK_LR == rates[train.WARMUP] == rates[799]
    assert rates[0] == pytest.approx(train.PEAK_LR / train.WARMUP)
    assert rates[900] == pytest.approx(train.PEAK_LR / 2)
    assert rates[1000] == 0


def test_export_round_trip(tmp_path: Path, monkeypatch):
    """What is trained is what `weights.load` reads, to float16; unused tokens share one row."""
    torch.manual_seed(1)
    used = used_tokens(TOKENIZER)
    model = trainee()
    torch.nn.init.normal_(model.clock)
    torch.save({"model": model.state_dict(), "step": 3, "seed": 1}, tmp_path / "checkpoint.pt")
    out = tmp_path / "demo.safetensors"
    assert export.main(["--run", str(tmp_path), "--out", str(out)]) == 0
    loaded = weights.load(str(out))
    table = loaded.tensors["decoder.token_embedding.weight"]
    trained = model.token_embedding().detach().half()
    assert torch.equal(table[used], trained[:-1])
    unused = sorted(set(range(train.DIMS.n_vocab)) - set(used))
    assert torch.equal(table[unused], trained[-1:].expand(len(unused), -1))
    assert torch.equal(
        loaded.tensors["encoder.conv1.weight"], model.whisper.encoder.conv1.weight.detach().half()
    )


def test_more_layers_than_there_are_cannot_be_taken_over(demo_checkpoint):
    dims = replace(demo_checkpoint.dims, n_text_layer=train.DIMS.n_text_layer + 1)
    with pytest.raises(SystemExit, match=r"decoder layers, \d at most"):
        trainee().take_over(replace(demo_checkpoint, dims=dims), used_tokens(TOKENIZER))


def test_another_recipe_does_not_go_on_in_the_same_folder(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(speech.shutil, "which", lambda program: program)
    given = ["--out", str(tmp_path), "--train", "0", "--prose", "0", "--held-out", "0"]
    assert speech.main(given) == 0
    assert speech.main(given) == 0
    note = json.loads((tmp_path / "recipe.json").read_text())
    assert set(note) == {"seed", "voices", "vocabulary", "held-out", "train", "prose"}
    with monkeypatch.context() as other:  # the same words, joined otherwise
        other.setattr(text, "OPENINGS", ["perhaps"])
        assert speech.main(given) == 1
    capsys.readouterr()
    again = [*given, "--seed", "2"]
    assert speech.main(again) == 1
    assert "another recipe" in capsys.readouterr().err
