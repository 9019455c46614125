"""Checks of a YAML's values: InputError with the key, what was got and what was expected."""

from collections.abc import Mapping

from exp.config.families import Entry
from exp.config.strict_yaml import closest, show
from exp.runtime.errors import InputError

MAX_CROP = 16384  # pixels along a side; the largest images that are read have 9459 x 9459 (exp/files/images.py)
MAX_AREA = 9459**2  # of a crop or window in pixels: as many as the largest image has, for it is padded to that
MAX_SCALE = 100
MAX_WIDTH = 2**14  # channels; the widest layer of the encoders has some 4,000


def require(condition: bool, key: str, got: object, expected: str) -> None:
    if not condition:
        raise InputError(f"key '{key}': got {show(got)}, expected {expected}")


def require_positive(config: object, *keys: str, most: int = 10**9) -> None:
    """InputError for numbers that are not above 0, or so large that they would take the machine's memory."""
    for key in keys:
        value = getattr(config, key)
        numbers = value if isinstance(value, tuple) else (value,)
        require(value is None or all(0 < v <= most for v in numbers), key, value, f"a value above 0, {most} at most")


def require_area(config: object, *keys: str) -> None:
    """InputError for crops and windows, (height, width) or None, that no image fills."""
    for key in keys:
        value = getattr(config, key)
        fits = value is None or value[0] * value[1] <= MAX_AREA
        require(fits, key, value, f"{MAX_AREA:,} pixels at most, the largest image that is read")


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
