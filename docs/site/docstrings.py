"""Docstrings as written here -> Markdown: a line `name: text` describes a parameter and becomes a list item."""

import re

import griffe

ITEM = re.compile(r"^(\w+(?:, \w+)*): (.*(?:\n    .*)*)", re.MULTILINE)
LISTS = re.compile(rf"(?:{ITEM.pattern}\n?)+", re.MULTILINE)


def to_markdown(text: str) -> str:
    def to_list(match: re.Match[str]) -> str:
        items = ITEM.findall(match[0])
        return "\n" + "".join(f"- **`{names}`** {text}\n" for names, text in items) + "\n"

    return LISTS.sub(to_list, text)


class Parameters(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: object) -> None:
        func.overloads = None  # for type checkers; a reader sees the one signature
        if func.docstring:
            func.docstring.value = to_markdown(func.docstring.value)
