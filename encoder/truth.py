"""What was said, from a file, and how far a transcript is from it: the word error rate.

Refuses a file that does not hold the words of every recording.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import jiwer
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer


class TruthError(Exception):
    """One sentence: which file, what is wrong with it."""


@dataclass(frozen=True)
class WordErrors:
    """Substituted, deleted and inserted words, and the words of the truth."""

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def rate(self) -> float:
        """Word error rate, 0 to beyond 1; only with words in the truth."""
        return (self.substitutions + self.deletions + self.insertions) / self.words


def word_errors(truth: str, heard: str, language: str) -> WordErrors:
    """Both texts normalised as OpenAI normalises before it counts, then aligned by jiwer.

    language : a code; "en" has a normaliser of its own, in which numbers become digits. Words are
        what spaces separate, so the figure says little of a language that is written without.
    """
    normalise = EnglishTextNormalizer() if language == "en" else BasicTextNormalizer()
    expected = normalise(truth).split()
    if not expected:
        return WordErrors(0, 0, len(normalise(heard).split()), 0)
    found = jiwer.process_words(" ".join(expected), normalise(heard))
    return WordErrors(found.substitutions, found.deletions, found.insertions, len(expected))


def read_truth(path: str, audio: list[str]) -> dict[str, str]:
    """{audio file: what is said in it}, from a text file for one recording, or from JSON.

    JSON, told by the name's end, is a list of objects with `file`, a name without folders, and
    `text`, as in `samples/samples.json`. Raises TruthError.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TruthError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TruthError(f"{path} is not text in UTF-8.") from error
    if path.lower().endswith(".json"):
        texts = texts_by_file(path, content)
        found = {file: texts.get(os.path.basename(file)) for file in audio}
    elif len(audio) == 1:
        found = {audio[0]: content}
    else:
        raise TruthError(f"{path} is one text for {len(audio)} audio files; a .json names each.")
    for file, text in found.items():
        if text is None:
            raise TruthError(f"{path} has no text for {os.path.basename(file)}.")
        if not BasicTextNormalizer()(text).strip():
            raise TruthError(f"{path} has no words for {os.path.basename(file)}.")
    return {file: text for file, text in found.items() if text is not None}


def texts_by_file(path: str, content: str) -> dict[str, str]:
    """{file name: text} of a JSON list; TruthError if it is anything else."""
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TruthError(f"{path} is not JSON: {error}.") from error
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("file", "text"))
        for row in rows
    ):
        raise TruthError(f"{path} is not a list of objects with a `file` and a `text`.")
    return {row["file"]: row["text"] for row in rows}
