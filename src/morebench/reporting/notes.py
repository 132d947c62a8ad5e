"""Footnotes, written by the manifests and never by hand."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from morebench.evaluation.anomalies import KINDS
from morebench.reporting.results import CellResult
from morebench.reporting.stats import AGGREGATE_RESAMPLES, RESAMPLES

EXCLUSION_TEXT = {
    "quarantined": "records quarantined, their image or text being unusable",
    "truncated": "samples cut at the maximum length",
    "unsupervised": "samples without a supervised token, kept with zero weight",
}
CONTROL_TEXT = {
    "blind": "blind: the same questions with every image replaced by its mean colour.",
    "shuffled": "shuffled: the same questions, each about the image of another item of its task.",
}
CONTROLS_TEXT = "How much of a score needs the image is its distance from a control."


def footnotes(results: Sequence[CellResult]) -> list[str]:
    return [
        *_profile(results),
        "95 % intervals: percentile bootstrap over images, each with all its questions "
        f"({RESAMPLES:,} resamples; {AGGREGATE_RESAMPLES:,} for metrics that are no sum over items). "
        "Each row is one training run: what another seed would change is not in them.",
        *(
            CONTROL_TEXT.get(name, f"{name}: a control.")
            for name in _in_order(n for r in results for n in r.controls)
        ),
        *([CONTROLS_TEXT] if any(result.controls for result in results) else []),
        *_odd_answers(results),
        *_missing(results),
        *_exclusions(results),
        *_anomalies(results),
        *_commits(results),
        "Where the protocol departs from the published study: docs/deviations.md.",
    ]


def _profile(results: Sequence[CellResult]) -> list[str]:
    profiles = _in_order(result.profile for result in results if result.profile)
    if len(profiles) <= 1:
        return [f"Prompts and scorers: profile {profile}." for profile in profiles]
    cells = [f"{profile}: {_cells([r for r in results if r.profile == profile])}" for profile in profiles]
    return [f"WARNING: rows were scored with different profiles and cannot be compared ({'; '.join(cells)})."]


def _odd_answers(results: Sequence[CellResult]) -> list[str]:
    """One sentence a kind: counts and where; and what the scorers warn of."""
    notes = []
    for kind, meaning in KINDS.items():
        counts = [
            f"{result.odd_answers[kind]:,} of {result.num_answers:,} ({_cells([result])})"
            for result in results
            if result.odd_answers.get(kind)
        ]
        if counts:
            notes.append(f"Answers that are {kind} ({meaning}): {', '.join(counts)}.")
    cells: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        for text in result.warnings:
            cells[text].append(result)
    return notes + [f"WARNING: {text} ({_some(found, results)})" for text, found in cells.items()]


def _missing(results: Sequence[CellResult]) -> list[str]:
    unfinished = [result for result in results if not result.evaluated]
    return [f"-- : not evaluated yet ({_cells(unfinished)})."] if unfinished else []


def _exclusions(results: Sequence[CellResult]) -> list[str]:
    cells: dict[tuple[str, str, int], list[CellResult]] = defaultdict(list)
    for result in results:
        for step, counts in result.exclusions.items():
            for kind, count in counts.items():
                cells[step, kind, count].append(result)
    return [
        f"{step}: {count:,} {EXCLUSION_TEXT[kind]} ({_some(found, results)})."
        for (step, kind, count), found in cells.items()
    ]


def _anomalies(results: Sequence[CellResult]) -> list[str]:
    cells: dict[str, list[CellResult]] = defaultdict(list)
    for result in results:
        for anomaly in result.anomalies:
            cells[anomaly].append(result)
    return [f"Anomaly, {anomaly} ({_some(found, results)})." for anomaly, found in cells.items()]


def _commits(results: Sequence[CellResult]) -> list[str]:
    commits = _in_order(commit for result in results for commit in result.commits)
    if len(commits) <= 1:
        return [f"Commit {commit}." for commit in commits]
    return [f"Runs of {len(commits)} commits: {', '.join(commits)}."]


def _some(found: Sequence[CellResult], results: Sequence[CellResult]) -> str:
    return "every row" if len(found) == len(results) else _cells(found)


def _cells(results: Sequence[CellResult]) -> str:
    return ", ".join(" + ".join(result.row.labels[axis] for axis in ("llm", "vision")) for result in results)


def _in_order(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
