"""The page of scripts/check_gpu.py, results.md and docs/gpu.md: a section per part, merged part by part."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

INTRODUCTION = """# On a GPU

What `python scripts/check_gpu.py` found. Each part is that of the last run of it that was kept; `--keep` wrote it here.
"""
HEADER = "| part | what | outcome | seconds | run |\n| --- | --- | --- | ---: | --- |\n"


@dataclass
class Page:
    """rows: the line of the table by part. runs: when and on what, by date. sections: the text below each heading, also
    of those that were written by hand."""

    rows: dict[str, str]
    runs: dict[str, str]
    sections: dict[str, str]


def make_page(rows: list[dict[str, Any]], texts: dict[str, str], parts: Collection[str]) -> Page:
    """results.jsonl's rows -> the page of one run. texts: what each part is, by name; parts: those wanted."""
    start = next((row for row in rows if "machine" in row), {"machine": {}})
    facts = dict(start["machine"])
    date, page = facts.pop("date", "unknown"), Page({}, {}, {})
    page.runs[date] = f"- **{date}**: {'; '.join(f'{name} {value}' for name, value in facts.items())}\n"
    for outcome in (row for row in rows if "outcome" in row and row["part"] in parts):
        name = outcome["part"]
        words = start.get("networks") if name == "networks" else None
        title = f"{name}: {' '.join(words)}" if words else name
        page.rows[title] = f"| {title} | {texts[name]} | {outcome['outcome']} | {outcome['seconds']:.0f} | {date} |\n"
        page.sections[title] = f"\n{format_section([row for row in rows if row.get('part') == name], texts[name])}"
    return page


def format_section(rows: list[dict[str, Any]], text: str) -> str:
    """The rows of one part -> its sentences and tables."""
    lines = [f"{text[0].upper()}{text[1:]}."]
    said = [f"- **wrong**: {row['wrong']}" for row in rows if "wrong" in row]
    said += [f"- {row['note']}" for row in rows if "note" in row]
    lines += ["", *said] if said else []
    for table in dict.fromkeys(row["table"] for row in rows if "table" in row):
        values = [row["values"] for row in rows if row.get("table") == table]
        lines += ["", f"### {table}", "", *format_table(count_tests(values) if table == "Tests" else values)]
    return "\n".join(lines) + "\n"


def parse_page(text: str) -> Page:
    """What format_page wrote, also where a person changed it -> the page."""
    head, *rest = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    rows = {m[1]: f"{m[0]}\n" for m in re.finditer(r"^\| (?!part |---)(.+?) \|.*$", head, flags=re.MULTILINE)}
    runs = {m[1]: f"{m[0]}\n" for m in re.finditer(r"^- \*\*(.+?)\*\*.*$", head, flags=re.MULTILINE)}
    return Page(rows, runs, {title: body.rstrip("\n") + "\n" for title, body in zip(rest[::2], rest[1::2])})


def merge_pages(old: Page, new: Page) -> Page:
    """What `new` has replaces that of `old`; runs of which nothing is left are dropped."""
    rows, runs = old.rows | new.rows, old.runs | new.runs
    kept = {date: run for date, run in runs.items() if any(date in row for row in rows.values())}
    return Page(rows, kept, old.sections | new.sections)


def format_page(page: Page, order: Iterable[str]) -> str:
    """A page -> Markdown. order: of the parts; other sections come behind them."""
    place = {name: i for i, name in enumerate(order)}

    def key(title: str) -> int:
        return place.get(title.split(":")[0], len(place))

    rows, titles = sorted(page.rows, key=key), sorted(page.sections, key=key)
    head = [INTRODUCTION, "\n", HEADER, *(page.rows[title] for title in rows), "\nThe runs:\n\n", *page.runs.values()]
    return "".join(head + [f"\n## {title}\n{page.sections[title]}" for title in titles])


def count_tests(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per test -> a row per file with how many came out how; those that did not pass keep a row of their own."""
    counts: dict[str, dict[str, Any]] = {}
    for row in rows:
        file = row["test"].split("::")[0]
        of_file = counts.setdefault(file, {"test": file})
        of_file[row["outcome"]] = of_file.get(row["outcome"], 0) + 1
    others = [{"test": row["test"], row["outcome"]: 1} for row in rows if row["outcome"] in ("failed", "error")]
    return [*counts.values(), *others]


def format_table(rows: list[dict[str, Any]]) -> list[str]:
    """Rows -> a Markdown table; a column for every name that occurs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    number = {n: all(isinstance(row.get(n), (int, float, type(None))) for row in rows) for n in names}
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---:' if number[n] else '---' for n in names)} |"]
    return lines + [f"| {' | '.join(format_value(row.get(n)) for n in names)} |" for row in rows]


def format_value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")
