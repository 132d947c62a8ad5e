import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from factories_reporting import columns, four_cells

from morebench.config.schema import AXES, Column
from morebench.reporting.figures import FAINT, INK, Drawing, colour, loss_figure, scores_figure
from morebench.reporting.results import CellResult, ReportRow, Score, load_results
from morebench.reporting.tables import Table, make_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    results = load_results(
        four_cells(tmp_path_factory.mktemp("runs"), unfinished=[2], num_images=12), columns()
    )
    return make_table("digits", results, columns(), [])


def wide_table(num_columns: int) -> Table:
    wide = [Column(label=f"C{k}", task="t", metric="m", factor=1, digits=1) for k in range(num_columns)]
    results = []
    for number in range(3):
        choices = dict(zip(AXES, (f"llm{number}", "clip", "native", "lcs"), strict=True))
        scores = {c.label: Score(50.0 + number * k, 40, 60, 100) for k, c in enumerate(wide)}
        results.append(CellResult(ReportRow(choices, choices, 0, {}), {}, True, scores=scores))
    return make_table("wide", results, wide, [])


def curves() -> dict[int, dict[int, float]]:
    return {number: {step: 5.0 / (1 + step) + number for step in range(900)} for number in (0, 1, 3)}


def texts(drawing: Drawing) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing.svg).iter("text")]


def drawn(drawing: Drawing | None) -> Drawing:
    assert drawing is not None
    return drawing


def test_bars_name_cells_columns_values_and_the_control_in_text(table: Table):
    found = texts(drawn(scores_figure(table)))
    assert "Gemma-2-tiny + CLIP-tiny" in found
    assert {"digits_vqa", "digits_pope", "digits_mc", "blind", "--"} <= set(found)
    for row in table.rows:
        if not row.control:
            assert all(printed.text in found for printed in row.printed)


def test_alt_text_says_the_numbers(table: Table):
    drawing = drawn(scores_figure(table))
    assert "Gemma-2-tiny + CLIP-tiny: digits_vqa " + table.rows[0].printed[0].text in drawing.alt
    assert "Llama-tiny + CLIP-tiny: digits_vqa --" in drawing.alt


def test_many_columns_make_a_radar_that_names_both_ends_of_a_spoke():
    found = texts(drawn(scores_figure(wide_table(9))))
    assert "C8" in found
    assert "50.0\N{EN DASH}66.0" in found


def test_nothing_measured_nothing_drawn(table: Table):
    empty = make_table("empty", [result for result in table.results if not result.evaluated], columns(), [])
    assert scores_figure(empty) is None
    assert loss_figure("pretrain", empty, {}) is None


def test_a_cell_keeps_its_colour_when_others_are_missing(table: Table):
    drawing = drawn(loss_figure("pretrain", table, {3: curves()[3]}))
    assert colour(3).lower() in drawing.svg.lower()
    assert colour(0).lower() not in drawing.svg.lower()


def test_long_curves_are_thinned(table: Table):
    long = {0: {step: 1.0 for step in range(100_000)}}
    assert len(drawn(loss_figure("pretrain", table, long)).svg) < 40_000


def test_labels_of_curves_that_end_together_do_not_overlap(table: Table):
    same = {number: {step: 1.0 + 1e-3 * number + 1 / (1 + step) for step in range(50)} for number in range(4)}
    svg = drawn(loss_figure("pretrain", table, same)).svg
    heights = []
    for element in ElementTree.fromstring(svg).iter("text"):
        if "tiny +" in (element.text or ""):
            place = (
                element.get("y") or re.findall(r"translate\(\S+ ([\d.]+)\)", element.get("transform", ""))[0]
            )
            heights.append(float(place))
    heights.sort()
    assert len(heights) == 4
    assert min(b - a for a, b in pairwise(heights)) > 9


@pytest.mark.parametrize("num_columns", [2, 9])
def test_svg_is_self_contained_follows_the_page_and_repeats_itself(num_columns: int, table: Table):
    first, again = (drawn(scores_figure(wide_table(num_columns))) for _ in range(2))
    assert first == again
    assert "http" not in first.svg
    assert "currentColor" in first.svg
    assert INK not in first.svg
    assert FAINT not in first.svg
    losses = drawn(loss_figure("pretrain", table, curves())).svg
    ids = [re.findall(r'id="([^"]+)"', svg) for svg in (first.svg, losses)]
    assert len(set(ids[0] + ids[1])) == len(ids[0]) + len(ids[1])
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', first.svg)) <= set(ids[0])
