"""The semantic stage: divergences and texts by hand, then encoders damaged on purpose."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
import whisper
from conftest import SAMPLES, Pair, sample_rows, shared
from torch import Tensor, nn
from whisper.model import ModelDimensions
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.tokenizer import get_tokenizer

import weights
from decoder_bridge.model import stock_model
from encoder.audio import load_audio, windows
from validation.semantic import (
    CheckedEncoder,
    FeaturesError,
    Position,
    Semantic,
    coverage,
    first_difference,
    kl_divergence,
    knows_timestamps,
    rank,
    semantic,
    summed_up,
    teacher_forced,
    text_error,
    window_starts,
    with_encoder,
)
from weights import Checkpoint

SECOND = 16_000


def truth_of(name: str) -> str:
    return next(row["text"] for row in sample_rows() if row["file"] == name)


@pytest.fixture(scope="module")
def stock(demo_checkpoint: Checkpoint) -> whisper.Whisper:
    return stock_model(demo_checkpoint)


def random_model(n_vocab: int) -> whisper.Whisper:
    """A small model of random weights: what it says means nothing, but it says it fast."""
    torch.manual_seed(1)
    model = whisper.Whisper(ModelDimensions(80, 1500, 16, 2, 1, n_vocab, 448, 16, 2, 1))
    for parameter in model.decoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def small() -> whisper.Whisper:
    return random_model(51864)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return load_audio(SAMPLES / "demo.flac")


@pytest.fixture(scope="module")
def long() -> np.ndarray:
    """75 s, a recording of another sentence at the start of each 30 s."""
    audio = np.zeros(75 * SECOND, np.float32)
    for start, name in zip(
        (0, 31, 62), ("demo.flac", "flite-rms.flac", "espeak-ng-en-us.flac"), strict=True
    ):
        samples = load_audio(SAMPLES / name)
        audio[start * SECOND : start * SECOND + len(samples)] = samples
    return audio


@pytest.fixture(scope="module")
def same(stock: whisper.Whisper, clip: np.ndarray) -> Semantic:
    return semantic(stock, stock.encoder, clip, truth_of("demo.flac"))


# The measures, by hand


def test_kl_of_a_toy_distribution():
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3."""
    p, q = torch.tensor([1.0, 1.0]).log(), torch.tensor([1.0, 3.0]).log()
    assert float(kl_divergence(p, q)) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    assert float(kl_divergence(p, p)) == 0
    rows = kl_divergence(torch.stack([p, p]), torch.stack([q, p]))
    assert rows.dtype == torch.float64
    assert rows.tolist() == pytest.approx([0.5 * math.log(4 / 3), 0], rel=1e-6)


def test_kl_does_not_depend_on_a_constant_and_is_the_references():
    p, q = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])
    assert float(kl_divergence(p + 50, q - 7)) == pytest.approx(float(kl_divergence(p, q)))
    assert float(kl_divergence(p, q)) != pytest.approx(float(kl_divergence(q, p)), rel=1e-2)


def test_kl_of_hopeless_logits_is_finite():
    """The candidate gives the reference's token a probability of e^-1000, which float64 lacks."""
    p, q = torch.tensor([1000.0, 0.0]), torch.tensor([0.0, 1000.0])
    assert float(kl_divergence(p, q)) == pytest.approx(1000)


def test_rank_counts_larger_logits_alone():
    logits = torch.tensor([1.0, 5.0, 1.0, 3.0])
    assert [rank(logits, i) for i in range(4)] == [3, 1, 3, 2]


def test_positions_are_summed_up():
    def position(i: int) -> Position:
        return Position(0, i, "a", "b", float(i), i % 2 == 0, i % 4 == 0, 1 + i % 5, 1)

    found = summed_up([position(i) for i in range(200)])
    assert (found.positions, found.kl_mean, found.kl_max) == (200, 99.5, 199)
    assert found.kl_p99 == 197  # the 198th of 200
    assert (found.same_top1, found.same_choice, found.rank_one) == (0.5, 0.25, 0.2)
    assert (found.worst_rank, found.reference_worst_rank) == (5, 1)


