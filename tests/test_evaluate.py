"""The evaluation of `demo` measures what it says; its recordings, its limits, its picture."""

from __future__ import annotations

import json
import random
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from encoder.audio import load_audio
from weights.demo import curves, evaluate, measures, samples, trials
from weights.demo.speech import SAMPLE_RATE, VOICES
from weights.demo.trials import Recording, Sentence

TEXT = [
    Sentence("the cat sees Monday", 0.5, 2.0),
    Sentence("a dog calls", 2.5, 4.0),
    Sentence("red nine under harvest so", 4.5, 7.0),
]
HEARD = "the cat sees monday a dog calls red nine under harvest so"


# ---------------------------------------------------------------- measures


def test_words_are_counted_as_they_are_spelt():
    errors = measures.word_errors(["Twenty two cats", "a dog"], ["twenty to cats", "dog dog"])
    assert errors["words"] == 5
    assert (errors["substitutions"], errors["deletions"], errors["insertions"]) == (2, 0, 0)
    assert errors["wer"] == pytest.approx(0.4)


def test_a_boundary_counts_within_0_3_s_and_in_its_kind():
    close = [Sentence("", s.start + 0.3, s.end - 0.3) for s in TEXT]
    assert measures.boundaries(TEXT, close) == (6, 6)
    far = [Sentence("", s.start + 0.31, s.end) for s in TEXT]
    assert measures.boundaries(TEXT, far) == (3, 6)
    whole = [Sentence("", 0.5, 7.0)]
    assert measures.boundaries(TEXT, whole) == (2, 6)
    swapped = [Sentence("", s.end, s.start) for s in TEXT]
    assert measures.boundaries(TEXT, swapped) == (0, 6)
    assert measures.boundaries(TEXT, []) == (0, 6)


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        (HEARD, []),
        ("the cat sees monday red nine under harvest so", ["a dog calls"]),
        ("the cat sees monday a dog falls red nine under harvest so", []),  # two of three words
        ("the cat sees monday a dock falls red nine under harvest so", ["a dog calls"]),
        ("the cat sees monday red red red red nine under harvest so", ["a dog calls"]),  # a loop
        ("the cat a dog calls red nine under harvest so", ["the cat sees Monday"]),
        ("", [s.text for s in TEXT]),
    ],
)
def test_lost_sentences(heard, expected):
    assert measures.lost(TEXT, heard) == expected


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        (HEARD, []),
        (HEARD + " red nine under harvest so", ["red nine under harvest so"]),
        (HEARD.replace("a dog calls", "a dog calls a dog calls"), ["a dog calls"]),
        (HEARD.replace("monday", "monday monday monday"), []),  # a stutter repeats no sentence
        (HEARD + " nine under harvest so", ["red nine under harvest so"]),
        ("", []),
    ],
)
def test_repeated_sentences(heard, expected):
    assert measures.repeated(TEXT, heard) == expected


def test_what_is_said_twice_may_be_heard_twice():
    twice = [*TEXT, Sentence(TEXT[1].text, 8.0, 9.5)]
    assert measures.repeated(twice, HEARD + " a dog calls") == []
    assert measures.repeated(twice, HEARD + " a dog calls a dog calls") == ["a dog calls"]


@pytest.mark.parametrize(
    ("segments", "longest"),
    [
        ([(0.5, 7.0)], 0.0),
        ([(0.0, 3.0), (2.9, 9.0)], 0.0),
        ([(0.5, 2.0), (2.5, 4.0)], 2.5),
        ([(4.5, 7.0), (0.5, 2.0), (2.8, 4.0)], 0.3),  # in any order
        ([(0.5, 4.1), (4.5, 5.0), (5.4, 6.0)], 1.0),
        ([], 2.5),
    ],
)
def test_speech_in_no_segment(segments, longest):
    heard = [Sentence("", *times) for times in segments]
    assert measures.uncovered(TEXT, heard) == pytest.approx(longest)


