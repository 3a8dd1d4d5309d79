"""`python -m validation COMMAND`: is a Whisper encoder the same function as OpenAI's.

parity     compare a candidate with the stock encoder, tap by tap, down to the transcript
numbers    the encoder's output alone against stock, on a file, silence and noise
calibrate  the clean errors from which the limits of `parity` were set
faults     what each mistake of other ports costs, and whether parity sees and names it
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "parity": "validation.command",
    "numbers": "validation.numbers",
    "calibrate": "validation.calibrate",
    "faults": "validation.bench",
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
