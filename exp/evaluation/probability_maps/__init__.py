"""Maps of another program, or of a synthetic data set, and labels -> results, one map at a time: files, reader, logits,
parquet, evaluate.

Maps are .npy files or .npz archives of (C, H, W) or (C, D, H, W) probabilities that sum to 1 over the classes (those of
--save_prob, nnU-Net's --save_probabilities, v2: key `probabilities`, and --save_npz, v1: key `softmax`, among them), of
logits, or of probabilities of classes that overlap. Nothing is unpickled: nnU-Net's .pkl files stay unread, and an
array of Python objects is refused. Rows of .parquet files hold maps and labels together.
"""

from exp.evaluation.probability_maps.evaluate import evaluate_maps, evaluate_overlapping
from exp.evaluation.probability_maps.files import pair_files, read_array
from exp.evaluation.probability_maps.logits import Decoding
from exp.evaluation.probability_maps.parquet import list_parquet, read_rows
from exp.evaluation.probability_maps.reader import MapReader, read_units, true_units

__all__ = [
    "Decoding",
    "MapReader",
    "evaluate_maps",
    "evaluate_overlapping",
    "list_parquet",
    "pair_files",
    "read_array",
    "read_rows",
    "read_units",
    "true_units",
]
