"""The findings of the fault bench, on invented rows whose answers are known by hand."""

from __future__ import annotations

import io
import json
import math
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from validation import findings as bench
from validation.findings_metrics import Point, correlation
from validation.findings_page import linked
from validation.findings_plot import names_of, svg_scatter
from validation.findings_statistics import RESAMPLES, auc, samples, spearman, votes
from validation.findings_terminal import fault_row
from validation.findings_words import cause_said, percent, tap_said

SVG = "{http://www.w3.org/2000/svg}"
ABOUT = {
    "model": "demo",
    "recordings": [{"name": "a", "seconds": 20.0, "words": 50}],
    "command": "python -m validation faults",
    "seed": 3,
    "seconds": 12.5,
}


def wer(errors: int, words: int = 100, deleted: int = 0) -> dict[str, Any]:
    """`errors` of which `deleted` are deletions, the others substitutions."""
    kinds = {"substitutions": errors - deleted, "deletions": deleted, "insertions": 0}
    return {"wer": errors / words if words else None, **kinds, "words": words}


def at_end(relative: float) -> dict[str, float | None]:
    """What is measured at ln_post of a reference of size one, its largest value 10."""
    decibels = -20 * math.log10(relative) if relative else None
    return {
        "relative_l2": relative,
        "sqnr_db": decibels,
        "psnr_db": None if decibels is None else decibels + 20,
        "cosine": 1 - relative**2 / 2,
        "max_abs": 8 * relative,
    }


def row(
    fault: str = "E01", recording: str = "a", relative: float | None = 0.1, **given: Any
) -> dict[str, Any]:
    """A detected fault in the weights, rightly placed and named, with the same tokens."""
    name, _, strength = fault.partition("@")
    return {
        "fault": fault,
        "id": name,
        "strength": strength or None,
        "group": "weights",
        "how": "weights",
        "sentence": "Something is wrong.",
        "recording": recording,
        "injected": True,
        "cut_off": False,
        "reference_cut_off": False,
        "tokens": 9,
        "reference_tokens": 9,
        "unseen": False,
        "yardstick": False,
        "detected": True,
        "first_tap": "conv1",
        "expected_first_tap": "conv1",
        "cause": "weight-rounded",
        "expected_cause": "weight-rounded",
        "explained": "conv1: rounded",
        "at_tap": {"relative_l2": 0.01, "sqnr_db": 40.0, "cosine": 1.0},
        "final": None if relative is None else at_end(relative),
        "failed": None,
        "kl_mean": 0.02,
        "kl_max": 0.5,
        "same_top1": 1.0,
        "tokens_identical": True,
        "first_difference": None,
        "first_difference_tokens": None,
        "wer": wer(0),
        "wer_truth": wer(4),
        "wer_truth_reference": 0.02,
        "lost": 0.0,
        "invented": 0.0,
        "text": "the text",
        "reference_text": "the text",
        "max": None,
        "seconds": 1.2,
        **given,
    }


def other_text(errors: int, words: int = 100) -> dict[str, Any]:
    return {"tokens_identical": False, "first_difference": 7, "wer": wer(errors, words)}


def bridge(fault: str = "S30", errors: int = 60) -> dict[str, Any]:
    nothing = ("first_tap", "expected_first_tap", "cause", "expected_cause", "explained", "at_tap")
    nothing += ("kl_mean", "kl_max", "same_top1")
    given = {"group": "bridge", "how": "bridge", "detected": False, **dict.fromkeys(nothing)}
    return row(fault, relative=None, **{**given, **other_text(errors)})


def failed(fault: str = "S05", recording: str = "a") -> dict[str, Any]:
    given = {"failed": "ln_post has 384 values that are not finite", "kl_mean": None}
    given |= {"kl_max": None, "same_top1": None}
    return row(fault, recording, None, **given, **other_text(100))


QUIET = {"detected": False, "first_tap": None, "cause": None, "at_tap": None}


def nothing(fault: str = "E01", recording: str = "a", **given: Any) -> dict[str, Any]:
    """A recording on which the fault changes nothing."""
    return row(fault, recording, 0.0, **{"injected": False, "kl_mean": 0.0, **QUIET, **given})


def noise(size: float, recording: str = "a", **given: Any) -> dict[str, Any]:
    """A yardstick, of a strength that is its relative L2."""
    given = {"strength": size, "yardstick": True, "cause": None, "expected_cause": None, **given}
    return row(f"E-e@{size:g}", recording, size, **given)


def on_max(difference: float | None, same: bool = True, **given: Any) -> dict[str, Any]:
    ran = {"detected": True, "first_tap": "conv1" if same else "conv2", "cause": None}
    ran |= {"final_relative_l2": 0.1, "twin_relative_l2": 0.1}
    return {"max": {**ran, "relative_difference": difference, "same_first_tap": same, **given}}


