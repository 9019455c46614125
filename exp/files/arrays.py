"""numpy's .npz archives -> arrays, without unpickling, and without memory for more than the file holds.

What damaged files raise is manifold: to be called inside `decoding`.
"""

import math
import zipfile

import numpy as np

FREE_BYTES = 2**30  # an array of an archive may have that many however it is packed
MAX_RATIO = 200  # by which a larger one may be packed: softmax maps come to 10 or so, a bomb to the 1,032 of deflate
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an .npz archive; no memory is taken for its data before its size is known to be right."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > max(FREE_BYTES, MAX_RATIO * info.compress_size):
        raise ValueError(f"'{name}' of {info.file_size} bytes packed into {info.compress_size}")
    with archive.open(info) as file:
        shape, _, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        size = info.file_size - file.tell()
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{size} bytes of data for '{name}' of {dtype} and shape {shape}")
    with archive.open(info) as file:
        values = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # the end, where the checksum is compared
    return values