def test_words_are_counted_by_hand():
    """One word replaced, one left out, two put in, of five; case and punctuation do not count."""
    found = text_error(
        "The CAT, sat down on a mat mat!", "the dog sat on the big mat", EnglishTextNormalizer()
    )
    # dog -> cat, + down, the -> a, big -> (left out) and mat put in, or big -> mat
    assert found.words == 7
    assert found.substitutions + found.deletions + found.insertions == 4
    assert found.wer == pytest.approx(4 / 7)
    plain = text_error("a b x d y", "a b c d e f", BasicTextNormalizer())
    assert (plain.substitutions, plain.deletions, plain.insertions) == (2, 1, 0)
    assert plain.wer == pytest.approx(3 / 6)
    assert text_error("a b b c", "a b c", BasicTextNormalizer()).insertions == 1


def test_characters_are_counted():
    found = text_error("hat", "cat", BasicTextNormalizer())
    assert found.cer == pytest.approx(1 / 3)
    assert found.wer == 1


@pytest.mark.parametrize(
    ("text", "truth", "wer", "counts"),
    [("", "", 0.0, (0, 0, 0)), (" . ", "", 0.0, (0, 0, 0)), ("a b", "", None, (0, 0, 2)),
     ("", "a b", 1.0, (0, 2, 0))],
)  # fmt: skip
def test_an_empty_text_has_a_rate_where_it_means_something(text, truth, wer, counts):
    found = text_error(text, truth, EnglishTextNormalizer())
    assert (found.wer, found.cer) == (wer, wer)
    assert (found.substitutions, found.deletions, found.insertions) == counts


def segment(seek: int, start: float, end: float, tokens: list[int], text: str = "x") -> dict:
    return {"seek": seek, "start": start, "end": end, "tokens": tokens, "text": text}


def test_the_first_difference_is_located():
    tokenizer = get_tokenizer(multilingual=False)
    cat, dog = tokenizer.encode(" cat") + tokenizer.encode(" dog")
    begin = tokenizer.timestamp_begin
    reference = [
        segment(0, 0.0, 2.0, [begin, cat, begin + 100]),
        segment(0, 2.0, 4.0, [begin + 100, cat, begin + 200]),
        segment(400, 4.5, 6.0, [begin + 25, cat, cat, begin + 100]),
    ]
    starts = window_starts(reference, 700)
    assert starts == [0, 400]
    assert first_difference(reference, reference, starts, tokenizer) is None

    other = [*reference[:2], segment(400, 4.5, 6.0, [begin + 25, cat, dog, begin + 100])]
    found = first_difference(reference, other, starts, tokenizer)
    assert (found.window, found.index, found.time) == (1, 8, 4.5)
    assert (found.reference, found.candidate) == (" cat", " dog")
    assert (found.reference_id, found.candidate_id) == (cat, dog)

    later = [reference[0], segment(0, 2.0, 4.1, [begin + 100, cat, begin + 205]), reference[2]]
    found = first_difference(reference, later, starts, tokenizer)
    assert (found.window, found.index, found.time) == (0, 5, 2.0)
    assert (found.reference, found.candidate) == ("<|4.00|>", "<|4.10|>")

    found = first_difference(reference, reference[:2], starts, tokenizer)
    assert (found.window, found.index, found.time) == (1, 6, 4.5)
    assert (found.reference, found.candidate, found.candidate_id) == ("<|0.50|>", None, None)
    found = first_difference(reference[:2], reference, starts, tokenizer)
    assert (found.window, found.time, found.reference) == (1, 4.5, None)


@pytest.mark.parametrize(
    ("seeks", "content", "starts"),
    [
        ([], 0, []),
        ([], 1, [0]),
        ([], 7000, [0, 3000, 6000]),  # silence: every window was skipped
        ([0], 3000, [0]),
        ([0, 0, 2700], 5700, [0, 2700]),
        ([0, 5000], 5100, [0, 2000, 5000]),  # from 0 to 2000, nothing heard from there to 5000
        ([6000], 6100, [0, 3000, 6000]),
        ([0, 100], 7000, [0, 100, 3100, 6100]),
    ],
)
def test_windows_begin_where_transcribe_began_them(seeks, content, starts):
    segments = [segment(seek, seek / 100, seek / 100 + 1, [1]) for seek in seeks]
    assert window_starts(segments, content) == starts


