"""Sections as one self-contained HTML page: no script, nothing from elsewhere, everything from files escaped."""

import base64
import re
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from exp.reproduction.report.pictures.illustrations import Picture, illustrate
from exp.reproduction.report.sections import Cell, Section

STYLES = Path(__file__).with_name("page.css")
TITLE = "RankSEG-RMA: published and measured"


def html(sections: Sequence[Section], lead: str, title: str = TITLE) -> str:
    """Everything as one page, with plots and pictures."""
    contents, body = [], []
    for group, members in groupby(sections, key=lambda section: section.group):
        members = list(members)
        links = "".join(map(_links, members))
        contents.append(f"<li>{escape(group)}<ul>{links}</ul></li>")
        body.append(f"<h2>{escape(group)}</h2>{''.join(map(_section, members))}")
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLES.read_text(encoding='utf-8')}</style></head>"
        f"<body><header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>"
        f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav><main>{"".join(body)}</main></body></html>\n'
    )


def _links(section: Section) -> str:
    """The entry of a section in the contents, and those of its details."""
    inner = "".join(map(_links, section.details))
    entry = f'<a href="#{section.key}">{escape(section.title)}</a>{f"<ul>{inner}</ul>" if inner else ""}'
    return f"<li>{entry}</li>"


def _section(section: Section) -> str:
    pictures = []
    for place, members in groupby(illustrate(section.source) if section.source else (), key=lambda p: p.place):
        figures = "".join(_figure(picture, section.key) for picture in members)
        pictures.append(f'<div class="{place}">{figures}</div>')
    details = [f'<article id="{d.key}"><h4>{escape(d.title)}</h4>{_content(d)}</article>' for d in section.details]
    parts = "".join([_content(section), *details, *pictures])
    return f'<section id="{section.key}"><h3>{escape(section.title)}</h3>{parts}</section>'


def _content(section: Section) -> str:
    """Texts and table."""
    parts = [f"<p>{_prose(section.lead)}</p>"] if section.lead else []
    parts += [_table(section)] if section.rows else []
    if section.footnotes:
        parts.append(f"<ol>{''.join(f'<li>{_prose(text)}</li>' for text in section.footnotes)}</ol>")
    return "".join([*parts, *(f"<p>{_prose(note)}</p>" for note in section.notes)])


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
    text = escape(cell.text)
    text = f'<span class="{cell.tone}">{text}</span>' if cell.tone else text
    text = f'<a href="#{cell.link}">{text}</a>' if cell.link else text
    return text + (f"<sup>{', '.join(map(str, cell.marks))}</sup>" if cell.marks else "")


def _prose(text: str) -> str:
    """Text in which what stands between backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _figure(picture: Picture, key: str) -> str:
    """key: of its section."""
    own = f' id="{key}-{picture.key}"' if picture.key else ""
    encoded = base64.b64encode(picture.data).decode()
    image = f'<img src="data:image/{picture.kind};base64,{encoded}" alt="{escape(picture.caption)}">'
    return f"<figure{own}>{image}<figcaption>{escape(picture.caption)}</figcaption></figure>"
