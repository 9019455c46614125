"""tables.yaml -> published figures, each with what is known to be wrong about it in print."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exp.config.strict_yaml import load_mapping
from exp.runtime.errors import InputError

TABLES_FILE = Path(__file__).with_name("tables.yaml")
NOT_TABLES = ("unavailable", "errata")
CELL_KEYS = {"table", "rows", "data", "rules", "columns"}


@dataclass(frozen=True)
class Erratum:
    """What is wrong in print. cells: which figures, by table and, where not all are meant, rows, data, rules, columns.

    meant: the score or data set that the figure is of, where that is another than the printed one.
    """

    cells: Mapping[str, Any]
    text: str
    evidence: str
    meant: Mapping[str, str] | None = None

    def concerns(self, table: str, row: str, data: str, rule: str, column: str) -> bool:
        place = {"rows": row, "data": data, "rules": rule, "columns": column}
        chosen = all(value in self.cells.get(key, [value]) for key, value in place.items())
        return self.cells["table"] == table and chosen


@dataclass(frozen=True)
class Figure:
    """One published value: `value` in the table's unit, None where none is printed."""

    table: str
    row: str
    data: str
    rule: str
    column: str
    value: float | None
    errata: tuple[Erratum, ...]


@dataclass(frozen=True)
class Table:
    """A published table. setting: what the rows leave unsaid. unit: percent or seconds."""

    name: str
    title: str
    unit: str
    columns: tuple[str, ...]
    figures: tuple[Figure, ...]
    setting: str | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(figure.row for figure in self.figures))


@cache
def _content() -> dict[str, Any]:
    return load_mapping(TABLES_FILE)


def load_errata() -> tuple[Erratum, ...]:
    """All errata, in their order."""
    errata = tuple(Erratum(**row) for row in _content()["errata"])
    for erratum in errata:
        assert CELL_KEYS >= erratum.cells.keys() >= {"table"}
    return errata


def load_tables() -> dict[str, Table]:
    """The published tables by name, in their order."""
    content, errata = _content(), load_errata()
    return {name: _build(name, values, errata) for name, values in content.items() if name not in NOT_TABLES}


def load_unavailable() -> dict[str, str]:
    """Published rows that this framework has no counterpart of -> the reason."""
    return {entry["row"]: entry["reason"] for entry in _content()["unavailable"]}


def find_table(name: str) -> Table:
    tables = load_tables()
    if name not in tables:
        raise InputError(f"{name}: unknown table, expected one of {', '.join(tables)}")
    return tables[name]


def _build(name: str, content: Mapping[str, Any], errata: tuple[Erratum, ...]) -> Table:
    columns = tuple(content["columns"])
    figures = []
    for row, by_data in content["rows"].items():
        for data, by_rule in by_data.items():
            for rule, values in by_rule.items():
                for column, value in zip(columns, values, strict=True):
                    own = tuple(e for e in errata if e.concerns(name, row, data, rule, column))
                    figures.append(Figure(name, row, data, rule, column, value, own))
    return Table(name, content["title"], content["unit"], columns, tuple(figures), content.get("setting"))
