"""The report in the terminal, as Markdown and as JSON."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sample_report import FAULT, one_tap, sample_report, several_files, with_nan

from validation import report as reports

AWKWARD = "[red]x[/red] \x1b[31m\x07 é\n.flac"


def printed(report: dict, width: int = 110, encoding: str = "utf-8", colour: bool = False) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    system = "standard" if colour else None
    console = Console(file=out, width=width, force_terminal=colour, color_system=system)
    reports.terminal(report, console)
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def tap_lines(text: str, report: dict) -> list[str]:
    names = {tap["name"] for tap in report["taps"]}
    table = text.split("\nRelative L2")[0]
    return [line for line in table.splitlines() if line.split()[0] in names]


@pytest.mark.parametrize(
    ("x", "said"),
    [(2.4e-6, "2.4e-6"), (0.0, "0"), (None, "NaN"), (0.031, "3.1e-2"), (9.96e-7, "1.0e-6")],
)
def test_figures_have_two_digits(x: float | None, said: str):
    assert reports.figure(x) == said


@pytest.mark.parametrize(
    ("x", "said"), [(1.94, "1.9"), (2583.2, "2,583"), (4.1e7, "4.1e7"), (None, "inf")]
)
def test_ratios(x: float | None, said: str):
    assert reports.times(x) == said


# The verdict in one sentence


def test_the_verdict_of_a_pass():
    report = sample_report()
    report["final"]["free"]["relative_l2"] = 2.4e-6
    report["final"]["floor"]["relative_l2"] = 2.4e-6 / 1.9
    assert reports.sentence(report) == (
        "pass: the same function as OpenAI's to 2.4e-6 at ln_post "
        "(1.9 times PyTorch's own float32 noise)"
    )


def test_the_verdict_of_a_fail_names_the_tap_and_the_cause():
    report = sample_report("fail")
    tap = next(t for t in report["taps"] if t["name"] == FAULT)
    tap["limit"] = 1.2e-5
    said = f"fail: first differs at {FAULT} (3.1e-2, limit 1.2e-5): "
    assert reports.sentence(report) == f"{said}explained to 1e-6 by `{FAULT}.bias` missing"
    report["cause"] = None
    assert reports.sentence(report) == f"{said}no cause in the table of fingerprints explains it"


def test_the_verdict_where_only_the_stage_alone_is_past_its_limit():
    report = sample_report("fail")
    tap = next(t for t in report["taps"] if t["name"] == FAULT)
    tap["limit"], tap["injected_limit"] = 1.0, 4e-6
    assert f"{FAULT} (injected 3.1e-2, limit 4.0e-6)" in reports.sentence(report)


def test_the_verdict_where_values_are_not_finite():
    report = reports.clean(with_nan(sample_report("fail")))
    assert f"{FAULT} (384 values are not finite, limit" in reports.sentence(report)


def test_the_verdict_where_only_the_transcript_differs():
    report = sample_report()
    report["verdict"] = "fail"
    assert reports.sentence(report) == (
        "fail: every tap is within its limits, but the transcript is not the same"
    )


def test_the_verdict_without_a_final_tap_and_of_equal_values():
    report = sample_report()
    report["taps"], report["final"] = report["taps"][:1], None
    assert reports.sentence(report) == "pass: the same values as OpenAI's at mel"


def test_the_transcript_in_one_sentence():
    report = sample_report("fail")
    assert reports.semantic_sentence(report) == (
        "transcript: other tokens from 1.2 s on, WER 4.5 %, same first choice 96.3 %, "
        "KL mean 2.1e-3, p99 4.4e-2, max 3.1e-1 nats"
    )
    report["semantic"]["candidate_failed"] = "window 0: 3 values are NaN"
    assert "the candidate has none: window 0" in str(reports.semantic_sentence(report))
    report["semantic"] = None
    assert reports.semantic_sentence(report) is None


def test_the_transcripts_of_several_files():
    report = several_files(sample_report("fail"))
    assert "other tokens, WER 4.5 %" in str(reports.semantic_sentence(report))
    said = dict(reports.texts(report["semantic"]))
    assert list(said)[:3] == [
        "reference, jfk.flac",
        "candidate, jfk.flac",
        "reference, silence.wav",
    ]
    assert "yellow" in said["candidate, jfk.flac"]
    assert "yellow" not in said["reference, jfk.flac"]
    report["semantic"]["files"][1]["candidate_failed"] = "3 values are NaN"
    report["semantic"]["files"][1]["text"]["candidate"] = None
    assert reports.semantic_sentence(report) == (
        "transcript: the candidate has none: 3 values are NaN"
    )
    assert "| candidate, silence.wav | (no text) |" in reports.markdown(report)


def test_the_tolerance_that_passes_is_rounded_up():
    report = sample_report()
    report["final"]["minimum_tolerance"] = 2.41e-6
    report["final"]["suggested_tolerance"] = {"rtol": 1e-5, "atol": 8.6e-5}
    assert reports.tolerance_sentence(report) == (
        "ln_post passes from relative L2 2.5e-6; "
        "suggested for element-wise tests: rtol 1.0e-5, atol 8.6e-5"
    )


# Terminal


@pytest.mark.parametrize("verdict", ["pass", "fail"])
@pytest.mark.parametrize("width", [110, 80])
def test_one_line_per_tap_and_the_verdict_last(verdict: str, width: int):
    report = sample_report(verdict)
    text = printed(report, width)
    lines = tap_lines(text, report)
    assert [line.split()[0] for line in lines] == [tap["name"] for tap in report["taps"]]
    assert all(line.split()[1] == reports.figure(tap["free"]["relative_l2"])
               for line, tap in zip(lines, report["taps"], strict=True))  # fmt: skip
    assert max(map(len, lines)) <= width
    verdicts = [line for line in text.splitlines() if line.startswith(("pass:", "fail:"))]
    assert verdicts == [text.splitlines()[-1]] == [reports.sentence(report)]


def test_a_wide_terminal_shows_all_columns_and_a_narrow_one_says_what_is_left_out():
    head = "tap free injected floor x floor limit max abs SQNR dB edge verdict"
    assert " ".join(printed(sample_report(), 110).splitlines()[0].split()) == head
    narrow = printed(sample_report(), 80)
    assert " ".join(narrow.splitlines()[0].split()) == head.replace("max abs SQNR dB edge ", "")
    assert "no room for edge, SQNR dB, max abs\n" in narrow


@pytest.mark.parametrize(("verdict", "colour"), [("pass", "33"), ("fail", "31")])
def test_the_worst_line_alone_is_coloured(verdict: str, colour: str):
    report = sample_report(verdict)
    worst = reports.worst(report)
    assert worst is not None
    if verdict == "fail":
        assert worst["name"] == FAULT
    lines = printed(report, colour=True).splitlines()
    bold = [line for line in lines if line.startswith(f"\x1b[1;{colour}m")]
    assert [re.sub(r"\x1b\[[\d;]*m", "", line).split()[0] for line in bold[:1]] == [worst["name"]]
    assert len(bold) == (2 if verdict == "fail" else 1)  # the verdict of a fail is red as well


def test_a_line_for_each_of_several_files():
    report = several_files(sample_report())
    report["files"][2]["file"] = AWKWARD
    lines = printed(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("file "))
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["jfk.flac", "silence.wav"]
    assert lines[start + 3].startswith(r"[red]x[/red] \x1b[31m\x07 é\n.flac")
    assert "file " not in printed(sample_report())


def test_a_terminal_that_knows_only_ascii():
    report = several_files(sample_report())
    report["files"][2]["file"] = AWKWARD
    assert r"\xe9\n.flac" in printed(report, encoding="ascii")


def test_what_is_not_finite_or_not_there():
    report = one_tap(with_nan(sample_report("fail")))
    row = reports.tap_row(reports.clean(report)["taps"][0], "own")
    assert (row["free"], row["own"], row["x floor"], row["max abs"], row["SQNR dB"]) == (
        "NaN", "-", "NaN", "NaN", "NaN",
    )  # fmt: skip
    assert "ln_post" in printed(report)
    mel = reports.tap_row(reports.clean(sample_report())["taps"][0], "own")
    assert (mel["free"], mel["own"], mel["x floor"], mel["SQNR dB"]) == ("0", "-", "-", "inf")


# Markdown


def rows_of(text: str) -> list[list[str]]:
    """The tables' lines, cell by cell, as GitHub splits them."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("verdict", ["pass", "fail"])
