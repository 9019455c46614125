"""Sections as Markdown and LaTeX, and into a README between two marks. The HTML page is in page.py."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from exp.files.atomic import write_atomically
from exp.files.text import read_text
from exp.reproduction.report.sections import Cell, Section
from exp.runtime.errors import InputError

LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", "–": "--",  # noqa: RUF001
         "±": r"$\pm$"}  # fmt: skip
LATEX_BEGIN = "% Needs \\usepackage{booktabs,longtable,pdflscape}.\n\\begin{landscape}\\scriptsize\\sloppy"
BEGIN = "<!-- results: written by `python scripts/report.py OUTPUT --readme FILE`; do not edit -->"
END = "<!-- end of results -->"
README_WIDTH = 120  # of lines of text


def markdown(sections: Sequence[Section], lead: str, title: str = "Published and measured") -> str:
    """Everything as one page, without what stands on that of page.py alone."""
    parts = [f"# {title}\n", f"{lead}\n"]
    for group, members in groupby(sections, key=lambda section: section.group):
        parts.append(f"## {group}\n")
        for section in members:
            parts += [f"### {section.title}\n", *markdown_parts(section)]
    return "\n".join(parts)


def markdown_parts(section: Section) -> list[str]:
    """A section but for its title: texts and the table, each with a line feed behind it."""
    parts = [f"{section.lead}\n"] if section.lead else []
    if section.rows:
        marks = ["---:" if right else "---" for right in section.flush_right]
        rows = ([cell.text + _markdown_marks(cell) for cell in row] for row in section.rows)
        parts.append("\n".join(map(_markdown_line, [section.header, marks, *rows])) + "\n")
    parts += [f"[{number}] {text}\n" for number, text in enumerate(section.footnotes, start=1)]
    return parts + [f"{note}\n" for note in section.notes]


def _markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _markdown_marks(cell: Cell) -> str:
    return " " * bool(cell.marks) + "".join(f"[{mark}]" for mark in cell.marks)


def latex(sections: Sequence[Section]) -> str:
    """A table per section, which may break over pages, and its texts around it."""
    parts = [LATEX_BEGIN, "\\setlength{\\tabcolsep}{1.5pt}", ""]
    for section in sections:
        paragraphs = [section.lead] if section.lead else []
        if not section.rows:
            paragraphs.insert(0, f"{section.title}.")
        parts += [f"\\noindent {_latex_prose(text)}\\par" for text in paragraphs]
        parts += _latex_table(section) if section.rows else []
        for number, text in enumerate(section.footnotes, start=1):
            parts.append(f"\\noindent\\textsuperscript{{{number}}} {_latex_prose(text)}\\par")
        parts += [*(f"\\noindent {_latex_prose(note)}\\par" for note in section.notes), ""]
    return "\n".join([*parts, "\\end{landscape}\n"])


def _latex_table(section: Section) -> list[str]:
    kinds = zip(section.flush_right, section.wide)
    columns = "".join("p{7cm}" if is_wide else "r" if is_right else "l" for is_right, is_wide in kinds)
    lines = [f"\\begin{{longtable}}{{{columns}}}", f"\\caption{{{latex_text(section.title)}}}"]
    lines += [f"\\label{{tab:{section.key.replace('_', '-')}}} \\\\", "\\toprule"]
    lines += [" & ".join(map(latex_text, section.header)) + " \\\\", "\\midrule", "\\endhead", "\\bottomrule"]
    lines.append("\\endfoot")
    for row in section.rows:
        lines.append(" & ".join(latex_text(cell.text) + _latex_marks(cell) for cell in row) + " \\\\")
    return [*lines, "\\end{longtable}"]


def _latex_marks(cell: Cell) -> str:
    return f"\\textsuperscript{{{','.join(map(str, cell.marks))}}}" if cell.marks else ""


def latex_text(text: str) -> str:
    """Text for LaTeX; the sign of a negative number is a minus, not a hyphen, and -> is an arrow."""
    escaped = "".join(LATEX.get(character, character) for character in text.replace("->", "→"))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped).replace("→", r"$\to$")


def _latex_prose(text: str) -> str:
    """Text in which what stands between backticks is code; paths may break behind their slashes."""
    plain, *code = re.split(r"`([^`]*)`", text)
    parts = [latex_text(plain)]
    for inside, plain in zip(code[::2], code[1::2]):
        parts += [f"\\texttt{{{latex_text(inside)}}}".replace("/", "/\\allowbreak "), latex_text(plain)]
    return "".join(parts)


def update_readme(path: Path, sections: Iterable[Section], lead: str) -> None:
    """Write `lead` and sections between the marks in the file; InputError if it has not both, once each."""
    parts = [_wrap(lead)]
    for section in sections:
        parts += [f"{section.title}:\n", *(p if p.startswith("|") else _wrap(p) for p in markdown_parts(section))]
    write_between(path, BEGIN, END, "\n".join(parts))


def write_between(path: Path, begin: str, end: str, content: str) -> None:
    """Put `content` between two marks of a file, in place of what is there; InputError unless both are there once."""
    text = read_text(path, "a text with marks for results")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{path}: got no place for results, expected the lines {begin!r} and {end!r}, once each")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    write_atomically(path, f"{before}{begin}\n\n{content}\n{end}{after}")


def _wrap(text: str) -> str:
    return textwrap.fill(text, README_WIDTH, break_long_words=False) + "\n"