def found(rows: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    return bench.findings(rows, {**ABOUT, **about})


def only(rows: list[dict[str, Any]]) -> dict[str, Any]:
    (fault,) = found(rows)["faults"]
    return fault


def many(faults: int = 12, recordings: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Faults of growing error and growing WER, with some disorder, in all groups."""
    rng = random.Random(seed)
    rows = []
    for i in range(faults):
        group = ("input", "stem", "blocks", "weights")[i % 4]
        for recording in "abcdefgh"[:recordings]:
            relative = 10 ** (-5 + 5 * i / faults + rng.uniform(-0.4, 0.4))
            errors = max(0, round(100 * (i / faults) ** 2 + rng.uniform(-10, 10)))
            text = other_text(errors) if errors else {}
            how = "input" if group == "input" else "weights"
            given = {"kl_mean": relative**2, "group": group, "how": how, **text}
            rows.append(row(f"E{i:02d}", recording, relative, **given))
    return rows


# One fault over its recordings


def test_a_fault_is_summed_up():
    rows = [
        row(relative=0.1, **other_text(10, 50), lost=1.0, invented=0.5, kl_mean=0.1),
        row(recording="b", relative=0.3, first_tap="conv2", cause=None, kl_mean=0.3),
        row(recording="c", relative=0.2, detected=False, first_tap=None, cause=None, kl_mean=0.2),
    ]
    fault = only(rows)
    assert (fault["n"], fault["detected"]) == (3, 2 / 3)
    assert (fault["first_tap_right"], fault["cause_right"]) == (0.5, 0.5)
    assert (fault["cause_unknown"], fault["cause_wrong"]) == (0.5, 0)
    assert (fault["first_tap"], fault["cause"]) == ("conv1", "weight-rounded")
    assert fault["relative_l2"] == {"median": 0.2, "max": 0.3}
    assert fault["sqnr_db"]["min"] == pytest.approx(10.458, abs=1e-3)
    assert (fault["kl_mean"], fault["first_difference"]) == (0.2, 7)
    assert (fault["lost"], fault["invented"]) == (1.0, 0.5)
    assert fault["tokens_identical"] == 2 / 3
    assert fault["max"] is None


def test_wer_is_pooled_over_words_and_not_averaged():
    rows = [row(**other_text(10, 20)), row(recording="b", wer=wer(0, 180))]
    fault = only(rows)
    assert fault["wer"] == {**wer(10, 200), "wer": 0.05}
    assert fault["wer_truth"] == {**wer(8, 200), "reference": pytest.approx(0.02)}


def test_the_unfaulted_transcript_is_pooled_over_words_too():
    rows = [
        row(wer_truth=wer(1, 10), wer_truth_reference=0.1),
        row(recording="b", wer_truth=wer(0, 90), wer_truth_reference=0.0),
    ]
    assert only(rows)["wer_truth"]["reference"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "benign"),
        (other_text(0), "wording"),
        (other_text(5), "wording"),
        (other_text(3, 60), "wording"),
        (other_text(51, 1000), "damaging"),
        (other_text(30), "damaging"),
        (other_text(301, 1000), "ruinous"),
        ({"failed": "the features are (1, 750, 384)"}, "ruinous"),
        ({"tokens_identical": None, "wer": None}, None),
        ({"tokens_identical": None, "wer": None, "failed": "not finite"}, "ruinous"),
        ({"tokens_identical": False, "wer": wer(0, 0)}, None),
    ],
)
def test_classes_at_their_borders(given: dict[str, Any], expected: str | None):
    assert only([row(**given)])["class"] == expected


def test_benign_is_the_same_on_all_recordings():
    assert only([row(), row(recording="b", **other_text(0))])["class"] == "wording"


def test_an_exact_result_has_no_ratio_and_is_the_best():
    fault = only([row(relative=0.0), row(recording="b", relative=0.0)])
    assert fault["relative_l2"]["median"] == 0
    assert fault["sqnr_db"] == {"median": None, "min": None}
    assert "inf" in bench.tables(found([row(relative=0.0)]))["faults"]


def test_what_is_not_finite_is_none_before_and_after_it_was_written():
    nan = row(final=dict.fromkeys(at_end(1.0), math.nan), **other_text(10))
    exact = row("E02", final={**at_end(0.0), "sqnr_db": math.inf, "psnr_db": math.inf})
    of = found([nan, exact])
    assert of == found(of["rows"])
    assert figure(of, "detected", "encoder")["ids"] == 1
    counts = gate_of([nan, exact], "SQNR >= 40 dB", on="worst")["counts"]
    assert (counts["benign"]["passes"], counts["damaging"]["passes"]) == (1, 0)


@pytest.mark.parametrize(
    ("how", "expected", "share"),
    [
        ("weights", "weight-rounded", (0, 1)),
        ("code", "gelu-tanh", (1, 0)),
        ("weights", None, (1, 0)),
    ],
)
def test_unknown_weights_is_no_name_of_wrong_weights(how, expected, share):
    fault = only([row(how=how, expected_cause=expected, cause="unknown-weights")])
    assert (fault["cause_wrong"], fault["cause_unknown"]) == share
    assert fault["cause_right"] == 0


def test_a_wrong_name_is_wrong_where_none_is_right():
    fault = only([row(expected_cause=None), row(recording="b", expected_cause=None, cause=None)])
    assert (fault["cause_right"], fault["cause_wrong"], fault["cause_unknown"]) == (0.5, 0.5, 0)


def test_the_most_frequent_name_is_named():
    causes = ("b-cause", "a-cause", "b-cause", None)
    fault = only([row(recording=str(i), cause=cause) for i, cause in enumerate(causes)])
    assert fault["cause"] == "b-cause"


def test_a_recording_on_which_nothing_changes_is_no_trial():
    acting = [row("S07", relative=0.3, **other_text(20)), row("S07", "b", relative=0.1)]
    clean = [nothing("S07", name, **on_max(None, detected=False)) for name in "cdef"]
    left, right = only([*acting, *clean]), only(acting)
    assert (left.pop("n"), right.pop("n")) == (6, 2)
    assert left == right
    assert (left["injected"], left["class"], left["max"]) == (2, "damaging", None)
    both, one = found([*acting, *clean, *many()]), found([*acting, *many()])
    for part in ("correlations", "gates", "thresholds", "sweeps", "misses"):
        assert both[part] == one[part]
    differ = [name for name in one["targets"] if one["targets"][name] != both["targets"][name]]
    assert differ == ["false_alarms"]


def test_a_fault_that_changes_nothing_anywhere_has_no_class():
    of = found([nothing("E11@tf32"), nothing("E11@tf32", "b"), row("E11@int8")])
    fault = of["faults"][1]
    assert (fault["n"], fault["injected"], fault["class"], fault["detected"]) == (2, 0, None, None)
    assert fault_row(fault)["first tap"] == "no change here"
    assert "no change here" in printed(of)
    assert "on which nothing changes: E11@tf32 (2 of 2)" in printed(of)
    assert [point["fault"] for point in of["sweeps"][0]["points"]] == ["E11@int8"]
    for gate in of["gates"]:
        assert gate["all"]["median"]["counts"]["benign"]["n"] == 1


def test_decoding_without_end_is_said():
    rows = [bridge(), bridge() | {"recording": "b", "cut_off": True}]
    assert only(rows)["cut_off"] == 1
    assert "Decoding went on without end, and was stopped: S30 (1 of 2)" in printed(found(rows))
    assert "went on" not in printed(found(rows[:1]))


def test_two_rows_for_one_recording_are_refused():
    with pytest.raises(ValueError, match="E01 has two rows for the recording a"):
        found([row(), row("E02"), row()])


def test_the_order_of_the_rows_changes_nothing():
    rows = [*many(), bridge(), failed()]
    once = found(rows)
    random.Random(1).shuffle(rows)
    again = found(rows)
    assert {**once, "rows": 0} == {**again, "rows": 0}


# Targets


def figure(of: dict[str, Any], name: str, over: str) -> dict[str, Any]:
    (one,) = [one for one in of["targets"][name]["figures"] if one["over"] == over]
    return one


def target(rows: list[dict[str, Any]], name: str, over: str) -> tuple[float | None, bool | None]:
    one = figure(found(rows), name, over)
    return one["value"], one["met"]


def test_what_changes_must_be_detected():
    rows = [row(), row(recording="b", relative=2e-4, **QUIET), row("E02", relative=1e-4, **QUIET)]
    assert target(rows, "detected", "encoder") == (0.5, False)
    assert target([*rows[:1], rows[2]], "detected", "encoder") == (1.0, True)
    assert target([*rows, failed(), bridge()], "detected", "encoder") == (0.75, False)
    (miss,) = found(rows)["misses"]
    assert (miss["kind"], miss["fault"], miss["recording"]) == ("not detected", "E01", "b")


def test_a_vote_for_each_id_however_many_strengths_it_has():
    """Four strengths of one id, all right, and a fault that is missed on one of two recordings: of
    the rows 5 of 6 are right, of two votes one and a half."""
    rows = [row(f"E11@int{i}") for i in range(4)]
    rows += [row("E02"), row("E02", "b", first_tap="conv2")]
    of = found(rows)
    assert figure(of, "first_tap", "encoder")["value"] == 0.75
    assert figure(of, "first_tap", "rows")["value"] == 5 / 6
    assert [figure(of, "first_tap", "encoder")[k] for k in ("ids", "unseen", "rows")] == [2, 0, 6]
    assert bench.missed(of, whole=False) == ["first_tap"]


def test_yardsticks_and_the_input_stand_apart():
    rows = [row("E01", first_tap="conv2"), row("S03", group="input", how="input")]
    rows += [noise(10.0**-i) for i in range(4)]
    of = found(rows)
    values = {f["over"]: f["value"] for f in of["targets"]["first_tap"]["figures"]}
    assert values == {"encoder": 0.0, "input": 1.0, "yardsticks": 1.0, "rows": 5 / 6}
    assert of["targets"]["first_tap"]["value"] == 0.0
    unseen_one = found([*rows, row("E02", unseen=True)])
    assert figure(unseen_one, "first_tap", "encoder")["unseen"] == 1


def test_the_input_is_judged_too():
    rows = [row(), row("S03", group="input", how="input", first_tap="conv1.gelu")]
    of = found(rows)["targets"]["first_tap"]
    assert [f["met"] for f in of["figures"]] == [True, False, None, None]
    assert (of["value"], of["met"]) == (1.0, False)


def test_the_first_tap_at_its_border():
    rows = [row(f"E{i}") for i in range(20)]
    rows[0]["first_tap"] = "conv2"
    assert target(rows, "first_tap", "encoder") == (0.95, True)
    rows[1]["first_tap"] = "conv2"
    assert target(rows, "first_tap", "encoder") == (0.9, False)
    named = [(m["kind"], m["expected"], m["named"]) for m in found(rows)["misses"]]
    assert named == [("first tap", "conv1", "conv2")] * 2


def test_unknown_causes_and_wrong_ones_are_counted_apart():
    rows = [row(f"E0{i}") for i in range(8)]
    rows[0]["cause"], rows[1]["cause"] = None, "bias-missing"
    rows += [row("E10", expected_cause=None, cause=c, recording=str(c)) for c in (None, "x")]
    assert target(rows, "cause_right", "mistakes") == (6 / 8, False)
    assert target(rows, "cause_unknown", "mistakes") == (1 / 8, None)
    assert target(rows, "cause_wrong", "mistakes") == (1.5 / 9, False)
    assert target(rows, "cause_wrong", "rows") == (2 / 10, None)
    assert [m["kind"] for m in found(rows)["misses"]] == ["cause unknown"] + ["cause wrong"] * 2


def test_causes_of_unseen_faults_come_first_and_are_not_judged():
    """The known strength of E24 is named, its unseen one is not: half a vote of all, none of the
    unseen; an unseen yardstick is no mistake."""
    rows = [row("E24@a"), row("E24@b", cause=None, unseen=True), row("E01")]
    rows += [row("E02", cause="x", unseen=True), row("E03", unseen=True, yardstick=True)]
    of = found(rows)
    first = {name: of["targets"][name]["figures"][0] for name in of["targets"]}
    right, unknown, wrong = (first[f"cause_{kind}"] for kind in ("right", "unknown", "wrong"))
    assert {one["over"] for one in (right, unknown, wrong)} == {"unseen"}
    assert (right["value"], unknown["value"], wrong["value"]) == (0.0, 0.5, 0.5)
    assert (right["ids"], right["unseen"], right["rows"], right["met"]) == (2, 2, 2, None)
    assert figure(of, "cause_right", "mistakes")["value"] == 0.5
    assert of["targets"]["cause_right"]["value"] == 0.5


def test_few_wrong_names_are_allowed():
    rows = [row(f"E{i}") for i in range(50)]
    rows[0]["cause"] = "bias-missing"
    assert target(rows, "cause_wrong", "mistakes") == (0.02, True)
    rows[1] |= {"recording": "b", "cause": "x"}
    assert target(rows, "cause_wrong", "mistakes") == (0.04, False)


def test_a_yardstick_must_not_be_given_a_cause():
    rows = [row(), noise(0.1), noise(0.2, cause="weight-rounded")]
    assert target(rows, "cause_wrong", "mistakes") == (0.0, True)
    assert target(rows, "cause_wrong", "yardsticks") == (0.5, False)
    assert bench.missed(found(rows), whole=False) == ["cause_wrong"]
    assert target(rows[:2], "cause_wrong", "yardsticks") == (0.0, True)


@pytest.mark.parametrize("given", [{"detected": True}, on_max(0.0, detected=True)])
def test_an_alarm_where_nothing_changes_is_false(given: dict[str, Any]):
    quiet = nothing(recording="b", **on_max(0.0, detected=False))
    assert target([row(), quiet], "false_alarms", "rows") == (0.0, True)
    of = found([row(), quiet, nothing(recording="c", **given)])
    assert figure(of, "false_alarms", "rows")["value"] == 0.5
    assert "false_alarms" in bench.missed(of, whole=False)
    assert [m["kind"] for m in of["misses"]] == ["false alarm"]


def test_max_must_agree():
    rows = [
        row(**on_max(0.01)),
        row(recording="b", **on_max(0.011)),
        row(recording="c", **on_max(0.001, same=False)),
        row("E02", relative=1e-5, **on_max(0.9)),
    ]
    assert target(rows, "max_agreement", "all") == (1 / 3, False)
    assert target(rows, "max_agreement_all", "all") == (1 / 6, None)
    assert target(rows, "max_agreement_all", "rows") == (1 / 4, None)
    assert target(rows, "faults_on_max", "mistakes") == (2, False)
    first, second = found(rows)["faults"]
    assert first["max"]["relative_difference"] == 0.011
    assert (first["max"]["same_first_tap"], first["max"]["agrees"]) == (2 / 3, 1 / 3)
    assert second["max"]["n"] == 1
    kinds = [m["kind"] for m in found(rows)["misses"]]
    assert kinds == ["MAX", "MAX", "MAX, within 0.0001"]
    assert target([noise(0.1, **on_max(0.1))], "max_agreement", "all") == (0.0, False)


@pytest.mark.parametrize(
    ("ours", "twin", "agreed"), [(None, None, 1), (0.3, None, 0), (2e-6, 0.0, 1), (0.3, 0.0, 0)]
)
def test_max_agrees_where_there_is_no_ratio(ours: float | None, twin: float | None, agreed: int):
    ran = on_max(None, final_relative_l2=ours, twin_relative_l2=twin)
    assert target([row(**ran)], "max_agreement_all", "all")[0] == agreed


def test_distinct_faults_are_mistakes():
    rows = [*many(49), bridge(), noise(0.1), noise(0.2), nothing("E99")]
    assert target(rows, "distinct_faults", "mistakes") == (50, True)
    assert target(rows, "distinct_faults", "yardsticks") == (1, None)
    assert target(rows[:-4], "distinct_faults", "mistakes") == (49, False)


def test_a_run_of_some_faults_is_not_held_to_the_whole_catalogue():
    of_some = found([row()])
    assert bench.missed(of_some) == ["faults_on_max", "distinct_faults"]
    assert bench.missed(of_some, whole=False) == []
    assert "first_tap" in bench.missed(found([row(first_tap="conv2")]), whole=False)


# Sweeps


def swept(strengths: Iterable[tuple[float, float, bool]]) -> dict[str, Any]:
    rows = []
    for strength, relative, changed in strengths:
        text = other_text(5) if changed else {}
        rows.append(row(f"S@{strength:g}", relative=relative, **text) | {"strength": strength})
    (sweep,) = found(rows)["sweeps"]
    return sweep


def test_strengths_on_both_sides_are_swept_away_from_the_right_value():
    """Factors: 1.01 and 0.99 are nearest to the right one."""
    factors = ((0.5, 0.5, True), (0.9, 0.1, False), (0.99, 0.01, False), (1.01, 0.01, False))
    sweep = swept([*factors, (1.1, 0.1, False), (2.0, 1.0, True)])
    assert [point["strength"] for point in sweep["points"]] == [0.99, 1.01, 0.9, 1.1, 0.5, 2.0]
    assert (sweep["same_tokens_up_to"], sweep["other_tokens_from"]) == (1.1, 0.5)
    assert sweep["monotone"]
    assert sweep["points"][4]["wer"] == 0.05


def test_a_sweep_that_is_not_monotone_says_so():
    sweep = swept([(0.01, 0.01, False), (0.1, 0.1, True), (2, 2, False), (0.5, 0.5, True)])
    assert (sweep["same_tokens_up_to"], sweep["other_tokens_from"]) == (0.01, 0.1)
    assert (sweep["monotone"], sweep["same_again"]) == (False, [2])
    rows = [noise(0.1, **other_text(3)), noise(0.2)]
    said = "Some tokens differ from 0.1 on; not monotone: all are the same again at 0.2."
    assert said in bench.tables(found(rows))["sweeps"]


def test_words_are_swept_by_the_error_they_cause():
    rows = [
        row("E11@int8", relative=0.1, **other_text(9)),
        row("E11@bfloat16", relative=1e-2),
        row("E11@float16", relative=1e-3),
    ]
    (sweep,) = found(rows)["sweeps"]
    assert [point["strength"] for point in sweep["points"]] == ["float16", "bfloat16", "int8"]
    assert (sweep["same_tokens_up_to"], sweep["other_tokens_from"]) == ("bfloat16", "int8")


# Statistics


def plainly(x: Iterable[float], y: Iterable[float]) -> float:
    """Spearman's rho by its definition: Pearson's of mean ranks."""

    def mean_ranks(values: list[float]) -> list[float]:
        below = [sum(b < a for b in values) for a in values]
        alike = [sum(b == a for b in values) for a in values]
        return [b + (n + 1) / 2 for b, n in zip(below, alike, strict=True)]

    return float(np.corrcoef(mean_ranks(list(x)), mean_ranks(list(y)))[0, 1])


def test_spearman_by_hand():
    """Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8."""
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([20.0, 10, 40, 30, math.inf])
    assert spearman(x, y, np.ones(5)) == pytest.approx(0.8)


def test_a_weight_is_a_point_taken_so_often():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 5, 30).astype(float), rng.integers(0, 4, 30).astype(float)
    weights = rng.integers(0, 4, (6, 30)).astype(float)
    for one, rho in zip(weights, spearman(x, y, weights), strict=True):
        taken = np.repeat(np.arange(30), one.astype(int))
        assert rho == pytest.approx(plainly(x[taken], y[taken]), abs=1e-12)


def test_what_is_all_alike_correlates_with_nothing():
    assert np.isnan(spearman(np.array([1.0, 2, 3]), np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("n", [3, 7, 11])
def test_what_is_all_alike_but_for_rounding_is_all_alike(n: int):
    """Votes of a third and a tenth do not add up exactly."""
    weights = votes(["a"] * n + ["b"] * 10 + ["c"] * 3)
    x = np.arange(n + 13.0)
    assert np.isnan(spearman(x, np.zeros(n + 13), weights))
    assert spearman(x, x, weights) == pytest.approx(1)


def test_an_id_has_one_vote():
    assert votes(["a", "b", "a", "a"]) == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])


def test_auc_counts_pairs():
    """Above: 3 > 1, 3 > 2, 2 > 1; alike: 2 and 2. (3 + 0.5) / 4."""
    values, positive = np.array([1.0, 2, 2, 3]), np.array([False, False, True, True])
    assert auc(values, positive, np.ones(4)) == pytest.approx(3.5 / 4)
    twice = np.array([1.0, 1, 1, 2])  # 5 and a half of 6
    assert auc(values, positive, twice) == pytest.approx(5.5 / 6)


def test_the_bootstrap_draws_whole_ids():
    ids = ["a", "b", "a", "c", "b", "a"]
    weights = np.concatenate(list(samples(ids, 0)))
    assert weights.shape == (RESAMPLES, 6)
    assert (weights[:, [0, 0]] == weights[:, [2, 5]]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert weights[:, [0, 1, 3]].mean(0) == pytest.approx(1, abs=0.06)


def test_strengths_of_one_sweep_do_not_narrow_the_interval():
    """Nine points of the same id are one: all is as without them."""
    once = many(8, 1)
    copies = [
        {**one, "fault": f"{one['id']}@{i:g}", "strength": float(i)}
        for one in once
        for i in range(9)
    ]
    for scope in ("mistakes", "all"):
        plain = found(once)["correlations"][scope]["relative_l2"]
        swept = found(copies)["correlations"][scope]["relative_l2"]
        assert (plain["n"], swept["n"], plain["ids"], swept["ids"]) == (8, 72, 8, 8)
        for key in ("rho", "low", "high"):
            assert swept[key] == pytest.approx(plain[key], abs=1e-9)


def test_yardsticks_and_many_strengths_do_not_make_the_headline():
    """Among the mistakes error and WER run against each other; noise of 30 strengths, and one
    mistake of 30, run with each other."""
    rows = [row(f"E{i}", relative=10.0**-i, **other_text(10 * i + 1)) for i in range(6)]
    rows += [noise(1e-4 * i, **other_text(i)) for i in range(1, 31)]
    alone = found(rows)
    assert alone["correlations"]["mistakes"]["relative_l2"]["rho"] == pytest.approx(-1)
    assert alone["correlations"]["rows"]["relative_l2"]["rho"] == pytest.approx(-1)
    assert alone["correlations"]["all"]["relative_l2"]["rho"] > 0
    one = [{**r, "yardstick": False} for r in rows[6:]]
    voted = found([*rows[:6], *one])["correlations"]
    assert voted["mistakes"]["relative_l2"]["rho"] < 0 < voted["all"]["relative_l2"]["rho"]
    limits = alone["thresholds"]
    assert (limits["mistakes"]["relative_l2"]["n"], limits["all"]["relative_l2"]["n"]) == (6, 36)
    assert limits["mistakes"]["relative_l2"]["auc"] == 0


def test_correlations():
    rows = [*many(), bridge(), failed()]
    of = found(rows)["correlations"]
    over = of["mistakes"]["relative_l2"]
    faults = [f for f in found(rows)["faults"] if f["relative_l2"]["median"] is not None]
    assert over["n"] == over["ids"] == 12
    assert over["rho"] == pytest.approx(
        plainly([f["relative_l2"]["median"] for f in faults], [f["wer"]["wer"] for f in faults])
    )
    assert -1 <= over["low"] < over["rho"] < over["high"] <= 1
    assert over["stronger"] is None
    assert of["rows"]["relative_l2"]["n"] == 36
    assert of["rows"]["relative_l2"]["ids"] == 12
    assert of["encoder"]["relative_l2"]["ids"] == 9
    assert of["mistakes"]["sqnr_db"]["rho"] == pytest.approx(-over["rho"])
    assert of["mistakes"]["sqnr_db"]["stronger"]["value"] == pytest.approx(0)


def test_intervals_have_a_seed():
    rows = many()
    one = found(rows)["correlations"]
    assert one == found(rows)["correlations"]
    other = found(rows, seed=4)["correlations"]
    assert (one["seed"], other["seed"]) == (3, 4)
    ours, theirs = (of["mistakes"]["relative_l2"] for of in (one, other))
    assert ours["rho"] == theirs["rho"]
    assert (ours["low"], ours["high"]) != (theirs["low"], theirs["high"])


def test_an_interval_holds_the_true_value():
    """Points of a known rank correlation: of 20 such intervals of 95 % at most 4 miss it."""
    rng, hits, true = np.random.default_rng(0), 0, 6 / math.pi * math.asin(0.7 / 2)
    for _ in range(20):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 60).T
        points = [Point(f"E{i}", float(y[i]), {"relative_l2": float(x[i])}) for i in range(60)]
        of = correlation("relative_l2", points, 0)
        hits += of["low"] <= true <= of["high"]
    assert hits >= 16


# Gates


def gate_of(
    rows: list[dict[str, Any]], name: str, scope: str = "mistakes", on: str = "median"
) -> dict[str, Any]:
    (gate,) = [gate for gate in found(rows)["gates"] if gate["name"] == name]
    return gate[scope][on]


def test_gates_let_faults_through_and_stop_them():
    rows = [
        row("E01", relative=1e-3, **other_text(50)),
        row("E02", relative=1e-2, **other_text(20)),
        row("E03", relative=2e-2),
        row("E04", relative=1e-5),
        row("E05", relative=1e-3, **other_text(1)),
        failed("E06"),
        bridge("S30"),
    ]
    gate = gate_of(rows, "relative L2 <= 1e-2")
    assert gate["lets_through"] == {"ruinous": ["E01"], "damaging": ["E02"]}
    assert gate["stops"] == ["E03"]
    assert gate["counts"] == {
        "benign": {"n": 2, "passes": 1, "stopped": 1},
        "wording": {"n": 1, "passes": 1, "stopped": 0},
        "damaging": {"n": 1, "passes": 1, "stopped": 0},
        "ruinous": {"n": 2, "passes": 1, "stopped": 1},
    }
    decibels = gate_of(rows, "SQNR >= 40 dB")
    assert decibels["lets_through"] == gate["lets_through"]
    assert gate_of(rows, "PSNR >= 35 dB")["stops"] == []
    assert gate_of(rows, "atol 1e-2")["lets_through"]["ruinous"] == ["E01"]
    assert gate_of(rows, "atol 1e-2")["lets_through"]["damaging"] == []
    verdict = gate_of(rows, "this suite's verdict")
    assert verdict["lets_through"] == {"ruinous": [], "damaging": []}
    assert verdict["stops"] == ["E03", "E04"]
    assert found(rows)["beyond_gates"] == ["S30"]


def test_a_gate_on_the_median_and_on_all_recordings():
    rows = [row(recording=str(i), relative=r) for i, r in enumerate((1e-5, 1e-5, 1.0))]
    stops = [gate_of(rows, "relative L2 <= 1e-4", on=on)["stops"] for on in ("median", "worst")]
    assert stops == [[], ["E01"]]


def test_gates_count_ids_among_mistakes_and_leave_out_yardsticks():
    """Two of three strengths of one ruinous fault pass, and one ruinous fault without any."""
    rows = [row(f"E11@int{i}", relative=10.0 ** (i - 4), **other_text(50)) for i in range(1, 4)]
    rows += [row("E02", relative=1e-5, **other_text(60)), noise(1e-3, **other_text(70))]
    gate = gate_of(rows, "relative L2 <= 1e-2")
    assert gate["counts"]["ruinous"] == {"n": 2, "passes": 2, "stopped": 1}
    assert gate["lets_through"]["ruinous"] == ["E02", "E11@int1", "E11@int2"]
    everything = gate_of(rows, "relative L2 <= 1e-2", scope="all")
    assert everything["counts"]["ruinous"] == {"n": 5, "passes": 4, "stopped": 1}


def test_what_failed_on_most_recordings_passes_no_gate():
    rows = [failed("E01", "a"), failed("E01", "b"), row(recording="c", relative=0.0)]
    for gate in found(rows)["gates"]:
        counts = gate["mistakes"]["median"]["counts"]
        assert counts["ruinous"] == {"n": 1, "passes": 0, "stopped": 1}


def test_an_exact_result_passes_every_gate():
    quiet = {"detected": False, "first_tap": None, "cause": None, "at_tap": None}
    rows = [row(relative=0.0, **quiet)]
    for gate in found(rows)["gates"]:
        counts = gate["mistakes"]["worst"]["counts"]
        assert counts["benign"] == {"n": 1, "passes": 1, "stopped": 0}


def test_the_best_limit_separates():
    """Benign at 1e-4 and 1e-2, ruinous at 1e-3 and 1e-1: past 1e-2 stops one of two and passes
    both others, past 1e-4 the reverse: J is 0.5 either way, and the strictest is taken."""
    rows = [
        row("E01", relative=1e-4),
        row("E02", relative=1e-3, **other_text(50)),
        row("E03", relative=1e-2),
        row("E04", relative=1e-1, **other_text(50)),
    ]
    best = found(rows)["thresholds"]["mistakes"]["relative_l2"]
    assert (best["limit"], best["next"], best["youden"]) == (1e-4, 1e-3, 0.5)
    assert (best["stops"], best["passes"]) == (1.0, 0.5)
    assert best["auc"] == pytest.approx(0.75)
    assert (best["low"], best["high"]) == (None, None)
    decibels = found(rows)["thresholds"]["mistakes"]["sqnr_db"]
    assert (decibels["limit"], decibels["next"]) == pytest.approx((80, 60))
    assert not decibels["at_most"]
    assert decibels["auc"] == pytest.approx(0.75)


def test_a_limit_gives_each_id_one_vote():
    """Of two ruinous faults one has three strengths, all above the benign one: 3 / 3 of its vote
    and none of the other's."""
    rows = [row(f"E11@int{i}", relative=0.1 * i, **other_text(50)) for i in range(1, 4)]
    rows += [row("E02", relative=1e-5, **other_text(60)), row("E03", relative=1e-3)]
    best = found(rows)["thresholds"]
    stops = [best[scope]["relative_l2"]["stops"] for scope in ("mistakes", "all")]
    assert stops == pytest.approx([0.5, 0.75])
    assert best["mistakes"]["relative_l2"]["auc"] == pytest.approx(0.5)
    assert best["all"]["relative_l2"]["auc"] == pytest.approx(0.75)


def test_a_perfect_metric():
    rows = [row(f"E{i}", relative=10.0 ** (i - 6)) for i in range(5)]
    rows += [row(f"S{i}", relative=10.0**i, **other_text(50)) for i in range(5)]
    best = found(rows)["thresholds"]["mistakes"]["relative_l2"]
    assert (best["youden"], best["auc"], best["low"], best["high"]) == (1, 1, 1, 1)
    assert (best["limit"], best["next"]) == (1e-2, 1)


# Little to say

CASES: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "one row": [row()],
    "two faults": [row(), row("E02", **other_text(10))],
    "bridge alone": [bridge()],
    "failed alone": [failed()],
    "nothing changes": [nothing(), nothing("E02"), nothing("E03", "b")],
    "yardsticks alone": [noise(0.1**i, **other_text(i)) for i in range(5)],
    "exact": [row(relative=0.0), row("E02", relative=0.0), row("E03", relative=0.0)],
    "no transcript": [
        row(f"E{i}", relative=0.1**i, tokens_identical=None, wer=None, wer_truth=None, kl_mean=None)
        | dict.fromkeys(("same_top1", "kl_max", "lost", "invented", "wer_truth_reference"))
        for i in range(4)
    ],
    "all benign": [row(f"E{i}", relative=0.1**i) for i in range(8)],
    "no words": [row(f"E{i}", wer=wer(0, 0), wer_truth=wer(0, 0)) for i in range(3)],
    "not finite": [row(final=dict.fromkeys(at_end(1.0)))],
    "far above": [row(f"E{i}", relative=0.1**i, **other_text(500 * i)) for i in range(4)],
    "awkward": [row("E<&|>", sentence="a | <b> \x1b[31m `c` é", **on_max(None))],
    "many": [*many(), bridge(), failed(), row("E11@int8", **other_text(9)), row("E11@float16")],
}
CASES["of all kinds"] = [
    *CASES["many"],
    *CASES["yardsticks alone"],
    row("E24", unseen=True, cause=None),
    nothing("E25"),
    bridge("S31") | {"cut_off": True},
]


@pytest.mark.parametrize("case", CASES)
def test_it_can_be_written_and_shown(case: str):
    of = found(CASES[case])
    again = json.loads(json.dumps(of, allow_nan=False))
    assert again == of
    assert bench.markdown(again) == bench.markdown(of)
    assert set(bench.tables(of)) > {"faults", "targets", "sweeps", "correlations", "gates"}
    for metric in ("relative_l2", "kl", "sqnr"):
        assert bench.svg_scatter(again, metric) == bench.svg_scatter(of, metric)
        ET.fromstring(bench.svg_scatter(of, metric))
    printed(of)


@pytest.mark.parametrize("case", CASES)
def test_tables_are_tables(case: str):
    """Every line of a table has as many cells as its head, whatever the cells say."""
    columns = None
    for line in bench.markdown(found(CASES[case])).splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        cells = line.replace("\\|", "").count("|")
        columns = columns or cells
        assert cells == columns, line
    assert "\x1b" not in bench.markdown(found(CASES[case]))


def test_undefined_statistics_are_none():
    of = found([row(), row("E02", relative=0.2)])
    rho = of["correlations"]["mistakes"]["relative_l2"]
    assert (rho["rho"], rho["low"], rho["n"], rho["ids"]) == (None, None, 2, 2)
    assert of["thresholds"]["mistakes"]["relative_l2"]["auc"] is None
    alike = found([row(f"E{i}", relative=0.1**i) for i in range(8)])  # no text differs
    assert alike["correlations"]["mistakes"]["relative_l2"]["rho"] is None
    few = found(many(4))["correlations"]["mistakes"]["relative_l2"]
    assert few["rho"] is not None
    assert few["low"] is None


# What is shown


def printed(of: dict[str, Any], width: int = 160, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    bench.terminal(of, Console(file=out, width=width, force_terminal=False, color_system=None))
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def test_the_terminal_has_a_line_for_each_fault():
    text = printed(found(CASES["many"]))
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    for name in ("E00", "E11", "S05", "S30"):
        assert name in first
    assert (
        "detected, of what changes ln_post by more than 0.0001: mistakes in the encoder 100 % (9 "
        "ids; at least 100 %: met); mistakes of the input 100 % (2 ids; at least 100 %: met); all "
        "rows 100 % (31)\n"
    ) in text
    assert "SQNR >= 40 dB lets through" in text
    assert "This suite's verdict lets through 0 of" in text


def test_the_honest_figure_of_a_target_comes_first():
    text = printed(found([row("E24", unseen=True, cause=None), *(row(f"E0{i}") for i in range(4))]))
    assert (
        "cause named right, of what is detected and has a name: unseen mistakes 0 % (1 id); "
        "mistakes 80 % (5 ids; at least 80 %: met); all rows 80 % (5)\n"
    ) in text
    assert "distinct faults: mistakes 5 (at least 50: missed); unseen mistakes 1; yards" in text
    assert "MAX agrees with the twin, however little changes: not measured\n" in text


def test_a_narrow_terminal_drops_columns():
    text = printed(found(CASES["many"]), width=70)
    assert "no room for group" in text
    assert max(len(line) for line in text.split("\nMedians")[0].splitlines()) <= 70


def test_an_old_terminal_is_no_error():
    assert "E<&|>" in printed(found(CASES["awkward"]), encoding="ascii")


@pytest.mark.parametrize(
    ("given", "tap", "cause"),
    [
        ({}, "conv1 ok", "ok"),
        ({"first_tap": "conv2"}, "conv2, expected conv1: 0 %", "ok"),
        ({"cause": None}, "conv1 ok", "unknown"),
        ({"cause": "x"}, "conv1 ok", "wrong (x): 100 %"),
        ({"cause": None, "expected_cause": None}, "conv1 ok", "ok (no name)"),
        ({"detected": False, "first_tap": None, "cause": None}, "not detected", "-"),
    ],
)
def test_cells(given: dict[str, Any], tap: str, cause: str):
    fault = only([row(**given)])
    assert (tap_said(fault), cause_said(fault)) == (tap, cause)


def test_a_failed_fault_has_no_figure():
    shown = fault_row(only([failed()]))
    assert (shown["rel. L2"], shown["KL"], shown["class"]) == ("none", "-", "ruinous")


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (1.0, "100 %"),
        (0.9996, "100.0 %"),
        (0.05, "5 %"),
        (0.0123, "1.2 %"),
        (0.0, "0 %"),
        (1e-4, "1.0e-2 %"),
        (None, "-"),
    ],
)
def test_a_percentage_of_almost_all_is_not_all(x: float | None, said: str):
    assert percent(x) == said


