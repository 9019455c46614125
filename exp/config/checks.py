"""Checks of a YAML's values: InputError with the key, what was got and what was expected."""

from collections.abc import Mapping

from exp.config.families import Entry
from exp.config.strict_yaml import closest, show
from exp.files.paths import leads_out
from exp.runtime.errors import InputError

MAX_CROP = 16384  # pixels along a side; the largest images that are read have 9459 x 9459 (exp/files/images.py)
MAX_SCALE = 100
MAX_WIDTH = 2**14  # channels; the widest layer of the encoders has some 4,000
MAX_BATCH = 2**16  # images, or windows
MAX_WORKERS = 1024  # processes
MAX_COUNT = 10**9  # iterations, epochs


def require(condition: bool, key: str, got: object, expected: str) -> None:
    if not condition:
        raise InputError(f"key '{key}': got {show(got)}, expected {expected}")


def require_positive(config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        require(value is None or all(v > 0 for v in numbers), key, value, "a value above 0")


def require_at_most(config: object, most: int, *keys: str) -> None:
    """InputError for numbers that no experiment has, and that would take the machine's memory or processes."""
    for key in keys:
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        require(value is None or all(v <= most for v in numbers), key, value, f"{most} at most")


def require_inside(config: object, *keys: str) -> None:
    """InputError for a folder or file whose name leads out of data_dir."""
    for key in keys:
        value = getattr(config, key)
        if value is not None:
            require(not leads_out(value), key, value, "a name that stays below data_dir")


def require_entry(config: object, family: str, table: Mapping[str, Entry]) -> None:
    """InputError unless the table has the name under the key `family`, and the config the keys that it takes alone."""
    name = getattr(config, family)
    require(name in table, family, name, f"a known name{closest(name, table)}")
    entry = table[name]
    for key in sorted({key for other in table.values() for key in other.keys}):
        value = getattr(config, key)
        if key not in entry.keys:
            require(value is None, key, value, f"no such key with the {family} {name}")
        elif key in entry.needs:
            require(value is not None, key, value, f"a value: the {family} {name} reads it")
