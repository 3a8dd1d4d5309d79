"""Train `demo` from scratch: Whisper's own modules, cross-entropy plus CTC.

    python -m weights.demo.train --data build/demo --out build/demo/run --steps 3500

Resumable (the newest checkpoint in --out is taken up again) and seeded: the batch of a step depends
on the seed and the step alone. Refuses to start without the corpus of `weights.demo.speech`.

Two economies, both exact:
- Only the used tokens have an embedding row of their own; all others share one more row, whose
  logit gets + log(number of unused tokens). That is the full softmax over OpenAI's vocabulary.
- The encoder runs on the batch's own length: its positional embedding is a fixed sinusoid, cut to
  that length. Every tenth batch or so is padded to 30 s, as Whisper pads.

float32, or bfloat16 autocast with --bf16: the faster one on a processor with AMX, the slower one
without.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whisper.audio import log_mel_spectrogram
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import Tokenizer, get_tokenizer

from weights.demo.speech import SAMPLE_RATE
from weights.demo.text import VOCABULARY

DIMS = ModelDimensions(
    n_mels=80, n_audio_ctx=1500, n_audio_state=384, n_audio_head=6, n_audio_layer=4,
    n_vocab=51864, n_text_ctx=448, n_text_state=384, n_text_head=6, n_text_layer=2,
)  # fmt: skip
CTC_ALPHABET = " abcdefghijklmnopqrstuvwxyz"  # 0 is the blank
CTC_WEIGHT = 0.3
PEAK_LR = 1e-3
WARMUP = 300  # steps
SHORT_ONLY = 400  # steps on windows of 1.3 s before longer ones come in
# (seconds, windows a batch, share of the steps after SHORT_ONLY); 30.0 is Whisper's own padding
LENGTHS = ((1.3, 48, 0.2), (2.8, 24, 0.45), (4.6, 14, 0.17), (8.0, 8, 0.08), (30.0, 2, 0.1))


def used_tokens(tokenizer: Tokenizer) -> list[int]:
    """Token ids that `demo` may say: its words, the special tokens, the timestamps."""
    words = {t for w in VOCABULARY for t in tokenizer.encode(" " + w)}
    special = {tokenizer.sot, tokenizer.eot, tokenizer.no_timestamps, tokenizer.no_speech,
               tokenizer.sot_prev}  # fmt: skip
    stamps = set(range(tokenizer.timestamp_begin, tokenizer.timestamp_begin + 1501))
    return sorted(words | special | stamps)


class Corpus:
    """The spoken utterances of one split: `audio(i)` float32 samples, `text[i]`, `seconds[i]`."""

    def __init__(self, folder: Path, split: str):
        self.shards: list[np.ndarray] = []
        self.rows: list[tuple[int, int, int]] = []
        self.text: list[str] = []
        self.voice: list[str] = []
        for path in sorted(folder.glob(f"{split}-*.json")):
            samples = np.load(path.with_suffix(".npy"), mmap_mode="r")
            for row in json.loads(path.read_text()):
                self.rows.append((len(self.shards), row["start"], row["length"]))
                self.text.append(row["text"])
                self.voice.append(row["voice"])
            self.shards.append(samples)
        if not self.rows:
            raise SystemExit(f"train: no {split} corpus in {folder}; run weights.demo.speech first")
        self.seconds = np.array([r[2] for r in self.rows]) / SAMPLE_RATE
        self.by_length = np.argsort(self.seconds, kind="stable")

    def audio(self, i: int) -> np.ndarray:
        shard, start, length = self.rows[i]
        return np.asarray(self.shards[shard][start : start + length], np.float32) / 32768

    def pick(self, rng: random.Random, low: float, high: float) -> int | None:
        """A random utterance that lasts between `low` and `high` seconds."""
        ordered = self.seconds[self.by_length]
        a, b = np.searchsorted(ordered, [low, high])
        return int(self.by_length[rng.randrange(a, b)]) if b > a else None


@dataclass(frozen=True)
class Window:
    """One training window: samples, sentences as (text, start s, end s), and its full length."""

    samples: np.ndarray
    sentences: list[tuple[str, float, float]]


def compose(corpus: Corpus, rng: random.Random, seconds: float) -> Window:
    """Sentences with pauses between them, noise and level varied, in `seconds` of audio.

    A window of 30 s holds a random amount of speech and then silence; 4 % of all hold none.
    """
    noise_rng = np.random.default_rng(rng.getrandbits(64))
    room = rng.uniform(1.5, 12.0) if seconds == 30.0 else seconds
    samples = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    sentences = []
    at = rng.choice([0.0, rng.uniform(0.0, 0.15 * room)])
    gain = 10 ** (rng.uniform(-18, 0) / 20)
    empty = rng.random() < 0.04
    while not empty:
        low = 0.6 * room if seconds < 6 else 0.2
        i = corpus.pick(rng, min(low, room - at - 0.2), room - at)
        if i is None:
            break
        audio = corpus.audio(i)
        start = round(at * SAMPLE_RATE)
        samples[start : start + len(audio)] += audio[: len(samples) - start]
        sentences.append((corpus.text[i], at, at + len(audio) / SAMPLE_RATE))
        at = sentences[-1][2] + rng.uniform(0.15, 1.0)
        if room - at < 0.8:
            break
    peak = float(np.abs(samples).max()) or 1.0
    samples *= gain / peak
    if rng.random() < 0.5:  # white noise at 15 to 45 dB under the speech
        level = gain * 0.2 * 10 ** (-rng.uniform(15, 45) / 20)
        spoken = round(min(room, seconds) * SAMPLE_RATE)
        samples[:spoken] += level * noise_rng.standard_normal(spoken, np.float32)
    return Window(samples, sentences)


def tokens_of(window: Window, tokenizer: Tokenizer, timestamps: bool) -> list[int]:
    """The sequence that Whisper's training has for a window, `<|endoftext|>` included."""
    if not window.sentences:
        return [tokenizer.sot, tokenizer.no_speech, tokenizer.eot]
    tokens = [tokenizer.sot] + ([] if timestamps else [tokenizer.no_timestamps])
    for words, start, end in window.sentences:
        spoken = tokenizer.encode(" " + words)
        if timestamps:
            first, last = (tokenizer.timestamp_begin + round(t / 0.02) for t in (start, end))
            spoken = [first, *spoken, min(last, tokenizer.timestamp_begin + 1500)]
        tokens += spoken
    return [*tokens, tokenizer.eot]


