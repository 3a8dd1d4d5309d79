"""How a transcript differs from what was said: words, sentences, their times.

Words are compared as they are spelt, in lower case, split at spaces; numbers are words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jiwer
import numpy as np

from weights.demo.speech import SAMPLE_RATE
from weights.demo.trials import Recording, Sentence

BOUNDARY = 0.3  # seconds that a segment may begin or end beside its sentence


def text_of(segments: Iterable[Sentence]) -> str:
    """The words of all, in lower case, a space between them."""
    return " ".join(" ".join(s.text for s in segments).lower().split())


def word_errors(truth: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """WER and what it is made of, each text aligned on its own; words are split at spaces."""
    out = jiwer.process_words([t.lower() for t in truth], [h.lower() for h in heard])
    return {
        "wer": out.wer,
        "substitutions": out.substitutions,
        "deletions": out.deletions,
        "insertions": out.insertions,
        "words": out.hits + out.substitutions + out.deletions,
    }


def boundaries(sentences: Sequence[Sentence], segments: Sequence[Sentence]) -> tuple[int, int]:
    """(sentence starts with a segment's start within BOUNDARY + ends with an end, starts + ends)"""
    found = 0
    for edge in ("start", "end"):
        times = np.array([getattr(s, edge) for s in segments])
        for sentence in sentences:
            distance = np.abs(times - getattr(sentence, edge))
            found += bool((distance <= BOUNDARY + 1e-6).any())
    return found, 2 * len(sentences)


def lost(sentences: Sequence[Sentence], heard: str) -> list[str]:
    """Sentences of whose words half at most are heard, in the alignment of the whole text."""
    words = [s.text.lower().split() for s in sentences]
    hit = np.zeros(sum(map(len, words)), bool)
    (chunks,) = jiwer.process_words(text_of(sentences), heard).alignments
    for chunk in chunks:
        if chunk.type == "equal":
            hit[chunk.ref_start_idx : chunk.ref_end_idx] = True
    firsts = np.cumsum([0, *map(len, words)])
    return [
        s.text
        for s, first, own in zip(sentences, firsts, words, strict=False)
        if 2 * int(hit[first : first + len(own)].sum()) <= len(own)
    ]


def repeated(sentences: Sequence[Sentence], heard: str) -> list[str]:
    """Sentences of which at least half of the runs of three words are heard more often than said.

    A sentence of fewer than three words is never among them.
    """

    def runs(text: str) -> list[tuple[str, ...]]:
        words = text.lower().split()
        return list(zip(words, words[1:], words[2:], strict=False))

    said, found = Counter(runs(text_of(sentences))), Counter(runs(heard))
    again = {s.text: [found[run] > said[run] for run in runs(s.text)] for s in sentences}
    return [text for text, more in again.items() if more and 2 * sum(more) >= len(more)]


def uncovered(sentences: Sequence[Sentence], segments: Sequence[Sentence]) -> float:
    """The longest stretch of speech, in seconds, that lies in no segment."""
    longest = 0.0
    for sentence in sentences:
        at = sentence.start
        for segment in sorted(segments, key=lambda s: s.start):
            if segment.end <= at or segment.start >= sentence.end:
                continue
            longest = max(longest, segment.start - at)
            at = max(at, segment.end)
        longest = max(longest, sentence.end - at)
    return longest


def long_measures(recording: Recording, segments: list[Sentence]) -> dict[str, Any]:
    """Everything about a recording of several windows."""
    heard = text_of(segments)
    found, edges = boundaries(recording.sentences, segments)
    return {
        "seconds": len(recording.samples) / SAMPLE_RATE,
        "sentences": len(recording.sentences),
        **word_errors([recording.text], [heard]),
        "first": segments[0].start if segments else None,
        "last": segments[-1].end if segments else None,
        "longest_uncovered": uncovered(recording.sentences, segments),
        "lost": lost(recording.sentences, heard),
        "repeated": repeated(recording.sentences, heard),
        "boundaries_missed": (edges - found) / edges,
    }
