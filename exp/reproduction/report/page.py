"""Sections as one self-contained HTML page: no script, nothing from elsewhere, everything from files escaped."""

import base64
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from exp.reproduction.report.illustrations import Picture, illustrate
from exp.reproduction.report.sections import Cell, Section

STYLES = Path(__file__).with_name("page.css")
TITLE = "RankSEG-RMA: published and measured"


def html(sections: Sequence[Section], lead: str) -> str:
    """Everything as one page, with plots and pictures."""
    contents, body = [], []
    for group, members in groupby(sections, key=lambda section: section.group):
        members = list(members)
        links = "".join(f'<li><a href="#{section.key}">{escape(section.title)}</a></li>' for section in members)
        contents.append(f"<li>{escape(group)}<ul>{links}</ul></li>")
        body.append(f"<h2>{escape(group)}</h2>{''.join(map(_section, members))}")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{TITLE}</title><style>{STYLES.read_text(encoding='utf-8')}</style></head>"
        f"<body><header><h1>{TITLE}</h1><p>{escape(lead)}</p></header>"
        f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav><main>{"".join(body)}</main></body></html>\n'
    )


def _section(section: Section) -> str:
    parts = [f"<p>{_prose(section.lead)}</p>"] if section.lead else []
    parts += [_table(section)] if section.rows else []
    if section.footnotes:
        parts.append(f"<ol>{''.join(f'<li>{_prose(text)}</li>' for text in section.footnotes)}</ol>")
    parts += [f"<p>{_prose(note)}</p>" for note in section.notes]
    pictures = illustrate(section.source) if section.source else ()
    for place, members in groupby(pictures, key=lambda picture: picture.place):
        parts.append(f'<div class="{place}">{"".join(map(_figure, members))}</div>')
    return f'<section id="{section.key}"><h3>{escape(section.title)}</h3>{"".join(parts)}</section>'


def _table(section: Section) -> str:
    kinds = zip(section.flush_right, section.wide)
    classes = [' class="number"' if right else ' class="text"' if wide else "" for right, wide in kinds]
    head = "".join(f'<th scope="col"{style}>{escape(name)}</th>' for name, style in zip(section.header, classes))
    body = "".join(
        "<tr>" + "".join(f"<td{style}>{_cell(cell)}</td>" for cell, style in zip(row, classes)) + "</tr>"
        for row in section.rows
    )
    return f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    return escape(cell.text) + (f"<sup>{', '.join(map(str, cell.marks))}</sup>" if cell.marks else "")


def _prose(text: str) -> str:
    """Text in which what stands between backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _figure(picture: Picture) -> str:
    encoded = base64.b64encode(picture.data).decode()
    image = f'<img src="data:image/{picture.kind};base64,{encoded}" alt="{escape(picture.caption)}">'
    return f"<figure>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"
