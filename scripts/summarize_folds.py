"""Scores of a cross-validation: the mean over the folds' runs, a line a rule.

    python scripts/summarize_folds.py OUTPUT/*fold*  --output folds.json

RUN is the folder of a run (<output_dir>/<model>.<data>....) whose results/<rule>.json exp/main.py wrote. The runs must
be judged alike: the same data set, test and predict settings, each on another fold. What a fold fits for itself may
differ: a temperature (--fit_temperature) and the thresholds file of rankseg_rma_fixed.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import build_script_parser
from exp.files.text import read_json
from exp.runtime.errors import InputError, run_and_report

OWN = ("data.fold", "predict.thresholds")  # where folds may differ
TEMPERATURE = "test.temperature"  # where they may if each has fitted its own


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = build_script_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, one for each fold")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the means and each fold's scores, JSON")
    args = parser.parse_args(argv)
    if len({run.resolve() for run in args.runs}) < len(args.runs):
        raise InputError("RUN: got a run more than once, expected each once")
    return args


def load_run(run: Path) -> dict[str, dict[str, Any]]:
    """A run's folder -> the content of results/<rule>.json by rule; InputError if there is none."""
    results = {}
    for path in sorted((run / "results").glob("*.json")):
        content = read_json(path, "results of an evaluation")
        if "rule" not in content:  # the others compare rules, or are the network's
            continue
        groups = content.get("config", {})
        if not (
            isinstance(content["rule"], str)
            and isinstance(content.get("metrics"), dict)
            and all(value is None or type(value) in (int, float) for value in content["metrics"].values())
            and isinstance(groups, dict)
            and all(isinstance(group, dict) for group in groups.values())
        ):
            raise InputError(f"{path}: got other content, expected a rule, its metrics and its config")
        results[content["rule"]] = content
    if not results:
        raise InputError(f"{run / 'results'}: got no results, expected the <rule>.json of an evaluation")
    return results


def check_alike(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """One rule's results by run; InputError if two of them were judged differently, or on the same fold."""
    (first, base), *others = [(run, settings(run, content)) for run, content in contents.items()]
    for run, other in others:
        if other != base:
            keys = [key for key in {**base, **other} if base.get(key) != other.get(key)]
            raise InputError(f"{run}: got another {', '.join(keys)} than {first}, expected the folds alone to differ")
    folds: dict[Any, Path] = {}
    for run, content in contents.items():
        fold = content["config"].get("data", {}).get("fold")
        if fold is not None and fold in folds:
            raise InputError(f"{run}: got fold {fold}, which is that of {folds[fold]} too, expected each once")
        folds[fold] = run


def settings(run: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """A run's result -> how it was judged, without what is the fold's own, key by key."""
    config = content.get("config", {})
    found = {f"{group}.{key}": v for group in config for key, v in config[group].items()}
    found = {key: value for key, value in found.items() if key not in OWN}
    if TEMPERATURE in found and found[TEMPERATURE] == fitted_temperature(run):
        found[TEMPERATURE] = "fitted"
    return found


def fitted_temperature(run: Path) -> float | None:
    """The temperature that was fitted for the run's network; None if none was."""
    path = run / "results" / "temperature.json"
    return read_json(path, "a fitted temperature").get("temperature") if path.is_file() else None


def summarize(runs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Run folders -> by rule that all of them have: its mean scores, and those of each fold."""
    from exp.evaluation.metrics import average_folds

    results = {run: load_run(run) for run in runs}
    first, *others = results.values()
    rules = [rule for rule in first if all(rule in other for other in others)]
    if not rules:
        found = "; ".join(f"{run}: {', '.join(content)}" for run, content in results.items())
        raise InputError(f"RUN: got no rule that all runs have, expected one ({found})")
    summary = {}
    for rule in rules:
        contents = {run: content[rule] for run, content in results.items()}
        check_alike(contents)
        folds = {str(run): content["metrics"] for run, content in contents.items()}
        summary[rule] = {"mean": average_folds(list(folds.values())), "folds": folds}
    return summary


def main() -> None:
    args = parse_args()
    summary = summarize(args.runs)
    from exp.evaluation.results import finite_or_null, format_scores
    from exp.files.atomic import write_atomically

    print(f"mean over {len(args.runs)} folds")
    print(format_scores(list(summary), [values["mean"] for values in summary.values()], ("mIoU", "mDice")))
    if args.output:
        content = {rule: {**v, "mean": finite_or_null(v["mean"])} for rule, v in summary.items()}
        write_atomically(args.output, json.dumps(content, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
