"""Evaluate decision rules on probability maps that another program wrote, beside label files. No network is needed.

    python scripts/evaluate_probabilities.py MAPS LABELS --predict_yaml argmax rankseg_rma --output_dir evaluated
    python scripts/evaluate_probabilities.py nnUNet_results/.../validation labelsTr --unit case --output_dir evaluated
    python scripts/evaluate_probabilities.py LOGITS LABELS --logits --input_size 513 513 --align_corners \\
        --temperature 1.2 --output_dir evaluated
    python scripts/evaluate_probabilities.py nnUNet_results/.../validation labelsTr --unit case --multilabel \\
        --regions 1,2,3 2,3 3 --classes whole core enhancing --output_dir evaluated
    python scripts/evaluate_probabilities.py pascal_voc/ --predict_yaml argmax rankseg_rma --output_dir evaluated
    python scripts/evaluate_probabilities.py --true_of shapes_noisy_binary --set data.label_noise=0.2 \\
        --predict_yaml argmax rankseg_rma rankseg_exact --output_dir true

MAPS holds .npy or .npz files of (C, H, W) or (C, D, H, W) floats that sum to 1 over the C classes, LABELS a file of the
same name for each: an index image (.png, .tif), array (.npy) or volume (.nii, .nii.gz). Values 0..C-1 are classes, 255
(and --ignore_label) does not count. PNGs with a palette are read as its indices. One map is in memory at a time, and
nothing is unpickled. --names takes those files alone that a list names, VOC's val.txt for one.

nnU-Net writes its maps with --save_probabilities (v2; --save_npz in v1) beside its segmentations. Their axes are
(C, z, y, x), those of the NIfTI labels x, y, z: whether the labels have to be reversed is read off the shapes, and
where both ways fit, --label_axes reversed says it. Labels must be in the orientation in which nnU-Net read the images
(only its reader NibabelIOWithReorient turns them). The maps of region-based models do not sum to 1: they are for
--multilabel.

--logits takes logits instead: floats, or whole numbers with a scale (logits = stored x scale + offset). Those of images
are resized to the label's size, bilinearly; with --input_size first to the size of the network's input, of which
--inside is the upper left part that the image fills (a letterbox). Then they are divided by the temperature, and a
softmax follows. An .npz file may hold, beside its `logits`, arrays `scale`, `offset`, `input_size`, `inside` and
`align_corners`; these count before the flags.

--multilabel takes classes that overlap: each map of (C, ...) has a probability of its own (or logits, of which the
sigmoid is taken), and each class is decided and scored as a foreground alone, as data sets of two classes are. Labels
are .npy masks of (C, ...) zeros and ones or, with --regions, files of label values, of which each region has several.

MAPS without LABELS is a .parquet file, or a folder of them, each row with a map in `probs` and its labels in `label`
(the bytes of an .npy file, or nested lists), as the paper's authors host theirs. A column `case_id` makes rows slices
of volumes. Row groups are read one after the other; that needs pyarrow (pip install pyarrow).

--true_of DATA_YAML takes the probabilities from which a synthetic data set draws its labels, in place of MAPS. They are
those given the scene: the image and its labels before the noise. A network sees the image alone, in which an object's
edge is blurred and colours overlap, so what a rule reaches here bounds what it reaches there. With two classes
`rankseg_exact` and `rankseg_exact_iou` are the Bayes decisions for the image's Dice and IoU. With several classes that
exclude each other no rule here is the Bayes decision for mDiceI or mIoUI (argmax is, for the accuracy).

Written to --output_dir: results/ as an evaluation by exp/main.py writes it (<rule>.json, <rule>.csv with a row per
unit, comparison.json, calibration.json); with --multilabel results/<class>/, and results/classes.json, each rule's
means over the classes. timing.json has the milliseconds that each rule takes per unit. A unit is an image; of a volume
each slice, averaged within the volume first (--unit slice), or the whole volume (--unit case). With --true_of each JSON
says `"probabilities": "true"`. `scripts/report.py DIR` makes a page of the results, but not of those of --multilabel.
Rules are compared by mIoUI, as exp/main.py does, unless --metric says otherwise.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_overrides, add_rules, build_script_parser, check_folder
from exp.config.data import DataConfig
from exp.config.evaluation import PredictConfig
from exp.config.experiment import load_groups
from exp.runtime.commands import page_command
from exp.runtime.errors import InputError, run_and_report

DECODING = ("scale", "offset", "input_size", "inside", "align_corners", "temperature")  # flags of --logits

OF_FILES = ("names", "key", "logits", "regions")  # flags of MAPS with LABELS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if (args.prob_dir is None) != bool(args.true_of) or (args.label_dir and args.true_of):
        raise InputError("MAPS LABELS: expected both folders, or --true_of DATA_YAML in their place")
    if args.prob_dir and not args.label_dir and (given := [name for name in OF_FILES if getattr(args, name)]):
        raise InputError(
            f"--{given[0]}: expected together with LABELS, not with {args.prob_dir} alone (.parquet files)"
        )
    if not 0 <= args.ignore_label <= 255:
        raise InputError(f"--ignore_label: got {args.ignore_label}, expected a value in 0..255")
    check_decoding(args)
    if not 0 <= args.tolerance < 1:
        raise InputError(f"--tolerance: got {args.tolerance}, expected a value in [0, 1)")
    check_folder("--output_dir", args.output_dir)
    return args


def check_decoding(args: argparse.Namespace) -> None:
    given = [name for name in DECODING if getattr(args, name) is not None and getattr(args, name) is not False]
    if given and not args.logits:
        raise InputError(f"--{given[0]}: expected together with --logits")
    if args.regions and not args.multilabel:
        raise InputError("--regions: expected together with --multilabel")
    if args.true_of and (args.logits or args.multilabel or args.names):
        raise InputError("--true_of: expected without --logits, --multilabel and --names")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise InputError(f"--temperature: got {args.temperature}, expected a number above 0")
    if args.scale is not None and not (math.isfinite(args.scale) and args.scale):
        raise InputError(f"--scale: got {args.scale}, expected a number other than 0")
    for name in ("input_size", "inside"):
        if min(getattr(args, name) or [1]) < 1:
            raise InputError(f"--{name}: got {getattr(args, name)}, expected a height and a width of 1 or more")


def region(text: str) -> tuple[int, ...]:
    """'1,2,3' -> the label values of a region."""
    values = tuple(int(part) for part in text.split(","))
    if not all(0 < value < 255 for value in values):
        raise ValueError(text)
    return values


def build_parser() -> argparse.ArgumentParser:
    parser = build_script_parser(__doc__)
    add = parser.add_argument
    add("prob_dir", type=Path, nargs="?", metavar="MAPS", help="folder of .npy and .npz probability maps, or .parquet")
    add("label_dir", type=Path, nargs="?", metavar="LABELS", help="folder of label files of the same names")
    add("--true_of", metavar="DATA_YAML", help="a data set whose probabilities are known, in place of MAPS LABELS")
    add_rules(parser, ["argmax", "rankseg_rma"])
    add_overrides(parser)
    add("--output_dir", type=Path, required=True, metavar="DIR")
    add("--unit", choices=("slice", "case"), default="slice", help="what is decided and scored at a time in a volume")
    add("--slice_axis", type=int, choices=(0, 1, 2), default=0, help="of D, H, W, where slices lie (default 0)")
    add("--label_axes", choices=("auto", "same", "reversed"), default="auto", help="beside those of the map")
    add("--key", metavar="NAME", help="the array of .npz files (default: probabilities, softmax, or the only one)")
    add(
        "--names",
        type=Path,
        metavar="FILE",
        help="a list, one name a line: the files that are evaluated (default: all)",
    )
    add("--logits", action="store_true", help="MAPS holds logits")
    add("--scale", type=float, metavar="X", help="of logits that are stored as whole numbers")
    add("--offset", type=float, metavar="X", help="logits = stored x scale + offset")
    add(
        "--input_size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="to which logits are resized before the label's size",
    )
    add("--inside", type=int, nargs=2, metavar=("H", "W"), help="the upper left part of it that the image fills")
    add("--align_corners", action="store_true", help="of the first resizing of the logits")
    add("--temperature", type=float, metavar="T", help="divides the logits (default 1)")
    add("--multilabel", action="store_true", help="classes overlap: one binary decision per class")
    add("--regions", type=region, nargs="+", metavar="V,V", help="with --multilabel: the label values in each class")
    add("--ignore_label", type=int, default=255, metavar="N", help="a label value that does not count, besides 255")
    add("--tolerance", type=float, default=2e-3, help="how far a pixel's sum may be off from 1 (default 0.002)")
    add("--classes", nargs="+", metavar="NAME", help="names of the classes for the tables (default: 0 1 2 ...)")
    add("--metric", choices=("mIoUI", "mDiceI", "mAccI"), default="mIoUI", help="by which the rules are compared")
    return parser


def main() -> None:
    args = parse_args()
    true = {"data": [args.true_of]} if args.true_of else {}
    configs = load_groups({**true, "predict": args.predict_yaml}, args.overrides)
    units, classes, origin, config = open_true(args, configs["data"]) if args.true_of else open_files(args)
    from exp.files.atomic import write_atomically  # PyTorch comes in only now
    from exp.provenance import describe_code

    predict, code = configs["predict"], describe_code()
    contexts = [{**origin, **code, "config": {**config, "predict": asdict(c)}} for c in predict]
    times = evaluate(units, predict, classes, contexts, args)
    timing = {"decision_milliseconds_per_image": times}  # as timing.json of a run has it
    write_atomically(args.output_dir / "timing.json", json.dumps(timing, indent=2) + "\n")
    print("milliseconds per unit: " + ", ".join(f"{rule} {value:.2f}" for rule, value in times.items()))
    print(f"results: {args.output_dir / 'results'}")
    if not args.multilabel and "argmax" in times:  # the page sets rules beside it
        print(f"for a page: {page_command(args.output_dir)}")


def evaluate(
    units: Callable,
    predict: Sequence[PredictConfig],
    classes: Sequence[str],
    contexts: Sequence[dict],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Units under every rule -> results/, for classes that overlap results/<class>/, and the tables; each rule's
    milliseconds per unit."""
    from exp.evaluation import probability_maps as maps
    from exp.evaluation.results import report_results
    from exp.rules.registry import build_rule

    names = (
        classes if (args.classes or args.true_of) and not args.multilabel else None
    )  # numbers of classes are no names
    rules = {c.name: build_rule(c, 2 if args.multilabel else len(classes), names) for c in predict}
    root = args.output_dir / "results"
    if args.multilabel:
        check_overlapping(rules)
        by_class, times = maps.evaluate_overlapping(units, rules, classes)
        found = {root / name: evaluation for name, evaluation in by_class.items()}
    else:
        evaluation, times = maps.evaluate_maps(units, rules, classes)
        found = {root: evaluation}
    for folder, evaluation in found.items():
        text = report_results(
            evaluation.results, folder, contexts, metric=args.metric, calibration=evaluation.calibration
        )
        print(f"{folder.name}\n{text}" if args.multilabel else text)
    if args.multilabel:
        save_means(root / "classes.json", rules, by_class, args.metric)
    return times