def test_coverage_in_seconds():
    reference = [segment(0, 0.0, 3.0, [1]), segment(0, 2.0, 4.0, [1]), segment(0, 6.0, 8.0, [1])]
    candidate = [segment(0, 1.0, 5.0, [1]), segment(0, 9.0, 9.9, [], " ")]
    found = coverage(reference, candidate, 1000)
    assert (found.reference, found.candidate, found.duration) == (8.0, 5.0, 10.0)
    assert (found.lost, found.invented) == (3.0, 1.0)
    failed = coverage(reference, None, 1000)
    assert (failed.reference, failed.candidate, failed.lost) == (8.0, None, None)


# The model with another encoder


def test_the_reference_model_is_not_changed(small: whisper.Whisper, clip: np.ndarray):
    encoder, before = small.encoder, {k: v.clone() for k, v in small.state_dict().items()}
    training = [m.training for m in small.modules()]
    semantic(small, lambda mel: torch.zeros(1, 1500, 16), clip)
    assert small.encoder is encoder
    after = small.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert [m.training for m in small.modules()] == training
    assert not any(m._forward_hooks for m in small.modules())


def test_a_model_with_another_encoder_is_whole(small: whisper.Whisper):
    encoder = nn.Identity()
    model = with_encoder(small, encoder)
    assert model.encoder is encoder
    assert small.encoder is not encoder
    assert model.decoder is small.decoder
    assert (model.dims, model.device) == (small.dims, small.device)
    assert torch.equal(model.alignment_heads.to_dense(), small.alignment_heads.to_dense())


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (None, "the features are a NoneType, expected a tensor"),
        (torch.zeros(1, 1500, 15), "shape (1, 1500, 15), expected (1, 1500, 16)"),
        (torch.zeros(1500, 16), "shape (1500, 16), expected (1, 1500, 16)"),
        (torch.zeros(1, 1500, 16).double(), "the features are torch.float64 on cpu"),
        (torch.full((1, 1500, 16), math.inf), "24000 of the 24000 values"),
    ],
)
def test_features_that_are_none_are_one_sentence(small: whisper.Whisper, features, sentence):
    with pytest.raises(FeaturesError) as error:
        CheckedEncoder(lambda mel: features, small.dims)(torch.zeros(1, 80, 3000))
    assert sentence in str(error.value)


# Encoders, equal and damaged


def test_the_same_encoder_changes_nothing(same: Semantic):
    assert same.candidate_failed is None
    assert same.text["reference"].strip()
    assert same.kl_max <= 1e-12
    assert (same.same_top1, same.same_choice) == (1, 1)
    assert same.worst_rank == same.reference_worst_rank
    assert same.tokens_identical
    assert same.first_difference is None
    assert (same.wer, same.cer, same.substitutions, same.deletions, same.insertions) == (0,) * 5
    assert same.candidate == same.reference
    assert (same.coverage.lost, same.coverage.invented) == (0, 0)
    assert [w.identical for w in same.windows] == [True]
    assert same.timestamps
    assert same.normalizer == "EnglishTextNormalizer"


def test_positions_are_the_generated_ones_and_the_end(same: Semantic, stock, clip):
    mel = windows(clip, 80)[0]
    tokens = whisper.decode(stock, mel, language="en", fp16=False).tokens
    assert tokens
    assert same.positions == len(tokens) + 1
    assert len(same.forced) == 1
    assert same.forced[0].positions == same.positions


