"""Numbers, tables and escapes as the report's files want them."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
NOTHING = "–"  # noqa: RUF001
LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$"}  # fmt: skip # noqa: RUF001


def format_number(value: float | None, signed: bool = False) -> str:
    """Two decimals; what would be zero then, such as a p-value, with its exponent."""
    if value is None:
        return NOTHING
    if 0 < abs(value) < 0.005:
        return f"{value:.2e}"
    return f"{value:{'+' if signed else ''}.2f}"


def format_interval(interval: tuple[float, float] | None) -> str:
    return NOTHING if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def format_gain(value: float | None, interval: tuple[float, float] | None) -> str:
    """A difference in percent points, two decimals, and its interval."""
    return NOTHING if value is None else f"{value:+.2f} {format_interval(interval)}"


def markdown_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns of numbers alone are flush right."""
    columns = zip(*rows) if rows else [()] * len(header)
    marks = ["---:" if column and all(map(NUMBER.fullmatch, column)) else "---" for column in columns]
    return "\n".join([markdown_line(header), markdown_line(marks), *map(markdown_line, rows)]) + "\n"


def latex_text(text: str) -> str:
    """Text for LaTeX; the sign of a negative number is a minus, not a hyphen."""
    escaped = "".join(LATEX.get(character, character) for character in text)
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)


def latex_table(title: str, label: str, columns: str, header: Sequence[str], rows: Iterable[str]) -> list[str]:
    """Lines of a table that may break over pages. columns: as LaTeX has them; rows: escaped, their cells joined."""
    head = " & ".join(map(latex_text, header)) + " \\\\"
    lines = [f"\\begin{{longtable}}{{{columns}}}", f"\\caption{{{latex_text(title)}}}", f"\\label{{tab:{label}}} \\\\"]
    lines += ["\\toprule", head, "\\midrule", "\\endhead", "\\bottomrule", "\\endfoot"]
    return [*lines, *(f"{row} \\\\" for row in rows), "\\end{longtable}"]