def check_overlapping(rules: dict) -> None:
    from exp.rules.pooled import PooledRule

    if pooled := [name for name, rule in rules.items() if isinstance(rule, PooledRule)]:
        raise InputError(f"--predict_yaml {pooled[0]}: expected a rule that decides unit by unit with --multilabel")


def save_means(path: Path, rules: Iterable[str], by_class: dict, metric: str) -> None:
    """Evaluations by class -> each rule's mean scores over the classes, written and printed."""
    from exp.evaluation.metrics import average_folds
    from exp.evaluation.results import finite_or_null, format_scores
    from exp.files.atomic import write_atomically

    of_rules = zip(*([result.scores() for result in evaluation.results] for evaluation in by_class.values()))
    means = dict(zip(rules, map(average_folds, of_rules)))
    print(f"mean over {len(by_class)} classes\n{format_scores(list(means), list(means.values()), [metric[:-1]])}")
    content = {"classes": list(by_class), "metrics": {rule: finite_or_null(scores) for rule, scores in means.items()}}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def open_files(args: argparse.Namespace) -> tuple[Callable, Sequence[str], dict, dict]:
    """MAPS and LABELS -> what reads their units, the classes, and what results say of their origin and config."""
    from exp.evaluation.probability_maps import Decoding, MapReader, list_parquet, pair_files, read_rows, read_units
    from exp.files.paths import leads_out, read_names

    decoding = None
    if args.logits:
        sizes = {name: tuple(getattr(args, name)) if getattr(args, name) else None for name in ("input_size", "inside")}
        decoding = Decoding(args.scale, args.offset, **sizes, align_corners=args.align_corners)
        decoding = decoding if args.temperature is None else replace(decoding, temperature=args.temperature)
    reader = MapReader(
        key=args.key,
        unit=args.unit,
        slice_axis=args.slice_axis,
        label_axes=args.label_axes,
        ignore_label=args.ignore_label,
        tolerance=args.tolerance,
        decoding=decoding,
        overlapping=args.multilabel,
        regions=tuple(args.regions) if args.regions else None,
    )
    if args.label_dir:
        files = pair_files(args.prob_dir, args.label_dir, read_names(args.names) if args.names else None)
        first, units = files[0][0], partial(read_units, files, reader)
        num_classes = reader.count_classes(first)
    else:
        files = list_parquet(args.prob_dir)
        first, units = files[0], partial(read_rows, files, reader)
        num_classes = len(next(units()).prob)
    classes = args.classes or [str(c) for c in range(num_classes)]
    for flag, given, what in (("classes", classes, "names"), ("regions", args.regions or classes, "regions")):
        if len(given) != num_classes:
            raise InputError(f"--{flag}: got {len(given)} {what}, expected {num_classes} as {first} has")
    if args.multilabel and (bad := [name for name in classes if leads_out(name) or "/" in name]):
        raise InputError(f"--classes: got '{bad[0]}', expected names of folders with --multilabel")
    label_dir = str(args.label_dir) if args.label_dir else None
    maps = {"prob_dir": str(args.prob_dir), "label_dir": label_dir, "files": len(files), **asdict(reader)}
    return units, classes, {"maps": maps, "metric": args.metric}, {}


def open_true(args: argparse.Namespace, data: DataConfig) -> tuple[Callable, Sequence[str], dict, dict]:
    """The same of a data set's own probabilities."""
    if data.label_noise is None:  # told before anything heavy is imported
        raise InputError(
            f"--true_of {args.true_of}: got the data set {data.dataset}, expected one whose true probabilities are "
            "known: shapes_noisy or shapes_noisy_binary"
        )
    if data.test_crop:
        raise InputError(f"data.test_crop: got {list(data.test_crop)}, expected null: whole images are evaluated")
    from exp.data.registry import build_dataset
    from exp.evaluation.probability_maps import true_units

    dataset = build_dataset(data, None, "val")
    origin = {"probabilities": "true", "metric": args.metric}
    return partial(true_units, dataset), dataset.classes, origin, {"data": asdict(data)}


if __name__ == "__main__":
    sys.exit(run_and_report(main))
