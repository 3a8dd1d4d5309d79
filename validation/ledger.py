"""The rows of the fault bench in a file, which a killed run goes on with: `trials.jsonl`.

The first line says what was measured on what; each further line is a row, one fault on one
recording. The rows of a fault are written in one piece, and those of a fault that lacks some count
as not there. What does not fit its first line is refused, never mixed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from validation.report import write

Row = dict[str, Any]


class LedgerError(Exception):
    """The file cannot be gone on with; the message is one sentence."""


def line(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n"


class Ledger:
    """`rows`, those of each fault by its key; a file is made, or read and gone on with.

    header  what was measured on what; "recordings" is a list of objects with a "name"
    Raises LedgerError where the file has another header, unless `restart`, which drops all of it,
    where it is damaged, and where it cannot be written to.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], restart: bool = False):
        self.path, self.header = path, dict(header)
        self.rows: dict[str, list[Row]] = {}
        if path.exists() and not restart:
            self._read()
        text = "".join(line(row) for own in self.rows.values() for row in own)
        try:
            write(path, line(self.header) + text)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> LedgerError:
        return LedgerError(f"{self.path} cannot be written: {error.strerror}")

    def _read(self) -> None:
        """What is whole; a last line that was cut off is left out, and a fault of which a row is
        missing."""
        values = []
        text = self.path.read_bytes().decode("utf-8", errors="replace")
        for number, one in enumerate(text.split("\n")[:-1], 1):
            try:
                values.append(json.loads(one))
            except json.JSONDecodeError as error:
                raise LedgerError(
                    f"{self.path} is damaged in line {number}: --restart begins anew"
                ) from error
        if not values:
            return
        self._require(values[0])
        for number, row in enumerate(values[1:], 2):
            if not isinstance(row, dict) or not {"fault", "recording"} <= row.keys():
                raise LedgerError(f"{self.path}: line {number} is no row: --restart begins anew")
            self.rows.setdefault(row["fault"], []).append(row)
        names = {recording["name"] for recording in self.header["recordings"]}
        self.rows = {
            fault: own for fault, own in self.rows.items() if {r["recording"] for r in own} == names
        }

    def _require(self, found: Any) -> None:
        known = found if isinstance(found, dict) else {}
        other = [key for key, value in self.header.items() if known.get(key) != value]
        if other:
            raise LedgerError(
                f"{self.path} was measured with other {', '.join(other)}: --restart begins anew, "
                "--out takes another folder"
            )

    def add(self, rows: Sequence[Row]) -> None:
        """All rows of one fault, in one piece; they are on the disk when this returns."""
        text = "".join(map(line, rows)).encode()
        try:
            while text:
                text = text[self._file.write(text) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(error) from error
        self.rows[rows[0]["fault"]] = list(rows)

    def close(self) -> None:
        self._file.close()
