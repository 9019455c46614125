"""Rows of .parquet files -> units: a map in the column `probs`, its labels in `label`, as the authors host theirs.

In both a row has the bytes of an .npy file, or the values as nested lists. A column `case_id` says of which volume a
row is a slice. Row groups are read one after the other. Nothing is unpickled.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from exp.evaluation.probability_maps.files import EXPECTED
from exp.evaluation.probability_maps.reader import MapReader, Unit
from exp.files.paths import require_utf8, visible_files
from exp.files.text import MAX_FILE, require_file
from exp.runtime.errors import InputError, decoding

if TYPE_CHECKING:
    import pyarrow

SUFFIX = ".parquet"
PROBS, LABEL, CASE = "probs", "label", "case_id"  # columns


def list_parquet(path: Path) -> list[Path]:
    """A .parquet file, or a folder -> the .parquet files in it and its subfolders, by name; InputError for none."""
    files = [path] if path.suffix.lower() == SUFFIX else visible_files(path, f"**/*{SUFFIX}")
    if not files:
        raise InputError(f"{path}: got no file of {SUFFIX}, expected some, or a folder LABELS beside this one of maps")
    for file in files:
        require_utf8(file)
        require_file(file, f"a {SUFFIX} file", MAX_FILE)
    return files


def read_rows(files: Sequence[Path], reader: MapReader) -> Iterator[Unit]:
    """The units of all rows, in the order of files; a row group is in memory at a time, and one map beside it."""
    for path in tqdm(files, desc="reading maps", unit="file", leave=False, disable=None):
        number = -1
        for number, row in enumerate(_rows(path)):
            source = f"{path}, row {number}"
            with decoding(source, EXPECTED):
                prob, label = _to_array(row.column(PROBS)), _to_array(row.column(LABEL))
                case = str(row.column(CASE)[0].as_py()) if CASE in row.schema.names else None
            reader.check_map(source, prob)
            label = reader.check_label(source, label, prob.shape)
            yield from reader.split(f"{path.stem}/{number:05d}", source, prob, label, case)
            del prob, label
        if number < 0:
            raise InputError(f"{path}: got no row, expected one or more")


def _rows(path: Path) -> "Iterator[pyarrow.RecordBatch]":
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError(f"{path}: got no package pyarrow, expected it: pip install pyarrow") from None
    with decoding(path, f"a {SUFFIX} file"), pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        names = file.schema_arrow.names
        if missing := [name for name in (PROBS, LABEL) if name not in names]:
            raise InputError(f"{path}: got the columns {', '.join(names)[:200] or 'none'}, expected also {missing[0]}")
        columns = [name for name in (PROBS, LABEL, CASE) if name in names]
        for group in range(file.num_row_groups):
            yield from file.iter_batches(batch_size=1, row_groups=[group], columns=columns)


def _to_array(column: "pyarrow.Array") -> np.ndarray:
    """A column of one row -> its array; ValueError where it has none."""
    from pyarrow import types

    values: Any = getattr(column, "storage", column)  # of a type that another program registers
    if types.is_binary(values.type) or types.is_large_binary(values.type):
        array = np.load(io.BytesIO(values[0].as_py() or b""), allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("an archive")
        return array
    shape: list[int] = []
    while hasattr(values, "flatten") and types.is_nested(values.type):
        lengths = values.value_lengths().unique().to_pylist()
        if len(lengths) != 1 or lengths == [None]:
            raise ValueError(f"lists of {len(lengths)} lengths at one depth, or none")
        shape += lengths
        values = values.flatten()
    if not shape or values.null_count:
        raise ValueError(f"{column.type} without an array in it")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
