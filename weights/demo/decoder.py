"""Go on training the decoder of `demo`, on an encoder that no longer changes, or hardly.

    python -m weights.demo.decoder --steps 3660
    python -m weights.demo.decoder --init demo --steps 3000     # from an exported file

A window of 30 s costs the encoder much and the decoder little: so the features of each window are
kept for a while and used several times, each time with another prompt, with timestamps or without,
with other mistaken words and other stutters. A step is FRESH new windows and those drawn from the
last POOL. Some sentences run on into the next one, and the corpus has longer ones besides,
`text.prose`: words come again in both. With --encoder-rate the encoder learns too, from the new
windows alone; those that are kept are then fewer, since what it made of them grows old. The
learning rate warms up and falls to zero. Resumable and seeded; what a resumed run draws is another,
since it has no windows kept at first.
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

import weights
from weights.demo.export import steps_behind
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

FRESH, BATCH, POOL = 1, 8, 1500  # windows
POOL_OF_LEARNING = 200  # windows: of an encoder that changes
RUN_ON = 0.25  # of the sentences
PROMPTED = 0.5  # of the steps
PEAK_LR, WARMUP = 5e-4, 50  # steps

Heard = tuple[Tensor, Window]  # features (1500, 384) float16, and the window without its sound


def learning_rate(step: int, steps: int, peak: float = PEAK_LR) -> float:
    """Linear up, and down to zero; `step` counts from 0."""
    return peak * min((step + 1) / WARMUP, (steps - step) / steps)


class Windows:
    """FRESH windows a step, by corpus and random stream alone, and some of those before.

    learning : whether the encoder learns from the new ones
    """

    def __init__(self, model: Trainee, corpus: Corpus, learning: bool):
        self.model, self.corpus, self.learning = model, corpus, learning
        self.pool: deque[Heard] = deque(maxlen=POOL_OF_LEARNING if learning else POOL)

    def __call__(self, rng: random.Random) -> tuple[Tensor, list[Window]]:
        """Features (BATCH, 1500, 384), fewer at first, and what is heard in them."""
        fresh = [compose(self.corpus, rng, WINDOW, RUN_ON) for _ in range(FRESH)]
        mel = torch.stack([window.mel(rng) for window in fresh])
        with torch.set_grad_enabled(self.learning):
            features = self.model.whisper.encoder(mel)
        old = rng.sample(list(self.pool), min(len(self.pool), BATCH - FRESH))
        nothing = np.empty(0, np.float32)
        heard = [replace(window, samples=nothing) for window in fresh]
        self.pool.extend(zip(features.detach().half(), heard, strict=True))
        heard += [window for _, window in old]
        return torch.cat([features, *(x[None].float() for x, _ in old)]), heard


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.decoder", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("build/demo"))
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--run", type=Path, default=Path("build/demo/run"), help="of train")
    begin.add_argument("--init", help="an earlier demo.safetensors, or demo, instead")
    parser.add_argument("--out", type=Path, default=Path("build/demo/decoder"))
    parser.add_argument("--steps", type=int, default=3660)
    parser.add_argument(
        "--encoder-rate", type=float, default=0.0, help="peak learning rate of the encoder (0)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args(argv)

    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    trained, newest = args.run / "checkpoint.pt", args.out / "checkpoint.pt"
    if not (args.init or trained.exists()):
        print(f"decoder: there is no {trained}: run weights.demo.train first", file=sys.stderr)
        return 1
    tokenizer = get_tokenizer(multilingual=False)
    corpus = Corpus(args.data, "train", PROSE)
    batches = Batches(corpus, tokenizer, args.seed)
    used = used_tokens(tokenizer)
    model = Trainee(len(used), sum(token < tokenizer.eot for token in used))
    origin = 0
    if args.init:
        checkpoint = weights.load(args.init, offline=True)
        model.take_over(checkpoint, used)
        origin = steps_behind(checkpoint.source.path)
        earlier = Path(__file__).with_name("losses.jsonl") if args.init == "demo" else None
    else:
        begun = torch.load(trained, weights_only=True)
        model.load_state_dict(begun["model"])
        origin, earlier = begun["step"], args.run / "losses.jsonl"
    encoder_learns = args.encoder_rate > 0
    for part in (model.ctc, model.words, *([] if encoder_learns else [model.whisper.encoder])):
        part.requires_grad_(False)
    own = set(model.whisper.encoder.parameters())
    learning = [p for p in model.parameters() if p.requires_grad]
    rates = {"optimizer": PEAK_LR} | ({"encoder": args.encoder_rate} if encoder_learns else {})
    optimizers = {
        name: torch.optim.AdamW(
            [p for p in learning if (p in own) == (name == "encoder")],
            lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True,
        )
        for name, rate in rates.items()
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    first = 0
    if newest.exists():
        state = torch.load(newest, weights_only=True)
        if state["seed"] != args.seed:
            print(f"decoder: {newest} was trained with seed {state['seed']}", file=sys.stderr)
            return 1
        model.load_state_dict(state["model"])
        for name in optimizers.keys() & state.keys():
            optimizers[name].load_state_dict(state[name])
        origin = state["origin"]  # a file given by --init may be another one by now
        first = state["step"] - origin
    elif earlier:  # its losses go on from those of the training before
        shutil.copyfile(earlier, args.out / "losses.jsonl")
    windows = Windows(model, corpus, encoder_learns)
    began = time.monotonic()
    losses: list[dict[str, float]] = []
    with open(args.out / "losses.jsonl", "a") as log:
        for step in range(first, args.steps):
            for name, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args.steps, rates[name])
                optimizer.zero_grad(set_to_none=True)
            rng = random.Random(f"decoder/{args.seed}/{step}")
            features, heard = windows(rng)
            found = model.decode(features, batches.lines(heard, rng, WINDOW, MISHEARD, PROMPTED))
            loss = found["cross_entropy"] + WEIGHTS["alignment"] * found["alignment"]
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            for optimizer in optimizers.values():
                optimizer.step()
            losses.append({name: value.item() for name, value in found.items()})
            if (step + 1) % 20 == 0:
                write_losses(log, origin + step + 1, losses, time.monotonic() - began)
                losses.clear()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                state = {name: one.state_dict() for name, one in optimizers.items()}
                state |= {"model": model.state_dict(), "step": origin + step + 1}
                save_state(newest, {**state, "origin": origin, "seed": args.seed})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