# ---------------------------------------------------------------- recordings


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held out: twelve utterances of noise by every voice, 2 to 4 s. Trained: one of their
    texts."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(1)
    lengths = rng.integers(2 * SAMPLE_RATE, 4 * SAMPLE_RATE, 12 * len(VOICES))
    starts = np.cumsum([0, *lengths])
    rows = [
        {
            "text": f"{VOICES[n % len(VOICES)]} says number {n}",
            "voice": VOICES[n % len(VOICES)],
            "start": int(starts[n]),
            "length": int(lengths[n]),
        }
        for n in range(len(lengths))
    ]
    spoken = rng.integers(-9000, 9000, starts[-1], np.int16)
    for split, some in (("held-out", rows), ("train", rows[:1])):
        np.save(folder / f"{split}-000.npy", spoken)
        (folder / f"{split}-000.json").write_text(json.dumps(some))
    return folder


@pytest.fixture(scope="module")
def corpus(corpus_folder: Path) -> trials.Corpus:
    return trials.Corpus(corpus_folder, "held-out")


@pytest.fixture(scope="module")
def windows(corpus: trials.Corpus) -> list[Recording]:
    return trials.windows(corpus, list(range(len(corpus.rows))), 2 * len(VOICES))


def in_its_place(recording: Recording, corpus: trials.Corpus) -> None:
    """Every sentence sounds where its times say, and nothing sounds between them."""
    rest = recording.samples.copy()
    for sentence in recording.sentences:
        clip = corpus.audio(corpus.text.index(sentence.text))
        start = round(sentence.start * SAMPLE_RATE)
        found = recording.samples[start : start + len(clip)]
        assert np.dot(found, clip) / np.linalg.norm(found) / np.linalg.norm(clip) > 0.999
        assert sentence.end - sentence.start == pytest.approx(len(clip) / SAMPLE_RATE, abs=1e-6)
        rest[start : start + len(clip)] = 0
    assert not rest.any()


def test_windows_are_30_s_of_one_voice(windows, corpus):
    for n, window in enumerate(windows):
        assert len(window.samples) == 30 * SAMPLE_RATE
        assert window.voice == VOICES[n % len(VOICES)]
        assert all(s.text.startswith(f"{window.voice} says") for s in window.sentences)
        assert len(window.sentences) >= 5
        assert window.sentences[0].start <= 0.9
        in_its_place(window, corpus)
    texts = [s.text for w in windows[: len(VOICES)] for s in w.sentences]
    assert len(set(texts)) == len(texts)  # no sentence twice before all have come


def test_the_same_seed_makes_the_same_windows(windows, corpus):
    again = trials.windows(corpus, list(range(len(corpus.rows))), 2 * len(VOICES))
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(windows, again, strict=True))


@pytest.mark.parametrize("snr", [20, 10])
def test_noise_is_as_loud_as_it_says(windows, corpus, snr):
    kinds = set()
    for n, clean in enumerate(windows):
        noisy = trials.noisy(clean, snr, n, corpus)
        spoken = np.abs(clean.samples) > 1e-3
        # `level` scales the mixture: what the clean part was scaled by is its projection.
        scale = np.dot(noisy.samples, clean.samples) / np.dot(clean.samples, clean.samples)
        noise = noisy.samples - scale * clean.samples
        signal = np.mean((scale * clean.samples[spoken]) ** 2)
        assert 10 * np.log10(signal / np.mean(noise**2)) == pytest.approx(snr, abs=0.3)
        kinds.add((noisy.voice, noisy.noise))
    assert kinds == {(voice, noise) for voice in VOICES for noise in ("white", "pink")}


def test_the_long_recording_is_exactly_as_long_and_its_pauses_are_short(corpus):
    long = trials.long_recording(corpus, list(range(len(corpus.rows))))
    assert len(long.samples) == round(161.5 * SAMPLE_RATE)
    assert len(long.sentences) >= 40
    assert len({s.text for s in long.sentences}) == len(long.sentences)
    edges = [0.0, *(t for s in long.sentences for t in (s.start, s.end)), 161.5]
    pauses = np.diff(edges)[::2]
    assert pauses.min() >= 0.1
    assert pauses.max() <= 1.0
    in_its_place(long, corpus)


