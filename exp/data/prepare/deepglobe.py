"""DeepGlobe's masks in colours -> labels of class indices, beside them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from exp.config.data import IGNORE_INDEX
from exp.data.prepare.jobs import report_faults, run_jobs, worker_pool
from exp.files.atomic import remove_stale, replacing, require_room
from exp.files.images import open_image
from exp.files.paths import visible_files
from exp.runtime.errors import InputError

MASK, LABEL = "_mask.png", "_label.png"
BYTES_PER_LABEL = 2**16  # of 2448 x 2448 pixels as a PNG, most of them less
THRESHOLD = 128  # the owners': masks are not pure black and white everywhere

Colour = tuple[int, int, int]


def prepare_masks(folder: Path, palette: Sequence[Colour], workers: int) -> None:
    """Write <name>_label.png for every <name>_mask.png of the folder.

    palette: the colour of each class; black, where it is no class's, becomes 255. A label that is there already must
    say the same and is kept; InputError if it does not.
    """
    masks = visible_files(folder, f"*{MASK}")
    waiting = sum(not label_of(mask).exists() for mask in masks)
    print(f"{folder}: {len(masks)} masks, {len(masks) - waiting} with a label before (compared, not changed)")
    require_room(folder, waiting * BYTES_PER_LABEL)
    remove_stale(folder)
    with worker_pool(workers) as pool:
        _, faults = run_jobs(partial(write_label, colour_table(palette)), masks, pool, "labels", "label")
    report_faults(faults, "labels")


def label_of(mask: Path) -> Path:
    return mask.with_name(mask.name.removesuffix(MASK) + LABEL)


def colour_table(palette: Sequence[Colour]) -> np.ndarray:
    """Colours of 0 and 255 -> (8,) int16: which channels are bright, as bits -> class, 255 for black, or -1."""
    table = np.full(8, -1, np.int16)
    table[0] = IGNORE_INDEX
    for label, colour in enumerate(palette):
        table[sum((value >= THRESHOLD) << bit for bit, value in enumerate(colour))] = label
    return table


def write_label(table: np.ndarray, mask: Path) -> None:
    """Write the label of a mask, or compare it with the one there."""
    with open_image(mask) as image:
        bright = np.asarray(image.convert("RGB")) >= THRESHOLD
    values = table[(bright << np.arange(3)).sum(-1)]
    if (values < 0).any():
        raise InputError(f"{mask}: got a colour that is no class's, expected those of the data set")
    target, values = label_of(mask), values.astype(np.uint8)
    if target.exists():
        with open_image(target) as image:
            there = np.asarray(image)
        unknown = there == table[table < IGNORE_INDEX].max() + 1  # how the paper's code writes it
        if not np.array_equal(np.where(unknown, IGNORE_INDEX, there), values):
            raise InputError(f"{target}: got another label than that of {mask}; it is left as it is")
        return
    with replacing(target, durable=False, new=True) as temporary:
        Image.fromarray(values).save(temporary, format="PNG")
