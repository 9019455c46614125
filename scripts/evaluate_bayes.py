"""Judge decision rules on the probabilities from which a synthetic data set draws its labels. No network is needed.

    python scripts/evaluate_bayes.py --data_yaml shapes_noisy --output_dir bayes
    python scripts/evaluate_bayes.py --data_yaml shapes_noisy_binary --set data.label_noise=0.2 \\
        --predict_yaml argmax rankseg_rma rankseg_exact --output_dir bayes_binary

These are the probabilities given the scene: the image and its labels before the noise. A network sees the image alone,
in which an object's edge is blurred and colours overlap, so what a rule reaches here bounds what it reaches there. With
two classes `rankseg_exact` and `rankseg_exact_iou` are the Bayes decisions for the image's Dice and IoU. With several
classes that exclude each other no rule here is the Bayes decision for mDiceI or mIoUI (argmax is, for the accuracy).

Written to --output_dir: results/ as an evaluation by exp/main.py writes it (<rule>.json, <rule>.csv with a row an
image, comparison.json, calibration.json); each JSON names the data under config and `"probabilities": "true"`.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_overrides, add_rules, build_script_parser, check_folder
from exp.config.experiment import load_groups
from exp.runtime.errors import InputError, run_and_report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_script_parser(__doc__)
    add = parser.add_argument
    add("--data_yaml", default="shapes_noisy", metavar="NAME", help="configs/data/NAME.yaml (default: shapes_noisy)")
    add_rules(parser, ["argmax", "rankseg_rma"])
    add_overrides(parser)
    add("--output_dir", type=Path, required=True, metavar="DIR")
    add("--metric", choices=("mIoUI", "mDiceI", "mAccI"), default="mDiceI", help="by which the rules are compared")
    args = parser.parse_args(argv)
    check_folder("--output_dir", args.output_dir)
    return args


def main() -> None:
    args = parse_args()
    configs = load_groups({"data": [args.data_yaml], "predict": args.predict_yaml}, args.overrides)
    data, predict = configs["data"], configs["predict"]
    if data.label_noise is None:  # told before anything heavy is imported
        raise InputError(
            f"--data_yaml {args.data_yaml}: got the data set {data.dataset}, expected one whose true probabilities are "
            "known: shapes_noisy or shapes_noisy_binary"
        )
    from exp.evaluation.probability_maps import judge
    from exp.evaluation.results import report_results
    from exp.evaluation.true_maps import build_true_reader
    from exp.provenance import describe_code
    from exp.rules.registry import build_rule  # PyTorch comes in only now

    reader = build_true_reader(data)
    classes = reader.dataset.classes
    judged = judge(reader.files(), reader, {c.name: build_rule(c, len(classes)) for c in predict}, classes)
    origin = {"probabilities": "true", "metric": args.metric, **describe_code()}
    contexts = [{**origin, "config": {"data": asdict(data), "predict": asdict(c)}} for c in predict]
    folder = args.output_dir / "results"
    print(report_results(judged.results, folder, contexts, metric=args.metric, calibration=judged.calibration))
    print(f"results: {folder}")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
