"""tables.yaml -> published values, each with what is known to be wrong about it in print."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from exp.config.strict_yaml import load_mapping

TABLES_FILE = Path(__file__).with_name("tables.yaml")


@dataclass(frozen=True)
class Erratum:
    """What is wrong in print. cells: of which table and, where not all are meant, rows, data, rules, columns.

    meant: the score or data set that these values are of, where that is another than the printed one.
    """

    cells: Mapping[str, Any]
    text: str
    evidence: str
    meant: Mapping[str, str] | None = None

    def concerns(self, table: str, row: str, data: str, rule: str, column: str) -> bool:
        place = {"rows": row, "data": data, "rules": rule, "columns": column}
        return self.cells["table"] == table and all(v in self.cells.get(key, [v]) for key, v in place.items())


@dataclass(frozen=True)
class PublishedValue:
    """One published number: `value` in the table's unit, None where none is printed."""

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
    values: tuple[PublishedValue, ...]
    setting: str | None = None


@cache
def _content() -> dict[str, Any]:
    return load_mapping(TABLES_FILE)


def load_errata() -> tuple[Erratum, ...]:
    """All errata, in their order."""
    return tuple(Erratum(**row) for row in _content()["errata"])


def load_tables() -> dict[str, Table]:
    """The published tables by name, in their order."""
    errata = load_errata()
    return {name: _build(name, table, errata) for name, table in _content().items() if name != "errata"}


def _build(name: str, content: Mapping[str, Any], errata: tuple[Erratum, ...]) -> Table:
    values = []
    for row, by_data in content["rows"].items():
        for data, by_rule in by_data.items():
            for rule, numbers in by_rule.items():
                for column, number in zip(content["columns"], numbers, strict=True):
                    place = (name, row, data, rule, column)
                    own = tuple(erratum for erratum in errata if erratum.concerns(*place))
                    values.append(PublishedValue(*place, number, own))
    return Table(name, content["title"], content["unit"], tuple(values), content.get("setting"))
