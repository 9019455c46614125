"""MATLAB files (version 5), walked through before scipy reads them: on damaged ones it can crash the process."""

import math
import struct
import zlib

# Types of data elements, and classes of matrices.
FLAGS, SIDES, NAME, MATRIX, PACKED = 6, 5, 1, 14, 15
NUMBERS = {1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18}
CELLS, STRUCTURE, SPARSE = 1, 2, 5  # the last has fewer values than its dimensions say
CLASSES = {CELLS, 4, SPARSE, *range(6, 16)}
Element = tuple[int, memoryview]
MAX_UNPACKED = 2**26  # bytes; SBD's labels have half a MB
MAX_DEPTH = 16  # of structures in structures; SBD's have three


def check_mat(data: bytes) -> None:
    """ValueError unless every element of the file is of a known type and lies within the one around it."""
    if len(data) < 128 or data[126:128] != b"IM":
        raise ValueError("no MATLAB file of version 5 with little-endian numbers")
    _check_elements(memoryview(data)[128:], 0)


def _check_elements(data: memoryview, depth: int) -> list[Element]:
    """The elements in a piece of a file, each checked."""
    if depth > MAX_DEPTH:
        raise ValueError("structures within structures")
    place, found = 0, []
    while place < len(data):
        if len(data) - place < 8:
            raise ValueError("an element without its head")
        kind, size = struct.unpack_from("<II", data, place)
        start = place + 8
        if kind >> 16:  # up to four bytes stand in the head itself
            kind, size, start = kind & 0xFFFF, kind >> 16, place + 4
        if kind not in {*NUMBERS, MATRIX, PACKED} or (start == place + 4 and size > 4) or start + size > len(data):
            raise ValueError(f"an element of type {kind} and {size} bytes")
        body = data[start : start + size]
        found.append((kind, body))
        if kind == PACKED:
            if depth:
                raise ValueError("a packed element within another")
            _check_elements(_unpack(body), depth + 1)
        elif kind == MATRIX:
            _check_matrix(_check_elements(body, depth + 1))
        end = start + size
        place = place + 8 if start == place + 4 else end if kind == PACKED else end + -end % 8
    return found


def _unpack(body: memoryview) -> memoryview:
    """What a packed element holds; ValueError for more than a label has."""
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(body, MAX_UNPACKED)
    if unpacker.unconsumed_tail:
        raise ValueError(f"an element of more than {MAX_UNPACKED} bytes")
    return memoryview(content)


def _check_matrix(found: list[Element]) -> None:
    """ValueError for parts that are no matrix: its flags, dimensions, name, and then values, or matrices."""
    if not found:  # an empty one
        return
    kinds = [kind for kind, _ in found]
    if kinds[:3] != [FLAGS, SIDES, NAME] or len(found[0][1]) != 8 or len(found[1][1]) < 8 or len(found[1][1]) % 4:
        raise ValueError("a matrix without flags, dimensions and name")
    matrix_class, values = found[0][1][0], kinds[3:]
    if matrix_class == STRUCTURE and values[:2] == [SIDES, NAME]:
        fits = set(values[2:]) <= {MATRIX}
    else:
        fits = matrix_class in CLASSES and set(values) <= ({MATRIX} if matrix_class == CELLS else NUMBERS)
    if not fits:
        raise ValueError(f"a matrix of class {matrix_class} with elements of the types {values[:8]}")
    count = math.prod(side[0] for side in struct.iter_unpack("<I", found[1][1]))
    held = len(values) if matrix_class in (CELLS, STRUCTURE) else sum(len(body) for _, body in found[3:])
    if matrix_class != SPARSE and count > held:
        raise ValueError(f"a matrix of {count} values with {held}")