def test_markdown_has_the_verdict_every_tap_and_the_provenance(verdict: str):
    report = sample_report(verdict)
    text = reports.markdown(report)
    assert text.startswith(f"# Parity: {verdict}\n\n{reports.sentence(report)}.\n")
    rows = {row[0]: row for row in rows_of(text)}
    for tap in report["taps"]:
        assert rows[tap["name"]][1] == reports.figure(tap["free"]["relative_l2"])
        assert len(rows[tap["name"]]) == len(rows["tap"]) == 10
    for key in ("audio", "mel", "weights"):
        assert rows[f"{key} (SHA-256)"][1] == report["inputs"][key]
    for value in (report["cpu"], "max 26.7.0", report["commit"]):
        assert value in text
    assert text.endswith(f"```\n{report['command']}\n```\n")
    if verdict == "fail":
        assert rows["tensors"][1].endswith(f"other values: {FAULT}.bias")
        assert report["inputs"]["candidate_weights"] in text


def test_markdown_escapes_what_is_not_ours():
    report = several_files(sample_report())
    report["command"] = "python -m validation parity 'a```b'"
    report["candidate"] = "npz:<img src=x>|*a*_b_"
    text = reports.markdown(report)
    assert "<b>" not in text
    assert "<img" not in text
    named = [row for row in rows_of(text) if row[0].startswith("&lt;b&gt;")]
    assert [len(row) for row in named] == [7]
    assert named[0][0] == r"&lt;b&gt;\|\*odd\*\|&lt;/b&gt; &amp; \`co\`.flac"
    assert text.endswith(f"````\n{report['command']}\n````\n")