def test_where_it_was_seen_is_a_link():
    assert linked("vllm-project/vllm#12342; candle") == (
        "[vllm-project/vllm#12342](https://github.com/vllm-project/vllm/issues/12342); candle"
    )
    given = "first https://github.com/a/b/pull/12, then (https://docs.rs/c_d?x=1&y=2#z)."
    assert linked(given) == (
        "first [a/b#12](https://github.com/a/b/pull/12), then "
        "([docs.rs/c_d?x=1&amp;y=2#z](https://docs.rs/c_d?x=1&amp;y=2#z))."
    )
    assert linked("https://github.com/a/b") == "[a/b](https://github.com/a/b)"
    assert linked("javascript:x a_b *c*") == "javascript:x a_b \\*c\\*"
    known = row("E17", group="blocks", how="code")
    assert re.search(
        r"\(https://github\.com/vllm-project/vllm/(issues|pull)/12342\)",
        bench.markdown(found([known])),
    )


def test_misses_of_one_kind_share_a_line():
    rows = [row(recording=r, cause=None, relative=0.1) for r in "abc"] + [row(recording="d")]
    table = bench.tables(found(rows))["misses"]
    assert "| cause unknown | E01 | weight-rounded | - | 3 of 4 | 1.0e-1 |" in table


# The pictures


