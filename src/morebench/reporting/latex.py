"""The table in LaTeX, to be \\input into a paper that loads booktabs."""

from collections.abc import Iterable

from morebench.reporting.tables import FEW_COLUMNS, MISSING, Printed, Table

ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{SUPERSCRIPT TWO}": r"\textsuperscript{2}",
    "\N{EN DASH}": "--",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
}


def latex(table: Table) -> str:
    """A `table` environment; its last lines are each column's number of items and widest half interval."""
    names, columns = len(table.axes), table.columns
    few = len(columns) <= FEW_COLUMNS
    environment = "table" if few else "table*"  # across both columns of the page
    lines = [
        r"% Needs \usepackage{booktabs} in the preamble.",
        rf"\begin{{{environment}}}[t]",
        r"  \centering",
        *([r"  \footnotesize"] if few else [r"  \scriptsize", r"  \setlength{\tabcolsep}{3pt}"]),
        rf"  \caption{{{_caption(table)}}}",
        rf"  \label{{tab:{_label(table.name)}}}",
        rf"  \begin{{tabular}}{{@{{}}{'l' * names}{'r' * len(columns)}@{{}}}}",
        r"    \toprule",
        _line(rf"\textbf{{{escape(title)}}}" for title in table.header),
        r"    \midrule",
    ]
    for row in table.rows:
        if row.control:
            texts = [rf"\quad\textit{{{escape(row.control)}}}", *("" for _ in row.names[1:])]
            lines.append(_line([*texts, *(rf"\textit{{{printed.text}}}" for printed in row.printed)]))
        else:
            lines.append(_line([*(escape(name) for name in row.names), *(_number(p) for p in row.printed)]))
    blank = [""] * (names - 1)
    lines += [
        r"    \midrule",
        _line(["items", *blank, *(_items(table, column.label) for column in columns)]),
        _line([r"95\,\%, at most", *blank, *(_widest(table, k) for k in range(len(columns)))]),
        r"    \bottomrule",
        r"  \end{tabular}",
        rf"\end{{{environment}}}",
    ]
    return "\n".join(lines) + "\n" + "".join(f"% {note}\n" for note in table.notes)


def escape(text: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in text)


def _line(cells: Iterable[str]) -> str:
    return f"    {' & '.join(cells)} \\\\"


def _number(printed: Printed) -> str:
    return {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}[printed.rank].format(printed.text)


def _caption(table: Table) -> str:
    fixed = f" {escape(table.fixed)}." if table.fixed else ""
    return rf"{escape(table.name)}.{fixed} \textbf{{Best}} and \underline{{second}} of each column."


def _label(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name)


def _items(table: Table, label: str) -> str:
    counts = {result.scores[label].n for result in table.results if label in result.scores}
    return f"{min(counts):,}" if counts else MISSING


def _widest(table: Table, k: int) -> str:
    label, digits = table.columns[k].label, table.columns[k].digits
    scores = [result.scores[label] for result in table.results if label in result.scores]
    sides = [side for s in scores for side in (s.high - s.value, s.value - s.low)]
    return rf"$\pm${max(sides):.{digits}f}" if sides else MISSING
