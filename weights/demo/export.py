"""Write a training checkpoint as `demo.safetensors`: OpenAI's names, float16, the used rows only.

    python -m weights.demo.export --run build/demo/run --out weights/demo/demo.safetensors

The rows of the token embedding that no training used are one shared row (see `weights/compact.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from whisper.tokenizer import get_tokenizer

from weights.demo.train import DIMS, Trainee, used_tokens

LIMIT = 40_000_000  # bytes, the most that the repository should carry


def steps_behind(path: Path) -> int:
    """The training steps behind a file of this module, as its metadata has them; 0: it has none."""
    with safe_open(path, "pt") as file:
        return int((file.metadata() or {}).get("steps", 0))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m weights.demo.export", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("build/demo/run"))
    parser.add_argument("--out", type=Path, default=Path("weights/demo/demo.safetensors"))
    args = parser.parse_args(argv)

    state = torch.load(args.run / "checkpoint.pt", weights_only=True)
    tokenizer = get_tokenizer(multilingual=False)
    tokens = used_tokens(tokenizer)
    model = Trainee(len(tokens), sum(token < tokenizer.eot for token in tokens))
    model.load_state_dict(state["model"])
    found = model.whisper.state_dict()
    found["decoder.token_embedding.weight"] = model.token_embedding().detach()
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in found.items()}
    tensors["decoder.token_embedding.tokens"] = torch.tensor(tokens, dtype=torch.int32)
    metadata = {
        "format": "pt",
        "dims": json.dumps(asdict(DIMS)),
        "token_embedding": "compact",
        "source": "weights/demo, trained from random numbers on synthetic speech",
        "steps": str(state["step"]),
    }
    temporary = args.out.with_suffix(".tmp")
    save_file(tensors, temporary, metadata)
    size = temporary.stat().st_size
    if size > LIMIT:
        temporary.unlink()
        print(f"export: the file has {size:,} bytes, the limit is {LIMIT:,}", file=sys.stderr)
        return 1
    temporary.chmod(0o644)  # safetensors writes for the owner alone
    temporary.replace(args.out)
    print(f"export: {args.out}, {len(tensors)} tensors, {size:,} bytes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