def dots(picture: str) -> dict[str, tuple[float, float]]:
    """The place of each fault's dot, in pixels, by the fault's key."""
    places = {}
    for group in ET.fromstring(picture).iter(f"{SVG}g"):
        path = group.findall(f"{SVG}path")[-1].attrib["d"]
        x, y = path[1:].split("m")[0].split()
        places[group.attrib["data-fault"]] = (float(x), float(y))
    return places


def test_every_fault_has_a_dot():
    of = found(CASES["many"])
    for metric in ("relative_l2", "kl", "sqnr"):
        assert set(dots(svg_scatter(of, metric))) == {fault["fault"] for fault in of["faults"]}


def test_dots_lie_where_the_figures_say():
    rows = [
        row("E01", relative=1e-3),
        row("E02", relative=1e-2, **other_text(25)),
        row("E03", relative=1e-1, **other_text(100)),
        row("E04", relative=0.0, **other_text(1)),
    ]
    of = found(rows)
    at = dots(svg_scatter(of, "relative_l2"))
    assert at["E03"][0] - at["E02"][0] == pytest.approx(at["E02"][0] - at["E01"][0], abs=0.2)
    heights = [at["E01"][1] - at[key][1] for key in ("E02", "E03", "E04")]
    assert heights[0] / heights[1] == pytest.approx(0.5, abs=0.01)
    assert heights[2] / heights[1] == pytest.approx(0.1, abs=0.01)
    assert at["E04"][0] == min(x for x, _ in at.values())
    worse = dots(svg_scatter(of, "sqnr"))
    assert sorted(worse, key=lambda key: worse[key][0]) == ["E04", "E01", "E02", "E03"]


