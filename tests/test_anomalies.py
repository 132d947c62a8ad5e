"""Answers to look at: counted by kind, and shown."""

import io
import json
from pathlib import Path
from typing import Any

from factories_evaluation import evaluate_results
from rich.console import Console

from morebench.evaluation.anomalies import KINDS, NUM_EXAMPLES, anomalies
from morebench.evaluation.tasks.benchmark import Scored
from morebench.reporting.scores import print_scores


def line(number: int, prediction: str = "yes", **more: Any) -> dict[str, Any]:
    fields = {"id": str(number), "question": "Is it?", "prediction": prediction, "target": "yes"}
    return fields | {"ended": True, "unreadable_tokens": 0, "near_ties": 0} | more


def test_every_kind_is_counted_and_the_first_are_shown() -> None:
    lines = [
        line(0),
        line(1, " \n"),
        line(2, "very long", ended=False),
        line(3, unreadable_tokens=2, near_ties=3),
        *(line(number, "B") for number in range(4, 12)),
    ]
    flags = [(), (), (), (), *[("unparsed", "needs_judge", "random_fallback")] * 8]
    found = anomalies(lines, [Scored(1.0, None, own) for own in flags])
    assert {kind: found[kind]["n"] for kind in found} == {
        "empty": 1,
        "unparsed": 8,
        "too_long": 1,
        "needs_judge": 8,
        "random_fallback": 8,
        "unreadable_tokens": 1,
        "near_ties": 1,
    }
    assert list(found) == [kind for kind in KINDS if kind in found]
    shown = found["unparsed"]["examples"]
    assert [example["id"] for example in shown] == [str(number) for number in range(4, 4 + NUM_EXAMPLES)]
    assert shown[0] == {"id": "4", "question": "Is it?", "prediction": "B", "target": "yes"}
    assert anomalies(lines[:1], [Scored(1.0, "yes")]) == {}


def test_a_run_is_readable_at_80_columns(tmp_path: Path) -> None:
    folder = evaluate_results(tmp_path)
    out = io.StringIO()
    print_scores(folder, Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert all(len(text) <= 80 for text in lines if not text.startswith("More examples"))
    text = out.getvalue()
    found = json.loads((folder / "results.json").read_text())
    for label in ("GQA", "MMB-En", "MMMU", "SEED-All"):
        (row,) = [own for own in lines if own.startswith(label)]
        assert "paper" in row
    assert "lmms_eval" not in text
    text = " ".join(text.split())
    assert "warning: mmbench_en_dev: the score depends on judge=none." in text
    assert "warning: 2 of 64 answers that were generated once more alone came out otherwise" in text
    (gqa,) = [own.split() for own in lines if own.startswith("GQA")]
    assert gqa == ["GQA", "62.5", "25.0", "+37.5", "30.0", "+32.5", "12,578", "paper"]
    assert "mmmu_val 7: 'a ... b', expected 'c'; What is it?" in text
    assert found["tasks"]["mmmu_val"]["anomalies"]["empty"]["n"] == 3
    assert text.count("--") >= 13, "a task that has no result is missing, not 0"
