"""`python -m validation COMMAND`: is a part of Whisper the same function as OpenAI's.

parity     compare an encoder or a decoder with stock's, tap by tap, down to the transcript
numbers    the encoder's output alone against stock, on a file, silence and noise
calibrate  the clean errors from which the limits of `parity` were set
faults     what each mistake of other ports costs, and whether parity sees and names it
benchmark  all variants and other engines on the same weights, timed in one interleaved run
kernels    where the encoder's time goes, kernel by kernel, MAX beside PyTorch
demo       the variants on one recording, one after another, in the terminal
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "parity": "validation.command",
    "numbers": "validation.numbers",
    "calibrate": "validation.calibrate",
    "faults": "validation.bench",
    "benchmark": "validation.benchmark",
    "kernels": "validation.kernels",
    "demo": "validation.demo",
}


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        print(
            f"validation: {name!r} is no command, expected one of {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    return int(importlib.import_module(COMMANDS[name]).main(rest))


if __name__ == "__main__":
    raise SystemExit(main())