def test_a_wer_above_the_axis_lies_at_its_top_with_an_arrow():
    rows = [row("E01", **other_text(700)), row("E02", **other_text(200)), row("E03")]
    picture = svg_scatter(found(rows), "relative_l2")
    at = dots(picture)
    assert at["E01"][1] == at["E02"][1] < at["E03"][1]
    arrows = [
        group.attrib["data-fault"]
        for group in ET.fromstring(picture).iter(f"{SVG}g")
        if len(group.findall(f"{SVG}path")) == 2
    ]
    assert arrows == ["E01"]


def test_what_has_no_such_value_stands_aside():
    picture = svg_scatter(found([row(), row("E02"), bridge(), failed()]), "relative_l2")
    at = dots(picture)
    assert min(at["S30"][0], at["S05"][0]) > max(at["E01"][0], at["E02"][0])
    assert "bridge, or no features" in picture
    assert "bridge, or no features" not in svg_scatter(found([row()]), "relative_l2")


def test_a_sweep_is_a_line():
    rows = [row(f"E11@{s}", relative=r) for s, r in (("float16", 1e-3), ("int8", 1e-1))]
    picture = ET.fromstring(svg_scatter(found(rows), "relative_l2"))
    lines = [p for p in picture.iter(f"{SVG}path") if p.attrib["class"] == "sweep weights"]
    assert len(lines) == 1
    assert lines[0].attrib["d"].count("L") == 1


