"""`python -m weights`: shows a checkpoint or exports it; a checkpoint that is not whole gets one
sentence on stderr and exit code 1."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import MODELS, Checkpoint, WeightsError, load
from .export import export

_EPILOG = f"""\
SPEC is, in this order:
  demo                  the checkpoint that comes with the package
  an existing path      .safetensors, .safetensors.index.json, .pt, or a folder with
                        model.safetensors (or its index) and config.json
  a model name          {", ".join(list(MODELS)[:6])},
                        {", ".join(list(MODELS)[6:])}
  owner/name            a Hugging Face repo, such as openai/whisper-tiny

Names and repos are downloaded once, into the Hugging Face cache (HF_HOME), and their checksums are
checked on every use. HF_ENDPOINT names a mirror.
"""


def _parser() -> argparse.ArgumentParser:
    spec = argparse.ArgumentParser(add_help=False)
    spec.add_argument("spec", metavar="SPEC", help="the checkpoint; see below")
    spec.add_argument("--offline", action="store_true", help="use the cache, open no connection")
    spec.add_argument("--revision", metavar="R", help="branch, tag or commit of the repo")
    spec.add_argument("--encoder-only", action="store_true", help="the encoder's tensors alone")

    parser = argparse.ArgumentParser(
        prog="python -m weights",
        description="Any published form of Whisper, as one checked set of tensors.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = {
        "show": "list every tensor: shape, dtype, sha256; then dims and totals",
        "export": "write one safetensors file under OpenAI's names",
    }
    show, write = (
        commands.add_parser(
            name,
            parents=[spec],
            help=about[name],
            description=about[name],
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name in about
    )
    show.add_argument("--full", action="store_true", help="all 64 hex digits of each sha256")
    show.add_argument("--json", action="store_true", help="one JSON object (with whole sha256)")
    write.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    write.add_argument("--force", action="store_true", help="replace FILE if it exists")
    return parser


def _description(checkpoint: Checkpoint) -> dict[str, object]:
    tensors = [
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": _dtype(tensor),
            "sha256": _sha256(tensor),
        }
        for name, tensor in checkpoint.tensors.items()
    ]
    source = checkpoint.source
    return {
        "source": {
            "name": source.name,
            "revision": source.revision,
            "sha256": source.sha256,
            "path": str(source.path),
        },
        "dims": asdict(checkpoint.dims),
        "has_decoder": checkpoint.has_decoder,
        "tensors": tensors,
        "totals": {
            "tensors": len(tensors),
            "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
            "bytes": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        },
    }


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _sha256(tensor: torch.Tensor) -> str:
    """Of the tensor's bytes as a safetensors file holds them: row-major, little-endian."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _print_table(checkpoint: Checkpoint, *, full: bool) -> None:
    width = max(len(name) for name in checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        shape = " x ".join(str(n) for n in tensor.shape)
        digits = _sha256(tensor) if full else _sha256(tensor)[:12]
        print(f"{name:{width}}  {shape:>16}  {_dtype(tensor):8}  {digits}")
    dims = asdict(checkpoint.dims)
    print()
    print("dims    " + "  ".join(f"{name}={value}" for name, value in dims.items()))
    source = checkpoint.source
    at = f" at {source.revision}" if source.revision else ""
    print(f"source  {source.name}{at}, sha256 {source.sha256}")
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    size = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    what = "encoder and decoder" if checkpoint.has_decoder else "encoder alone"
    count = len(checkpoint.tensors)
    print(f"total   {count} tensors, {parameters:,} parameters, {size:,} bytes, {what}")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 with one sentence on stderr; argparse itself exits with 2 on a wrong command line."""
    args = _parser().parse_args(argv)
    try:
        checkpoint = load(
            args.spec,
            offline=args.offline,
            revision=args.revision,
            encoder_only=args.encoder_only,
        )
        if args.command == "export":
            export(checkpoint, args.output, force=args.force)
            print(
                f"wrote {args.output}: {len(checkpoint.tensors)} tensors of {args.spec}",
                file=sys.stderr,
            )
        elif args.json:
            print(json.dumps(_description(checkpoint), indent=1))
        else:
            _print_table(checkpoint, full=args.full)
        sys.stdout.flush()
    except WeightsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # what a shell reports of a program ended by SIGINT
    except OSError as error:
        # Nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # a reader (`| head`) that has what it wanted
            print(f"weights: cannot write to stdout: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
