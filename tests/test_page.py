import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factories_reporting import columns, four_cells
from PIL import Image

from morebench.reporting.gallery import spread, thumbnail
from morebench.reporting.report import ReportFiles, write_report

FILES = ("table.md", "table.tex", "table.csv", "table.json", "index.html")
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Outline(HTMLParser):
    """Collects what a test asks about, and checks that tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportFiles, str, Outline]:
    root = tmp_path_factory.mktemp("root")
    files = write_report(
        "digits", four_cells(root, unfinished=[2], num_images=24), columns(), root / "reports" / "digits"
    )
    html = files.paths[-1].read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(html)
    assert not outline.open
    return files, html, outline


def test_all_formats_are_written(report: tuple[ReportFiles, str, Outline]):
    files, _, _ = report
    assert tuple(path.name for path in files.paths) == FILES
    assert all(path.stat().st_size > 100 for path in files.paths)


def test_writing_again_gives_the_same_bytes(tmp_path: Path):
    rows = four_cells(tmp_path, num_images=6)
    first, again = (write_report("digits", rows, columns(), tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first.paths, again.paths, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_the_page_asks_nothing_of_the_outside(report: tuple[ReportFiles, str, Outline]):
    _, html, outline = report
    assert "http" not in html
    assert "<script" not in html
    assert not outline.all("link")
    assert all(str(image["src"]).startswith("data:image/") for image in outline.all("img"))
    links = {str(link["href"]) for link in outline.all("a")}
    ids = {f"#{attributes['id']}" for _, attributes in outline.tags if "id" in attributes}
    assert links <= ids


def test_every_image_and_figure_has_words_for_it(report: tuple[ReportFiles, str, Outline]):
    _, _, outline = report
    assert all(image.get("alt") for image in outline.all("img"))
    figures = [attributes for attributes in outline.all("div") if attributes.get("role") == "img"]
    assert len(figures) == 3  # scores, pretrain loss, finetune loss
    assert all(figure["aria-label"] for figure in figures)
    assert all(header.get("scope") for header in outline.all("th"))


def test_the_table_shows_every_number_with_its_interval(report: tuple[ReportFiles, str, Outline]):
    files, html, _ = report
    scores = html[html.index('<table class="scores">') : html.index("</table>")]
    for row in files.table.rows:
        for printed in row.printed:
            assert printed.text in scores
            assert printed.interval in scores
    assert scores.count('class="control"') == 3
    assert scores.count("<b>") == scores.count("<u>") == 4  # three columns each, and the caption


def test_each_evaluated_cell_shows_right_and_wrong_answers_of_each_task(
    report: tuple[ReportFiles, str, Outline],
):
    _, html, outline = report
    verdicts = [article["class"] for article in outline.all("article")]
    assert verdicts.count("right") == verdicts.count("wrong") == 3 * 3 * 3  # cells, tasks, examples
    assert len(outline.all("img")) == len(verdicts)
    answers = re.findall(
        r'<article class="(\w+)">.*?<dd>(.*?)</dd>.*?</span> (.*?)</dd>', html, flags=re.DOTALL
    )
    assert len(answers) == len(verdicts)
    assert all((target == answer) == (verdict == "right") for verdict, target, answer in answers)
    assert "Which digit is shown?" in html
    assert "&lt;image&gt;" not in html
    assert html.count("<dt>blind</dt>") == len(verdicts)


def test_an_unfinished_cell_has_its_costs_and_no_total(report: tuple[ReportFiles, str, Outline]):
    _, html, _ = report
    cost = html[html.index('id="cost"') : html.index('id="examples"')]
    line = next(part for part in cost.split("<tr>") if "Llama-tiny + CLIP-tiny" in part)
    assert re.findall(r'class="number">(.*?)</td>', line)[:5] == [
        "0:00:19",
        "0:00:19",
        "--",
        "<b>--</b>",
        "--",
    ]


def test_text_of_a_model_cannot_become_markup(tmp_path: Path):
    rows = four_cells(tmp_path, num_images=6)
    folder = rows[0].runs["evaluate"]
    assert folder is not None
    path = folder / "predictions" / "digits_vqa.jsonl"
    path.write_text(
        re.sub(r'"prediction": "[^"]*"', '"prediction": "<script>alert(1)</script>"', path.read_text())
    )
    html = write_report("digits", rows, columns(), tmp_path / "report").paths[-1].read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_a_report_of_nothing_yet_is_a_report(tmp_path: Path):
    rows = four_cells(tmp_path, unfinished=range(4), num_images=4)
    files = write_report("digits", rows, columns(), tmp_path / "report")
    assert "No cell has been evaluated yet." in files.paths[-1].read_text()
    assert files.paths[2].read_text().count("--,--,--") == 4


def test_examples_are_spread_and_of_different_images():
    lines = [{"id": i, "image": f"{i // 5}.png"} for i in range(50)]
    chosen = spread(lines, 3)
    assert [line["image"] for line in chosen] == ["1.png", "5.png", "8.png"]
    assert spread(lines[:2], 3) == lines[:1] + lines[1:2]
    assert spread([], 3) == []


def test_thumbnails_keep_small_scenes_and_shrink_photographs(tmp_path: Path):
    Image.new("RGB", (56, 56), "red").save(tmp_path / "scene.png")
    Image.effect_noise((1600, 1200), 80).save(tmp_path / "photo.jpg")
    small, large = thumbnail(tmp_path / "scene.png"), thumbnail(tmp_path / "photo.jpg")
    assert small is not None
    assert small.startswith("data:image/png")
    assert large is not None
    assert large.startswith("data:image/jpeg")
    assert len(large) < 60_000
    assert thumbnail(tmp_path / "gone.png") is None


def test_predicted_stands_beside_measured(report: tuple[ReportFiles, str, Outline], tmp_path: Path):
    """By the manifests: 4 PFLOP predicted and 5 measured, no seconds predicted and 17 measured."""
    files, html, _ = report
    markdown = files.paths[0].read_text(encoding="utf-8")
    row = "| Gemma-2-tiny + CLIP-tiny | pretrain | 4 | 5 | 1.25 | -- | 0.00472 | -- | 2 | 1.5 | 0.75 |"
    assert row in markdown.splitlines()
    assert markdown.count("| pretrain |") == markdown.count("| finetune |") == 4
    assert '<td>pretrain</td><td class="number">4</td><td class="number">5</td>' in html
    cost = json.loads(files.paths[3].read_text())["rows"][0]["costs"]["pretrain"]
    assert (cost["flops"], cost["predicted"]) == (5e15, {"flops": 4e15, "seconds": None, "memory_gib": 2.0})
    rows = four_cells(tmp_path, num_images=6)
    shared = [replace(row, runs={**row.runs, "pretrain": rows[0].runs["pretrain"]}) for row in rows]
    for folder in (tmp_path / "runs").iterdir():
        if folder.name.endswith("finetune"):  # of an older version
            (folder / "manifest.json").write_text("{}")
        if folder.name.endswith("evaluate"):
            (folder / "manifest.json").write_text('{"predicted": {"flops": 2e15, "seconds": 6.15}}')
    told = write_report("digits", shared, columns(), tmp_path / "reports").paths[0].read_text()
    assert told.count("| pretrain |") == 1, "a shared run stands once"
    assert "| finetune |" not in told
    assert told.count("| evaluate | 2 | -- | -- | 0.00171 | 0.00342 | 2.00 | -- | -- | -- |") == 4