def test_divergence_is_that_of_the_decoders_logits(stock: whisper.Whisper, clip: np.ndarray):
    """The largest KL, found again by hand: tokens one at a time through the decoder."""

    def damaged(mel: Tensor) -> Tensor:
        return stock.encoder(mel) * 0.7

    found = semantic(stock, damaged, clip).kl_max_at
    mel = windows(clip, 80)[0]
    tokens = whisper.decode(stock, mel, language="en", fp16=False).tokens
    tokenizer = get_tokenizer(multilingual=False)
    said = torch.tensor([[*tokenizer.sot_sequence, *tokens[: found.position]]])
    with torch.no_grad():
        features = stock.encoder(mel[None])
        p, q = (
            stock.logits(said, x)[0, -1].double().softmax(0) for x in (features, features * 0.7)
        )
    by_hand = float((p * (p / q).log()).sum())
    assert found.kl == pytest.approx(by_hand, rel=1e-3)
    assert found.kl > 1e-3
    end = [*tokens, tokenizer.eot]
    assert found.token == tokenizer.decode_with_timestamps([end[found.position]])
    assert found.candidate == tokenizer.decode_with_timestamps([int(q.argmax())])
    assert found.rank == 1 + int((q > q[end[found.position]]).sum())


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.9])
def test_choices_are_the_decoders_own(stock: whisper.Whisper, clip: np.ndarray, scale: float):
    """Up to the first choice that differs, and no further, both sides decode the same tokens."""
    with torch.no_grad():
        reference = stock.encoder(windows(clip, 80))
    sides = [reference, reference * scale]
    same = [p.same_choice for p in teacher_forced(stock, sides, "en", timestamps=True)]
    texts = [whisper.decode(stock, x, language="en", fp16=False)[0].tokens for x in sides]
    eot = get_tokenizer(multilingual=False).eot
    equal = [a == b for a, b in zip(*([*tokens, eot] for tokens in texts), strict=False)]
    assert list(itertools.takewhile(bool, same)) == list(itertools.takewhile(bool, equal))
    assert all(same) == (texts[0] == texts[1])


def test_the_truth_is_measured_on_both_sides(same: Semantic):
    truth, heard = truth_of("demo.flac"), same.text["reference"].strip().lower()
    assert same.wer_truth_reference == pytest.approx(jiwer.wer(truth, heard))
    assert same.wer_truth_candidate == same.wer_truth_reference
    assert same.reference.truth.words == len(truth.split())


def test_a_little_noise_diverges_a_little(stock: whisper.Whisper, clip: np.ndarray):
    generator = torch.Generator().manual_seed(1)

    def noisy(mel: Tensor) -> Tensor:
        features = stock.encoder(mel)
        return features + 1e-6 * torch.randn(features.shape, generator=generator)

    found = semantic(stock, noisy, clip)
    assert 0 < found.kl_max < 1e-8
    assert found.tokens_identical
    assert found.wer == 0
    assert (found.same_top1, found.same_choice) == (1, 1)
    assert found.wer_truth_reference is None
    assert found.reference.truth is None


def test_the_decoder_does_not_see_the_order_of_frames(small: whisper.Whisper, clip: np.ndarray):
    """Cross-attention has no positions of its own: features of shifted frames say the same."""
    found = semantic(small, lambda mel: small.encoder(mel).roll(100, 1), clip)
    assert 0 < found.kl_max < 1e-8
    assert found.tokens_identical


@pytest.mark.parametrize("damage", ["scaled", "random", "backwards"])
def test_a_damaged_encoder_is_heard(stock: whisper.Whisper, clip: np.ndarray, damage: str):
    def damaged(mel: Tensor) -> Tensor:
        if damage == "random":
            return torch.randn(1, 1500, 384, generator=torch.Generator().manual_seed(1))
        if damage == "backwards":
            return stock.encoder(mel.flip(-1))
        return stock.encoder(mel) * 0.3

    found = semantic(stock, damaged, clip, truth_of("demo.flac"))
    assert found.candidate_failed is None
    assert found.kl_mean > 0.5
    assert found.kl_mean <= found.kl_p99 <= found.kl_max
    assert found.same_top1 < 0.9
    assert found.same_choice < 1
    assert found.worst_rank > found.reference_worst_rank
    assert not found.tokens_identical
    normalize = EnglishTextNormalizer()
    texts = [normalize(found.text[side]).strip() for side in ("reference", "candidate")]
    assert texts[0] != texts[1]
    assert found.wer == pytest.approx(jiwer.wer(*texts))
    assert found.wer_truth_candidate > found.wer_truth_reference


