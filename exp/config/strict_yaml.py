"""YAML text -> typed values, strictly: what is unknown, double or of a wrong type fails with file and key."""

import dataclasses
import difflib
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from exp.files.text import read_text
from exp.runtime.errors import InputError

MAX_YAML = 2**18  # bytes; a data YAML of 255 classes with names, colours and a label map has some 20 kB
MAX_FLOAT = 1e300  # no number of a config is near it
MAX_INT = 2**63
T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases, and reads scalars as YAML 1.2 does."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):  # a few lines of aliases of aliases stand for billions of values
            raise InputError(f"got the alias '*{self.peek_event().anchor}', expected every value written out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            raise InputError(f"key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
        return mapping


# PyYAML follows YAML 1.1, in which 6e-5 is text, 010 eight, 1:30 ninety and yes true; here the rules of 1.2 hold.
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
        "-+0123456789.",
    ),
}
_StrictLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in _SCALARS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _firsts) in _SCALARS.items():
    _StrictLoader.add_implicit_resolver(_tag, re.compile(_pattern), list(_firsts))


def parse_value(text: str, where: str) -> Any:
    """YAML text of one value -> the value; `where` opens the message of an InputError."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    # PyYAML raises the last three on values that are not what their own tag says, such as !!bool maybe
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: {problem}, expected plain YAML") from None


def show(value: Any) -> str:
    """A value as messages have it: never more than a line or two, whatever is nested in what."""
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxdict = 12
    short.maxstring = short.maxother = short.maxlong = 120
    short.maxlevel = 3
    try:
        return short.repr(value)
    except ValueError:  # Python writes out no number of more than 4,300 digits
        return "a number of thousands of digits"


def load_mapping(path: Path) -> dict[str, Any]:
    """A YAML file -> its top-level mapping."""
    mapping = parse_value(read_text(path, "a YAML file", MAX_YAML), str(path))
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise InputError(f"{path}: got {type(mapping).__name__}, expected keys with values")
    return mapping


def build_dataclass(cls: type[T], values: Mapping[str, Any], path: Path, origins: Mapping[str, str]) -> T:
    """A mapping -> a frozen dataclass, every key known and every value of the annotated type.

    origins: by key, where the value comes from if not from the file at `path`, for the message.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    typed = {}
    for key, value in values.items():
        if key not in fields:
            raise InputError(f"{path}: unknown key '{key[:120]}'{closest(key[:120], fields)}")
        try:
            typed[key] = convert(value, hints[key])
        except TypeError:
            where = origins.get(key, path)
            got = f"{show(value)} ({type(value).__name__})"
            raise InputError(f"{where}: key '{key}': got {got}, expected {describe(hints[key])}") from None
    missing = [name for name, field in fields.items() if name not in typed and field.default is dataclasses.MISSING]
    if missing:
        raise InputError(f"{path}: missing key '{missing[0]}', expected {describe(hints[missing[0]])}")
    try:
        return cls(**typed)
    except InputError as error:
        key = str(error).partition("'")[2].partition("'")[0]
        raise InputError(f"{origins.get(key, path)}: {error}") from None


def convert(value: Any, hint: Any) -> Any:
    """A YAML value -> the same as the annotated type (lists become tuples, whole numbers floats), or TypeError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
    elif origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return convert(value, choice)
            except TypeError:
                continue
    elif origin is tuple:
        if isinstance(value, list) and ((args[-1] is Ellipsis and value) or len(value) == len(args)):
            return tuple(convert(v, args[0] if args[-1] is Ellipsis else a) for v, a in zip(value, args * len(value)))
    elif origin is dict:
        if isinstance(value, dict):
            return {convert(k, args[0]): convert(v, args[1]) for k, v in value.items()}
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MAX_FLOAT:
            return float(value)
    elif type(value) is hint and not (hint is int and abs(value) >= MAX_INT):
        return value
    raise TypeError


def describe(hint: Any) -> str:
    """An annotation in the words of a YAML's author."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        return f"a list of {describe(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(describe(a) for a in args)}]"
    if origin is dict:
        return f"{{{describe(args[0])}: {describe(args[1])}, ...}}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names[hint]


def closest(name: str, choices: Iterable[str]) -> str:
    """The tail of a message on an unknown name: the nearest one, if any, and the choices."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    return f"{guess}; known: {', '.join(choices)}"
