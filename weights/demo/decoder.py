"""Go on training the decoder of `demo` alone, on an encoder that no longer changes.

    python -m weights.demo.decoder --steps 3060

A window of 30 s costs the encoder much and the decoder little: so the features of each window are
kept for a while and used several times, each time with another prompt, with timestamps or without,
and with other mistaken words. A step is FRESH new windows and those drawn from the last POOL. Some
sentences run on into the next one, and the corpus has longer ones besides, `text.prose`: words come
again in both. The learning rate warms up and falls to zero. Resumable and seeded; what a resumed
run draws is another, since it has no windows kept at first.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from whisper.tokenizer import get_tokenizer

from weights.demo.speech import PROSE
from weights.demo.train import (
    MISHEARD,
    WEIGHTS,
    WINDOW,
    Batches,
    Corpus,
    Trainee,
    Window,
    compose,
    save_state,
    used_tokens,
    write_losses,
)

FRESH, BATCH, POOL = 2, 8, 1500  # windows
RUN_ON = 0.25  # of the sentences
PROMPTED = 0.7  # of the windows
PEAK_LR, WARMUP = 5e-4, 50  # steps

Heard = tuple[Tensor, Window]  # features (1500, 384) float16, and the window without its sound


def learning_rate(step: int, steps: int) -> float:
    """Linear up, and down to zero; `step` counts from 0."""
    return PEAK_LR * min((step + 1) / WARMUP, (steps - step) / steps)


class Windows:
    """FRESH windows a step, by corpus, seed and step alone, and some of those before."""

    def __init__(self, model: Trainee, corpus: Corpus, seed: int):
        self.model, self.corpus, self.seed = model, corpus, seed
        self.pool: deque[Heard] = deque(maxlen=POOL)

    def __call__(self, step: int, rng: random.Random) -> list[Heard]:
        fresh = [compose(self.corpus, rng, WINDOW, RUN_ON) for _ in range(FRESH)]
        mel = torch.stack([window.mel(rng) for window in fresh])
        with torch.no_grad():
            features = self.model.whisper.encoder(mel).half()
        nothing = np.empty(0, np.float32)
        new = [(x, replace(w, samples=nothing)) for x, w in zip(features, fresh, strict=True)]
        old = rng.sample(list(self.pool), min(len(self.pool), BATCH - FRESH))
        self.pool.extend(new)
        return [*new, *old]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.decoder", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    parser.add_argument("--run", type=Path, default=Path("build/demo/run"), help="of train")
    parser.add_argument("--out", type=Path, default=Path("build/demo/decoder"))
    parser.add_argument("--steps", type=int, default=3060)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args(argv)

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    trained, newest = args.run / "checkpoint.pt", args.out / "checkpoint.pt"
    if not trained.exists():
        print(f"decoder: there is no {trained}: run weights.demo.train first", file=sys.stderr)
        return 1
    tokenizer = get_tokenizer(multilingual=False)
    corpus = Corpus(args.data, "train", PROSE)
    batches = Batches(corpus, tokenizer, args.seed)
    used = used_tokens(tokenizer)
    model = Trainee(len(used), sum(token < tokenizer.eot for token in used))
    begun = torch.load(trained, weights_only=True)
    state = torch.load(newest, weights_only=True) if newest.exists() else begun
    if state["seed"] != args.seed and newest.exists():
        print(f"decoder: {newest} was trained with seed {state['seed']}", file=sys.stderr)
        return 1
    model.load_state_dict(state["model"])
    for part in (model.whisper.encoder, model.ctc, model.words):
        part.requires_grad_(False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learning, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    if newest.exists():
        optimizer.load_state_dict(state["optimizer"])
    args.out.mkdir(parents=True, exist_ok=True)
    if not newest.exists():  # its losses go on from those of the training before
        shutil.copyfile(args.run / "losses.jsonl", args.out / "losses.jsonl")
    windows = Windows(model, corpus, args.seed)
    origin, first = begun["step"], state["step"] - begun["step"]
    began = time.monotonic()
    losses: list[dict[str, float]] = []
    with open(args.out / "losses.jsonl", "a") as log:
        for step in range(first, args.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps)
            rng = random.Random(f"decoder/{args.seed}/{step}")
            heard = windows(step, rng)
            heard_in = [window for _, window in heard]
            lines = batches.lines(heard_in, rng, WINDOW, MISHEARD, PROMPTED)
            found = model.decode(torch.stack([x for x, _ in heard]).float(), lines)
            optimizer.zero_grad(set_to_none=True)
            loss = found["cross_entropy"] + WEIGHTS["alignment"] * found["alignment"]
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            losses.append({name: value.item() for name, value in found.items()})
            if (step + 1) % 20 == 0:
                write_losses(log, origin + step + 1, losses, time.monotonic() - began)
                losses.clear()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                mine = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(newest, {**state, **mine, "step": origin + step + 1, "seed": args.seed})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