def test_every_window_has_a_line_up_to_the_end(stock: whisper.Whisper, long: np.ndarray):
    """A fault in the last window of the transcript that has text: the features of the first window.
    All before it is equal, and the first difference lies in it."""
    segments = stock.transcribe(long, temperature=0.0, fp16=False)["segments"]
    last = max(s["seek"] for s in segments if s["text"].strip())
    window = window_starts(segments, 7500).index(last)
    assert window > 0
    calls: list[Tensor] = []

    def forgetful(mel: Tensor) -> Tensor:
        calls.append(stock.encoder(mel))
        return calls[0] if len(calls) > 3 + window else calls[-1]  # the first 3: teacher forcing

    found = semantic(stock, forgetful, long)
    assert len(found.forced) == 3
    assert found.kl_max <= 1e-12
    assert found.windows[0].start == 0
    assert found.windows[-1].end == found.coverage.duration == 75
    for before, after in itertools.pairwise(found.windows):
        assert before.end == after.start
        assert 0 < before.end - before.start <= 30
    assert "".join(w.reference for w in found.windows) == found.text["reference"]
    assert "".join(w.candidate for w in found.windows) == found.text["candidate"]

    assert all(w.identical and w.wer == 0 for w in found.windows[:window])
    assert not found.windows[window].identical
    assert found.windows[window].seek == last
    assert found.windows[window].wer > 0
    assert not found.tokens_identical
    assert found.wer > 0
    difference = found.first_difference
    assert difference.window == window
    assert last / 100 <= difference.time < found.windows[window].end
    before_it = sum(len(s["tokens"]) for s in segments if s["seek"] < last)
    there = sum(len(s["tokens"]) for s in segments if s["seek"] == last)
    assert before_it <= difference.index < before_it + there


def test_a_limit_of_windows_cuts_the_rest_off(small: whisper.Whisper, long: np.ndarray):
    found = semantic(small, small.encoder, long, "what is said in all of it", windows=1)
    assert len(found.forced) == 1
    assert found.coverage.duration == 30
    assert found.windows[-1].end == 30
    assert found.tokens_identical
    assert found.wer_truth_reference is None
    with pytest.raises(ValueError, match="windows is 0"):
        semantic(small, small.encoder, long, windows=0)


def test_a_limit_above_the_length_is_none(small: whisper.Whisper, clip: np.ndarray):
    found = semantic(small, small.encoder, clip, "a truth", windows=9)
    assert found.coverage.duration == len(clip) // 160 / 100
    assert found.wer_truth_reference is not None


@pytest.mark.parametrize("samples", [0, 100])
def test_audio_without_a_frame(small: whisper.Whisper, samples: int):
    audio = np.full(samples, 0.1, np.float32)
    found = semantic(small, lambda mel: small.encoder(mel) * 0.3, audio)
    assert (found.tokens_identical, found.wer, found.cer) == (True, 0.0, 0.0)
    assert (found.positions, found.kl_mean, found.kl_max_at, found.same_top1) == (None,) * 4
    assert found.windows == []
    assert found.coverage.duration == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_what_is_invented_in_silence_has_no_rate(stock: whisper.Whisper, clip: np.ndarray):
    """The reference hears nothing, the candidate hears what was said elsewhere."""
    mel = windows(clip, 80)[0]
    with torch.no_grad():
        speech = stock.encoder(mel[None])
    found = semantic(stock, lambda mel: speech, np.zeros(4 * SECOND, np.float32), "")
    assert found.text["reference"] == ""
    assert found.text["candidate"].strip()
    assert (found.wer, found.wer_truth_candidate, found.wer_truth_reference) == (None, None, 0.0)
    assert found.insertions == len(EnglishTextNormalizer()(found.text["candidate"]).split())
    assert found.coverage.invented > 1
    assert found.coverage.lost == 0
    assert found.first_difference.reference is None


@pytest.mark.parametrize(
    ("factor", "sentence"),
    [
        (math.nan, "window 0: 24000 of the 24000 values of the features are NaN or infinite"),
        (1e36, "make the decoder's logits not finite"),
    ],
)
def test_features_that_are_not_finite_are_a_failure(small, clip, factor, sentence):
    found = semantic(small, lambda mel: small.encoder(mel) * factor, clip, truth_of("demo.flac"))
    assert found.candidate_failed is not None
    assert sentence in found.candidate_failed
    assert "\n" not in found.candidate_failed
    assert not found.tokens_identical
    assert (found.candidate, found.kl_mean, found.same_top1, found.wer) == (None,) * 4
    assert (found.coverage.candidate, found.wer_truth_candidate) == (None, None)
    assert found.text["reference"].strip()
    json.dumps(found.to_json(), allow_nan=False)