def test_a_yardstick_is_hollow():
    picture = svg_scatter(found([row(), noise(0.1)]), "relative_l2")
    hollow = [
        group.attrib["data-fault"]
        for group in ET.fromstring(picture).iter(f"{SVG}g")
        if "yardstick" in group.findall(f"{SVG}path")[-1].attrib["class"]
    ]
    assert hollow == ["E-e@0.1"]
    assert "hollow" in picture
    assert "hollow" not in svg_scatter(found([row()]), "relative_l2")


def test_what_changes_nothing_is_not_drawn():
    picture = svg_scatter(found([row(), nothing("E02")]), "relative_l2")
    assert set(dots(picture)) == {"E01"}
    assert "1 without a WER, or that change nothing, are not drawn" in picture


def test_names_do_not_cover_each_other():
    from validation.findings_plot import Dot, box, meets

    rng = random.Random(2)
    (fault,) = found([row()])["faults"]
    some = [
        Dot({**fault, "id": f"E{i}"}, rng.uniform(0, 300), rng.uniform(0, 200)) for i in range(90)
    ]
    drawn = ET.fromstring(f"<svg>{names_of(some, (0, 0, 300, 200))}</svg>")
    boxes = [
        box(float(t.attrib["x"]), float(t.attrib["y"]), t.text or "", t.attrib["text-anchor"])
        for t in drawn.iter("text")
    ]
    assert len(boxes) == 90
    leaders = list(drawn.iter("path"))
    assert len(leaders) > 5  # each goes from a dot
    places = {f"M{dot.x:.1f} {dot.y:.1f}" for dot in some}
    assert all(one.attrib["d"].partition("L")[0] in places for one in leaders)
    assert not any(meets(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_another_metric_is_refused():
    with pytest.raises(ValueError, match="metric is 'psnr', of relative_l2, kl, sqnr"):
        svg_scatter(found([row()]), "psnr")


def test_the_best_limit_without_one_recording():
    """`b` alone makes the fault of 0.1 harmful: without it the limit is the next one."""
    rows = [
        row(fault, recording, relative, **other_text(errors))
        for fault, relative, a, b in (("E01", 0.01, 0, 1), ("E03", 0.1, 0, 90), ("E04", 1, 90, 90))
        for recording, errors in (("a", a), ("b", b))
    ]
    best = found(rows)["thresholds"]["mistakes"]["relative_l2"]
    assert best["limit"] == 0.01
    assert best["without_one"] == {"low": 0.01, "high": 0.1}
    only_one = [one for one in rows if one["recording"] == "a"]
    best = found(only_one)["thresholds"]["mistakes"]["relative_l2"]
    assert best["without_one"] == {"low": None, "high": None}


def test_a_loop_counts_as_a_lost_text_where_wer_is_capped():
    """The longest loop has not the largest error: the pooled WER ranks it first, the capped does
    not."""
    rows = []
    for fault, relative, a, b in (
        ("E01", 0.01, 0, 1),
        ("E03", 0.1, 900, 0),
        ("E04", 0.5, 100, 50),
        ("E05", 1, 100, 100),
    ):
        rows += [row(fault, "a", relative, **other_text(a))]
        rows += [row(fault, "b", relative, **other_text(b))]
    of = found(rows)["correlations"]
    assert of["capped"]["relative_l2"]["rho"] == pytest.approx(1)
    assert of["mistakes"]["relative_l2"]["rho"] == pytest.approx(0.4)