@pytest.mark.parametrize("change", [one_tap, with_nan, several_files])
def test_reports_of_all_kinds_can_be_written(change):
    report = change(sample_report("fail"))
    report["semantic"] = None
    before = copy.deepcopy(report)
    assert not re.search(r"\bnan\b", reports.markdown(report))
    assert printed(report).splitlines()[-1].startswith("fail:")
    assert repr(report) == repr(before)  # repr: a NaN does not equal itself


# JSON


def strictly(text: str) -> dict:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=no_constant)


def test_json_is_strict_and_complete():
    report = with_nan(sample_report("fail"))
    found = strictly(reports.dumps(report))
    assert found == reports.clean(report)
    tap = next(t for t in found["taps"] if t["name"] == FAULT)
    assert tap["free"]["relative_l2"] is None
    assert found["taps"][0]["free"]["sqnr_db"] is None  # infinite: mel is equal
    assert found["plots"]["scatter"]["candidate"][0] is None
    assert strictly(reports.dumps(sample_report()))["taps"][1] == sample_report()["taps"][1]


def test_json_keeps_every_string_as_it_is():
    report = {"a": "[\n 1,\n  2\n]", "b": ["x \n [ ]", "é\udcff"], "c": [1, [2.5, None]], "d": ()}
    assert strictly(reports.dumps(report)) == {**report, "b": ["x \n [ ]", r"é\udcff"], "d": []}
    assert reports.dumps({"rows": [1, 2, 3]}) == '{\n "rows": [1, 2, 3]\n}\n'


def test_json_refuses_what_is_no_json_value():
    with pytest.raises(TypeError):
        reports.dumps({"x": np.float32(1)})


# Files


def test_write_replaces_the_whole_file(tmp_path: Path):
    path = tmp_path / "report.json"
    path.write_text("old, and longer than the new one")
    reports.write(path, "é")
    assert path.read_bytes() == "é".encode()
    assert os.listdir(tmp_path) == ["report.json"]
    umask = os.umask(0o022)
    os.umask(umask)
    reports.write(tmp_path / "new", "x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        reports.write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("where", ["missing/report.json", "."])
def test_write_raises_what_the_system_says(tmp_path: Path, where: str):
    with pytest.raises(OSError, match=r"No such file|Is a directory"):
        reports.write(tmp_path / where, "x")
    assert os.listdir(tmp_path) == []


def test_write_goes_through_a_link(tmp_path: Path):
    """As /dev/stdout is one: to rename upon it would replace the link itself."""
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    reports.write(link, "x")
    assert link.is_symlink()
    assert target.read_text() == "x"
