"""The tables of a study as Markdown and as LaTeX."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pruneforge.runs.markdown import markdown
from pruneforge.studies.grids import Entry, Grid

LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": r"\textendash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
"""Characters that mean something else to LaTeX, or nothing."""


Section = tuple[str, str, Grid]
"""A title, a text and a table."""

HOW = (
    "Mean and standard deviation over calibration draws. Bold: no other method is better by more than noise explains "
    "(95 % bootstrap intervals of paired differences, over draws and, where they are known, over items)."
)


def as_markdown(sections: Sequence[Section]) -> str:
    """Return a report as Markdown."""
    parts = [f"# Pruning study\n\n{HOW}\n"]
    for title, text, grid in sections:
        parts += [f"## {markdown(title)}\n", f"{markdown(text)}\n"]
        parts.append(_line(map(markdown, one_line_heads(grid))))
        parts.append("|" + "|".join([":-"] * grid.texts + ["-:"] * (len(grid.heads) - grid.texts)) + "|")
        parts += [_line(map(_markdown_entry, row)) for row in grid.rows]
        parts += ["", *(f"{markdown(note)}\n" for note in grid.notes)]
    return "\n".join(parts)


def as_latex(sections: Sequence[Section]) -> str:
    """Return tables for `booktabs`, with titles and texts as comments."""
    parts = [f"% {HOW}", "% needs \\usepackage{booktabs} and, for quotation marks, \\usepackage[T1]{fontenc}"]
    for title, text, grid in sections:
        columns = "l" * grid.texts + "r" * (len(grid.heads) - grid.texts)
        parts += [f"% {line}" for told in (title, text, *grid.notes) for line in told.splitlines()]
        parts += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", *_groups(grid)]
        parts += [_row(map(latex, grid.heads)), "\\midrule"]
        parts += [_row(map(_latex_entry, row)) for row in grid.rows]
        parts += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(parts)


def latex(text: str) -> str:
    """Return a text as LaTeX shows it, whatever its characters mean to LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def one_line_heads(grid: Grid) -> list[str]:
    """Return the heads with what they stand under, where there is only one line for both."""
    above = [name for name, width in grid.groups or [("", len(grid.heads))] for _ in range(width)]
    return [f"{group} {head}".strip() for group, head in zip(above, grid.heads, strict=True)]


def _markdown_entry(entry: Entry) -> str:
    text = markdown(_tagged(entry))
    return f"**{text}**" if entry.best else text


def _line(texts: Iterator[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _latex_entry(entry: Entry) -> str:
    text = latex(_tagged(entry))
    return f"\\textbf{{{text}}}" if entry.best else text


def _groups(grid: Grid) -> Iterator[str]:
    """Yield the line above the heads, and rules that show how far each name goes."""
    if not grid.groups:
        return
    yield _row(
        f"\\multicolumn{{{width}}}{{c}}{{{latex(name)}}}" if name else "&" * (width - 1) for name, width in grid.groups
    )
    start = 1
    for name, width in grid.groups:
        if name:
            yield f"\\cmidrule(lr){{{start}-{start + width - 1}}}"
        start += width


def _row(texts: Iterator[str]) -> str:
    return f"{' & '.join(texts)} \\\\"


def _tagged(entry: Entry) -> str:
    return f"{entry.text} ({entry.tag})" if entry.tag else entry.text