def test_a_failure_while_transcribing_keeps_the_divergence(small, clip):
    """An encoder that has the features of the fixed windows alone says so itself."""
    calls: list[int] = []

    def once(mel: Tensor) -> Tensor:
        if calls:
            raise FeaturesError("this window is not in the file")
        calls.append(1)
        return small.encoder(mel)

    found = semantic(small, once, clip)
    assert found.candidate_failed == "this window is not in the file"
    assert found.same_top1 == 1
    assert not found.tokens_identical
    assert found.wer is None


def test_decode_alone_would_not_notice_nan(small: whisper.Whisper, clip: np.ndarray):
    """Why `transcript` looks at the probabilities: NaN that only the decoder makes is text too."""
    calls: list[int] = []

    def later(mel: Tensor) -> Tensor:
        calls.append(1)
        return small.encoder(mel) * (1e36 if len(calls) > 1 else 1)

    found = semantic(small, later, clip)
    assert found.candidate_failed == "the features make the decoder's probabilities not finite"
    assert found.same_top1 == 1


def test_a_reference_without_finite_output_is_no_reference(clip: np.ndarray):
    broken = random_model(51864)
    nn.init.constant_(broken.decoder.ln.weight, math.nan)
    with pytest.raises(ValueError, match=r"the reference: .* not finite"):
        semantic(broken, broken.encoder, clip)


def test_an_error_of_the_candidates_own_goes_through(small: whisper.Whisper, clip: np.ndarray):
    def fails(mel: Tensor) -> Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        semantic(small, fails, clip)


def test_json_has_the_reports_keys(same: Semantic):
    found = json.loads(json.dumps(same.to_json(), allow_nan=False))
    assert {
        "kl_mean", "kl_p99", "kl_max", "same_top1", "tokens_identical", "wer", "worst_rank",
        "first_difference", "cer", "substitutions", "deletions", "insertions",
        "wer_truth_reference", "wer_truth_candidate", "coverage", "windows", "candidate_failed",
    } <= found.keys()  # fmt: skip
    assert {"reference", "candidate", "duration"} <= found["coverage"].keys()
    assert {"seek", "identical", "wer"} <= found["windows"][0].keys()


def test_a_multilingual_checkpoint_is_compared_by_the_basic_rules(clip: np.ndarray):
    """The language is found on either side; a text that never ends has no end to be compared."""
    model = random_model(51865)
    found = semantic(model, model.encoder, clip)
    assert found.normalizer == "BasicTextNormalizer"
    assert found.tokens_identical
    assert found.candidate.language == found.reference.language
    assert found.positions == 224


def test_the_max_encoder_changes_nothing(demo: Pair, clip: np.ndarray):
    found = semantic(demo.stock, demo.ours.encoder, clip)
    assert found.kl_max < 1e-6
    assert found.tokens_identical
    assert (found.same_top1, found.same_choice, found.wer) == (1, 1, 0)


# Real weights


@pytest.fixture(scope="module")
def real() -> whisper.Whisper:
    path = shared("whisper-tiny.en/tiny.en.refit-v0.safetensors")
    return stock_model(weights.load(str(path), offline=True))


def test_real_speech(real: whisper.Whisper, jfk: Path):
    """The embedding was fitted without timestamps, so it is decoded without them."""
    assert not knows_timestamps(real)
    audio = load_audio(jfk)
    generator = torch.Generator().manual_seed(1)

    def noisy(mel: Tensor) -> Tensor:
        features = real.encoder(mel)
        return features + 1e-6 * torch.randn(features.shape, generator=generator)

    found = semantic(real, noisy, audio)
    assert "my fellow americans" in found.text["reference"].lower()
    assert not found.timestamps
    assert found.tokens_identical
    assert 0 < found.kl_max < 1e-8
    assert (found.same_top1, found.rank_one, found.wer) == (1, 1, 0)
    assert found.coverage.duration == found.coverage.reference == 11


def test_real_speech_from_a_damaged_encoder(real: whisper.Whisper, jfk: Path):
    found = semantic(real, lambda mel: real.encoder(mel) * 0.9, load_audio(jfk))
    assert not found.tokens_identical
    assert found.kl_mean > 0.1
    assert found.worst_rank > 1
    assert found.first_difference.window == 0
    assert found.wer > 0
