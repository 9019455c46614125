"""The folds of a cross-validation, a run each -> their mean scores, by rule.

The runs must be trained and evaluated alike: the same data set, network, loss, test and predict settings, each on
another fold. What a fold fits for itself may differ: a temperature (--fit_temperature) and the thresholds file of
rankseg_rma_fixed. Rules that were evaluated otherwise than the first stand in a table of their own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exp.config.experiment import FREE_KEYS
from exp.evaluation.metrics import average_folds
from exp.evaluation.results import finite_or_null, format_scores
from exp.files.atomic import write_atomically
from exp.files.text import read_json
from exp.reproduction.existing import differences
from exp.runtime.errors import InputError

OWN = ("data.fold", "predict.thresholds")  # where folds may differ
TRAINED_ALIKE = {"model", "loss", "optim"}
TEMPERATURE = "test.temperature"  # where they may if each has fitted its own


def report_folds(runs: Sequence[Path], output: Path | None) -> str:
    """Run folders -> what is printed of their means; with `output` these and each fold's scores are written, JSON."""
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("--folds: got a run more than once, expected each once")
    results = {run: load_run(run) for run in runs}
    rules = [rule for rule in results[runs[0]] if all(rule in result for result in results.values())]
    if not rules:
        found = "; ".join(f"{run}: {', '.join(result)}" for run, result in results.items())
        raise InputError(f"--folds: got no rule that all runs have, expected one ({found})")
    folds = {rule: {str(run): result[rule]["metrics"] for run, result in results.items()} for rule in rules}
    for rule in rules:
        check_alike({run: result[rule] for run, result in results.items()})
    means = {rule: average_folds(list(scores.values())) for rule, scores in folds.items()}
    if output:
        content = {rule: {"mean": finite_or_null(means[rule]), "folds": folds[rule]} for rule in rules}
        write_atomically(output, json.dumps(content, indent=2, allow_nan=False) + "\n")
    parts = [f"mean over {len(runs)} folds"]
    for group, reason in alike(list(results.values()), rules):
        parts += [f"evaluated otherwise than {rules[0]}: {reason}"] if reason else []
        parts.append(format_scores(group, [means[rule] for rule in group], ("mIoU", "mDice")))
    return "\n".join(parts)


def alike(results: Sequence[Mapping[str, Any]], rules: Sequence[str]) -> list[tuple[list[str], str]]:
    """Runs' results by rule -> the rules in groups that can be compared, and how each differs from the first group."""
    groups: list[tuple[list[str], str]] = []
    for rule in rules:
        for group, _ in groups:
            if not any(differences(run[group[0]], run[rule]) for run in results):
                group.append(rule)
                break
        else:
            found = [differences(run[rules[0]], run[rule]) for run in results]
            groups.append(([rule], ", ".join(next(filter(None, found), []))))
    return groups


def load_run(run: Path) -> dict[str, dict[str, Any]]:
    """A run's folder -> the content of results/<rule>.json by rule; InputError if there is none."""
    paths = sorted((run / "results").glob("*.json"))
    contents = [read_json(path, "results of an evaluation") for path in paths]
    results = {content["rule"]: content for content in contents if "rule" in content}  # others compare the rules
    if not results:
        raise InputError(f"{run / 'results'}: got no results, expected the <rule>.json of an evaluation")
    return results


def check_alike(contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """One rule's results by run; InputError if two of them were evaluated differently, or on the same fold."""
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
    """A run's result -> how it was evaluated, without what is the fold's own, key by key."""
    config, training = content.get("config", {}), content.get("training", {})
    found = {f"{group}.{key}": v for group in config for key, v in config[group].items()}
    for group in TRAINED_ALIKE & training.keys():
        free = ("name", *FREE_KEYS.get(group, ()))
        found |= {f"training.{group}.{key}": v for key, v in training[group].items() if key not in free}
    found = {key: value for key, value in found.items() if key not in OWN}
    fitted = run / "results" / "temperature.json"
    if fitted.is_file() and read_json(fitted, "a fitted temperature").get("temperature") == found.get(TEMPERATURE):
        found[TEMPERATURE] = "fitted"
    return found