@dataclass
class Batch:
    """mel (B, 80, frames) float32; tokens (B, n) rows of the compact table, -1 past the end;
    characters: the CTC targets, end to end, with their lengths."""

    mel: Tensor
    tokens: Tensor
    characters: Tensor
    character_lengths: Tensor


class Batches:
    """The batch of a step, from (seed, step) alone."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seed: int):
        self.corpus, self.tokenizer, self.seed = corpus, tokenizer, seed
        self.row = {t: i for i, t in enumerate(used_tokens(tokenizer))}

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"batch/{self.seed}/{step}")
        seconds, size, _ = rng.choices(LENGTHS, [share for *_, share in LENGTHS])[0]
        if step < SHORT_ONLY:
            seconds, size, _ = LENGTHS[0]
        windows = [compose(self.corpus, rng, seconds) for _ in range(size)]
        mel = torch.stack([log_mel_spectrogram(w.samples) for w in windows])
        rows = [
            torch.tensor([self.row[t] for t in tokens_of(w, self.tokenizer, rng.random() < 0.5)])
            for w in windows
        ]
        characters = [
            [1 + CTC_ALPHABET.index(c) for c in " ".join(s[0] for s in w.sentences).lower()]
            for w in windows
        ]
        return Batch(
            mel,
            nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1),
            torch.tensor([c for row in characters for c in row]),
            torch.tensor([len(row) for row in characters]),
        )


class Trainee(nn.Module):
    """`whisper.Whisper` with the compact vocabulary, and the CTC head that training alone uses."""

    def __init__(self, n_used: int):
        super().__init__()
        self.whisper = Whisper(replace(DIMS, n_vocab=n_used + 1))  # the last row: all unused tokens
        self.ctc = nn.Linear(DIMS.n_audio_state, len(CTC_ALPHABET) + 1)
        self.positions = self.whisper.encoder.positional_embedding
        nn.init.normal_(self.whisper.decoder.token_embedding.weight, std=0.02)
        nn.init.normal_(self.whisper.decoder.positional_embedding, std=0.01)
        self.log_unused = math.log(DIMS.n_vocab - n_used)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(cross-entropy, CTC), means over tokens and over characters."""
        encoder = self.whisper.encoder
        encoder.positional_embedding = self.positions[: batch.mel.shape[-1] // 2]
        features = encoder(batch.mel)
        encoder.positional_embedding = self.positions  # whole again, for the checkpoint
        inputs, targets = batch.tokens[:, :-1].clamp(min=0), batch.tokens[:, 1:]
        logits = self.whisper.decoder(inputs, features).float()
        logits = torch.cat([logits[..., :-1], logits[..., -1:] + self.log_unused], dim=-1)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        log_probs = self.ctc(features).float().log_softmax(-1).transpose(0, 1)
        frames = torch.full((batch.mel.shape[0],), log_probs.shape[0])
        ctc = F.ctc_loss(
            log_probs, batch.characters, frames, batch.character_lengths, zero_infinity=True
        )
        return cross_entropy, ctc


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    turn = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, turn))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.train", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=Path("build/demo/run"))
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast (needs AMX to pay)")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    tokenizer = get_tokenizer(multilingual=False)
    corpus = Corpus(args.data, "train")
    batches = Batches(corpus, tokenizer, args.seed)
    model = Trainee(len(batches.row))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    args.out.mkdir(parents=True, exist_ok=True)
    newest, first = args.out / "checkpoint.pt", 0
    if newest.exists():
        state = torch.load(newest, weights_only=True)
        if state["seed"] != args.seed:
            print(f"train: {newest} was trained with seed {state['seed']}", file=sys.stderr)
            return 1
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    hours = corpus.seconds.sum() / 3600
    print(
        f"train: {len(corpus.rows)} utterances, {hours:.1f} h, {len(batches.row)} tokens, "
        f"from step {first} to {args.steps}",
        file=sys.stderr,
    )

    began, losses = time.monotonic(), []
    with open(args.out / "losses.jsonl", "a") as log:
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps)
            batch = batches(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                cross_entropy, ctc = model(batch)
                loss = cross_entropy + CTC_WEIGHT * ctc
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append((cross_entropy.item(), ctc.item()))
            if (step + 1) % 20 == 0:
                mean = np.mean(losses, axis=0)
                row = {"step": step + 1, "cross_entropy": mean[0], "ctc": mean[1],
                       "seconds": time.monotonic() - began}  # fmt: skip
                log.write(json.dumps(row) + "\n")
                log.flush()
                print({k: round(float(v), 3) for k, v in row.items()}, file=sys.stderr)
                losses.clear()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "seed": args.seed,
                    "dims": asdict(DIMS),
                }
                torch.save(state, newest.with_suffix(".tmp"))
                newest.with_suffix(".tmp").replace(newest)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