def test_pauses_that_do_not_fit_are_refused():
    clips = [np.ones(SAMPLE_RATE, np.float32)] * 2
    made, starts = samples.with_pauses(clips, [1, 1, 2], 4 * SAMPLE_RATE)
    assert starts == [SAMPLE_RATE // 2, 2 * SAMPLE_RATE]
    assert made.sum() == 2 * SAMPLE_RATE
    for seconds in (8, 2):  # too long ones, none
        with pytest.raises(ValueError, match="pauses of"):
            samples.with_pauses(clips, [1, 1, 2], seconds * SAMPLE_RATE)


def test_nothing_is_silence_and_noise_at_two_levels(corpus):
    recordings = trials.nothing(corpus)
    names = [r.name for r in recordings]
    assert len(set(names)) == len(names) == 7
    assert not recordings[0].samples.any()
    for recording in recordings[1:]:
        db = 10 * np.log10(np.mean(recording.samples.astype(np.float64) ** 2))
        assert recording.name.endswith(f" at {round(db)} dB")
        assert len(recording.samples) == 30 * SAMPLE_RATE
        assert not recording.sentences


def test_flac_is_the_samples_themselves(tmp_path: Path):
    spoken = np.random.default_rng(1).integers(-9000, 9000, 70_001, np.int16)
    samples.write_flac(tmp_path / "a.flac", spoken)
    np.testing.assert_array_equal(load_audio(tmp_path / "a.flac"), spoken / np.float32(32768))


def test_samples_of_voices_no_longer_used_are_removed_and_no_other_file(tmp_path: Path):
    for name in ("old.flac", "kept.flac", "own.flac"):
        (tmp_path / name).touch()
    rows = [{"file": "old.flac"}, {"file": "kept.flac"}]
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    samples.remove_former(tmp_path, {"kept.flac", "new.flac"})
    assert sorted(p.name for p in tmp_path.glob("*.flac")) == ["kept.flac", "own.flac"]


# ---------------------------------------------------------------- hearing


class Model:
    """Hears one random word, in place of `whisper.Whisper`."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def transcribe(self, audio: np.ndarray, **options: object) -> dict:
        self.calls.append(options)
        word = f" word{torch.randint(10**9, (1,)).item()}"
        return {"segments": [{"text": word, "start": 0.0, "end": 1.00000001}]}


def test_what_was_heard_once_is_not_heard_again_and_half_a_line_is_nothing(tmp_path: Path):
    notes, rng = tmp_path / "notes.jsonl", np.random.default_rng(1)
    first, second = (
        Recording(name, rng.standard_normal(9).astype(np.float32), []) for name in "ab"
    )
    model = Model()
    heard = [evaluate.Listener(model, notes)(r) for r in (first, second)]
    assert model.calls == [{"fp16": False}] * 2
    lines = notes.read_text()
    assert evaluate.Listener(model, notes)(second) == heard[1]
    assert len(model.calls) == 2
    notes.write_text(lines[:-5])  # killed while it wrote
    again = evaluate.Listener(model, notes)
    assert [again(r) for r in (first, second)] == heard  # the same random words: seeded by samples
    assert len(model.calls) == 3
    assert notes.read_text() == lines


def test_other_options_are_handed_on(tmp_path: Path):
    model = Model()
    recording = Recording("a", np.zeros(9, np.float32), [])
    evaluate.Listener(model, tmp_path / "notes.jsonl", temperature=0.0)(recording)
    assert model.calls == [{"fp16": False, "temperature": 0.0}]


# ---------------------------------------------------------------- the report


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus_folder: Path) -> list[str]:
    """The command line of an evaluation on the made-up corpus and a made-up lecture."""
    spoken = np.random.default_rng(1).integers(-9000, 9000, 8 * SAMPLE_RATE, np.int16)
    samples.write_flac(tmp_path / "lecture.flac", spoken)
    sentences = [{"text": s.text, "start": s.start, "end": s.end} for s in TEXT]
    row = {"file": "lecture.flac", "text": "", "sentences": sentences}
    (tmp_path / "samples.json").write_text(json.dumps([{"file": "a.flac"}, row]))
    argv = ["--data", str(corpus_folder), "--samples", str(tmp_path), "--windows", "28"]
    return [*argv, "--json", str(tmp_path / "evaluation.json")]


def test_whoever_hears_everything_meets_every_limit(ready, tmp_path, monkeypatch, capsys):
    trained = f"{VOICES[0]} says number 0"
    seen: list[Recording] = []

    def perfect(self: object, recording: Recording) -> list[Sentence]:
        seen.append(recording)
        return recording.sentences

    monkeypatch.setattr(evaluate.Listener, "__call__", perfect)
    assert evaluate.main(ready) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    # The made-up lecture's last sentence ends 1.0 s before the recording: just within.
    assert report["all_met"] is True
    assert report["limits"] == evaluate.limits(report)
    assert len(report["limits"]) == 14
    assert report["clean"]["wer"] == report["20 dB"]["wer"] == report["lecture"]["wer"] == 0
    assert set(report["10 dB"]["by_voice"]) == set(VOICES)
    assert set(report["10 dB"]["by_noise"]) == {"white", "pink"}
    assert len(seen) == 3 * 28 + 2 + 7
    assert trained not in {s.text for r in seen for s in r.sentences}
    out, err = capsys.readouterr()
    assert out.splitlines() == evaluate.table(report)
    assert "| all | 0.0 % | 0.0 % | 0.0 % |" in out
    assert "clean 28/28" in err


def test_whoever_hears_nothing_or_invents_meets_none(ready, tmp_path, monkeypatch, capsys):
    def deaf(self: object, recording: Recording) -> list[Sentence]:
        if not recording.sentences:
            return [Sentence("thank you", 0.0, 30.0)]
        return [Sentence("the cat sees Monday " * 3, 9.0, 9.5)] * (recording.name != "lecture")

    monkeypatch.setattr(evaluate.Listener, "__call__", deaf)
    assert evaluate.main(ready) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    met = {row["what"]: row for row in report["limits"] if row["met"]}
    assert set(met) == {f"sentences repeated, {n}" for n in ("held-out recording", "lecture")}
    assert report["all_met"] is False
    assert report["nothing"][0] == {"what": "silence", "words": 2, "heard": "thank you"}
    out = capsys.readouterr().out
    assert "| words heard in silence, noise and hum | 0 | 14 | **no** |" in out
    assert "| seconds left out, lecture | 1 | - | **no** |" in out


def test_quick_writes_no_report(ready, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate.Listener, "__call__", lambda self, r: r.sentences)
    assert evaluate.main([*ready[:-2], "--quick"]) == 0
    assert capsys.readouterr().out == "clean WER 0.0000, lecture WER 0.0000\n"
    with pytest.raises(SystemExit):
        evaluate.main([*ready, "--quick"])
    assert not (tmp_path / "evaluation.json").exists()


# ---------------------------------------------------------------- the picture


def losses(count: int) -> list[dict[str, float]]:
    rng = random.Random(1)
    return [
        {
            "step": 20 * (n + 1),
            "cross_entropy": 7 / (n + 1) + rng.random(),
            "ctc": 30 / (n + 1),
            "alignment": 9 / (n + 1),
            "words": 8 / (n + 1),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 300])
def test_the_curves_are_in_the_picture(count):
    picture = ElementTree.fromstring(curves.svg(losses(count)))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 2 * len(curves.CURVES)
    for line in lines:
        points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
        assert len(points) == count
        assert all(curves.LEFT <= x <= curves.RIGHT for x, _ in points)
        assert all(curves.TOP <= y <= curves.BOTTOM for _, y in points)
    assert points[-1][0] == curves.RIGHT
    if count > 1:
        first, last = (float(p.split(",")[1]) for p in lines[2].get("points").split()[:: count - 1])
        assert first < last  # the CTC fell: lower on the page


def test_a_loss_that_is_not_there_has_no_point():
    """The decoder learns later than the encoder."""
    rows = [row | {"cross_entropy": None, "alignment": None, "words": None} for row in losses(9)]
    rows += [row | {"step": row["step"] + 180} for row in losses(9)]
    picture = ElementTree.fromstring(curves.svg(rows))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [
        9, 9, 18, 18, 9, 9, 9, 9,
    ]  # fmt: skip


def test_a_resumed_runs_rows_count_once(tmp_path: Path):
    rows = [*losses(4), {"step": 60, "cross_entropy": 1.5, "ctc": 2.5}]
    path = tmp_path / "losses.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 1')
    read = curves.read_losses(path)
    assert [r["step"] for r in read] == [20, 40, 60, 80]
    assert read[2]["ctc"] == 2.5
    assert curves.main(["--losses", str(path), "--out", str(tmp_path / "curves.svg")]) == 0
    assert (tmp_path / "curves.svg").read_text() == curves.svg(read)


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), ("", "there must be one")])
def test_without_losses_there_is_no_picture(tmp_path: Path, capsys, content, says):
    path = tmp_path / "losses.jsonl"
    if content is not None:
        path.write_text(content)
    assert curves.main(["--losses", str(path), "--out", str(tmp_path / "curves.svg")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "curves.svg").exists()
