"""Decision rules on networks that are trained to the end, and on others, as one table.

    python scripts/benchmarks/trained_networks.py --data_dir DATA --output_dir OUTPUT --write docs/results.md
    python scripts/benchmarks/trained_networks.py --data_dir DATA --output_dir OUTPUT --half even \\
        --predict_yaml argmax rankseg_rma rankseg_rma_0.5=rankseg_rma:pruning_prob=0.5
    python scripts/benchmarks/trained_networks.py --data_dir DATA --output_dir OUTPUT \\
        --maps mine MAPS LABELS "--logits --scale 0.1" --run "hippocampus, five folds" RUNS/*hippocampus_fold*

Networks: those of others whose logits lie in DATA (voc/logits/deeplabv3_mobilenetv2 and espnetv2 beside voc/VOCdevkit,
camvid_logits/espnet beside camvid/), those that are trained here (CamVid, hippocampus), and the true probabilities of
shapes_noisy. What DATA lacks is told and left out; --networks takes some of them. --maps adds a folder of maps: a name,
MAPS, LABELS and the flags of scripts/evaluate_probabilities.py. --run adds a title and the folders of runs that
exp/main.py has evaluated under the same rules; those of several folds become one network.

Each network is evaluated by scripts/evaluate_probabilities.py or exp/main.py, whose commands are printed, into a folder
of its own below OUTPUT. A training is looked for below --runs (default: OUTPUT) by its config, and run if it is not
there; interrupted, it resumes. What the same code has evaluated under the same rules is not evaluated again.

Written: OUTPUT/table.md and table.json (with --half: table.even.md), with --write the table between two marks of a
text, with --plot the gains of two rules in mIoUI as an SVG. The first rule stands in full; of the others the
differences from it in percent points, +- 1.96 standard errors of the paired difference (jackknife over images, or
volumes). Scores of the data set (D) are means over the classes that are in the labels. --half shows every other image
(volume) by name, to choose rules on the one half and to confirm them on the other.
"""

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from exp.config.cli import add_rules, build_script_parser, check_folder, require_data_dir
from exp.config.experiment import load_groups
from exp.runtime.errors import InputError, run_and_report

if TYPE_CHECKING:
    from exp.evaluation.metrics import EvalResult

ROOT = Path(__file__).resolve().parents[2]
PRUNINGS = [f"rankseg_rma_{p}=rankseg_rma:pruning_prob={p}" for p in (0.3, 0.5)]
RULES = ["argmax", "rankseg_rma", *PRUNINGS, "rankseg_dep", "rankseg_dep_iou", "rankseg_levelset"]
SCORES = ("mIoUI", "mDiceI", "mIoUD", "mDiceD", "Acc")
PER_UNIT = ("mIoUI", "mDiceI")
PLOTTED = ("rankseg_rma", "rankseg_levelset")
NORMAL = 1.96
BEGIN = (
    "<!-- trained networks: written by `python scripts/benchmarks/trained_networks.py --write FILE`; do not edit -->"
)
END = "<!-- end of trained networks -->"
STAMP = "evaluated.json"  # in a network's folder: what its results were made from


@dataclass(frozen=True)
class Logits:
    """Logits of a network of others, below DATA. data: the YAML whose classes they have."""

    title: str
    maps: str
    labels: str
    data: str
    flags: tuple[str, ...] = ()


LOGITS = {
    "voc_deeplabv3_mobilenetv2": Logits(
        "VOC, DeepLabV3 on MobileNetV2",
        "voc/logits/deeplabv3_mobilenetv2",
        "voc/VOCdevkit/VOC2012/SegmentationClass",
        "pascal_voc",
        ("--input_size", "513", "513", "--align_corners"),
    ),
    "voc_espnetv2": Logits(
        "VOC, ESPNetv2", "voc/logits/espnetv2", "voc/VOCdevkit/VOC2012/SegmentationClass", "pascal_voc"
    ),
    "camvid_espnet": Logits(
        "CamVid, ESPNet", "camvid_logits/espnet", "camvid/valannot", "camvid", ("--ignore_label", "11")
    ),
}
TRAININGS = {"camvid": "CamVid", "hippocampus": "Hippocampus"}  # by what is trained here
# What the networks of docs/results.md were trained under: the defaults before those of the paper.
RECIPE = ("data.augmentation=corner", "optim.warmup=from_start", "optim.start_lr=1e-5")
SETTINGS = {  # beyond those of `scripts/reproduce.py laptop`
    "camvid": ("schedule.train_iters=500", "schedule.save_iters=50", *RECIPE),
    "hippocampus": ("schedule.train_iters=500", "schedule.save_iters=100", *RECIPE),
}
TRUE = "shapes_noisy"


@dataclass(frozen=True)
class Evaluated:
    """A network and where its results lie, in several folders if it is one of several folds."""

    title: str
    results: tuple[Path, ...]
    timings: tuple[Path, ...]


def parse_args() -> argparse.Namespace:
    parser = build_script_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", type=Path, required=True, metavar="DIR", help="holds voc/, camvid/, hippocampus/, camvid_logits/")
    add("--output_dir", type=Path, required=True, metavar="DIR")
    add_rules(parser, RULES)
    names = (*LOGITS, *TRAININGS, TRUE)
    add("--networks", nargs="*", choices=names, default=list(names), metavar="NAME", help=f"of {', '.join(names)}")
    add("--maps", nargs=4, action="append", default=[], metavar=("NAME", "MAPS", "LABELS", "FLAGS"))
    add("--run", nargs="+", action="append", default=[], metavar="TITLE_RUN", help="a title, then folders of runs")
    add("--runs", type=Path, metavar="DIR", help="where finished trainings are looked for (default: OUTPUT)")
    add("--weights", metavar="FILE", help="MobileNetV2's weights for the training on CamVid, where no hub is reached")
    add("--half", choices=("even", "odd"), help="every other image (volume) by name, from the first or the second")
    add("--plot", type=Path, metavar="FILE", help="an SVG of the gains of rankseg_rma and rankseg_levelset in mIoUI")
    add("--write", type=Path, metavar="FILE", help="a text in which the table between two marks is renewed")
    args = parser.parse_args()
    require_data_dir(args.data_dir)
    for name in ("output_dir", "runs"):
        check_folder(f"--{name}", getattr(args, name))
    for path in (args.write, args.weights and Path(args.weights)):
        if path is not None and not path.is_file():
            raise InputError(f"{path}: no such file, expected one")
    return args


def main() -> None:
    args = parse_args()
    rules = [config.name for config in load_groups({"predict": args.predict_yaml}, [])["predict"]]
    if args.plot is not None and not set(PLOTTED) <= set(rules[1:]):
        raise InputError(f"--plot: got the rules {', '.join(rules)}, expected {' and '.join(PLOTTED)} after another")
    runs = [find_runs(title, [Path(run) for run in folders]) for title, *folders in args.run]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    networks = [network for name in args.networks if (network := evaluate(name, args)) is not None]
    networks += [evaluate_maps(name, *rest, args) for name, *rest in args.maps]
    networks += runs
    if not networks:
        raise InputError(f"{args.data_dir}: got nothing of the networks asked for, expected some")
    rows = [row for network in networks for row in table_rows(network, rules, args.half)]
    save_table(rows, args)


def evaluate(name: str, args: argparse.Namespace) -> Evaluated | None:
    """A network by name -> its results, made unless they are there; None where the data lack it."""
    if name in TRAININGS:
        return evaluate_training(name, args)
    if name == TRUE:
        return run_script(name, "true probabilities of shapes_noisy", ["--true_of", TRUE], args)
    logits = LOGITS[name]
    folders = [args.data_dir / logits.maps, args.data_dir / logits.labels]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        print(f"{name}: left out, there is no {missing[0]}")
        return None
    from exp.data.registry import DATASETS

    listed = args.output_dir / f"{name}.txt"  # there may be labels of more images
    listed.write_text("".join(f"{path.stem}\n" for path in sorted(folders[0].glob("*.npz"))), encoding="utf-8")
    flags = [*map(str, folders), "--logits", *logits.flags, "--names", str(listed)]
    return run_script(name, logits.title, [*flags, "--classes", *DATASETS[logits.data].classes], args)


def evaluate_maps(name: str, maps: str, labels: str, flags: str, args: argparse.Namespace) -> Evaluated:
    """A folder of the user's."""
    return run_script(name, name, [maps, labels, *shlex.split(flags)], args)


def run_script(name: str, title: str, flags: Sequence[str], args: argparse.Namespace) -> Evaluated:
    """scripts/evaluate_probabilities.py on what `flags` name -> its results."""
    folder = args.output_dir / name
    flags = [*flags, "--metric", "mIoUI", "--predict_yaml", *args.predict_yaml, "--output_dir", str(folder)]
    run([sys.executable, str(ROOT / "scripts" / "evaluate_probabilities.py"), *flags], folder, args)
    return Evaluated(title, (folder / "results",), (folder / "timing.json",))


def find_runs(title: str, runs: Sequence[Path]) -> Evaluated:
    """Evaluated runs of a network."""
    results = tuple(run / "results" for run in runs)
    if not results:
        raise InputError(f"--run {title}: got a title alone, expected folders of evaluated runs after it")
    if missing := [folder for folder in results if not folder.is_dir()]:
        raise InputError(f"--run {title}: {missing[0]}: no such folder, expected the results of an evaluated run")
    return Evaluated(title, results, tuple(folder / "timing.json" for folder in results))


def evaluate_training(name: str, args: argparse.Namespace) -> Evaluated | None:
    """A network that is trained here, unless it is there -> its results."""
    from exp.reproduction.existing import MISSING, TRAINED, Existing, State
    from exp.reproduction.laptop import CAMVID, HIPPOCAMPUS
    from exp.reproduction.plans import with_settings
    from exp.reproduction.runner import Runner, laptop_data
    from exp.runtime.interrupt import catch_signals

    if not (args.data_dir / name).is_dir():
        print(f"{name}: left out, there is no {args.data_dir / name}")
        return None
    job = replace({"camvid": CAMVID, "hippocampus": HIPPOCAMPUS}[name], rules=("argmax",))
    job = replace(job, overrides=(*job.overrides, *SETTINGS[name]))
    (job,) = with_settings([job], (), args.weights and str(Path(args.weights).resolve()))
    data_dir = laptop_data(args.data_dir, args.output_dir) if name == "hippocampus" else args.data_dir
    runner = Runner(data_dir.resolve(), args.output_dir.resolve())
    places = [place for place in (args.runs, args.output_dir) if place is not None]
    found = [weights for place in places if (weights := Existing(place).weights(job)) is not None]
    if not found:
        state = State(MISSING, job.rules)
        print(f"training: {shlex.join(runner.command(job, state))}", flush=True)
        with catch_signals() as stop:
            if failure := runner.run(job, state, stop):
                raise InputError(f"{name}: the training failed: {failure}")
        found = [Existing(args.output_dir).weights(job)]
    job = replace(job, rules=tuple(args.predict_yaml))
    folder = args.output_dir / job.name / job.config.run_name
    run(runner.command(job, State(TRAINED, job.rules, found[0].resolve())), folder, args)
    iterations = job.config.schedule.train_iters
    title = f"{TRAININGS[name]}, {job.model} after {iterations} iterations"
    return find_runs(title, [folder])


def run(command: list[str], folder: Path, args: argparse.Namespace) -> None:
    """Run a command that evaluates into `folder`, unless the same code did so under the same rules."""
    predict = load_groups({"predict": args.predict_yaml}, [])["predict"]
    origin = {"command": command[1:], "predict": [asdict(config) for config in predict], "code": code_checksum()}
    stamp, text = folder / STAMP, json.dumps(origin, indent=2) + "\n"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == text:
        print(f"{folder}: evaluated already", flush=True)
        return
    print(shlex.join(command), flush=True)
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status:
        raise InputError(f"{folder}: status {status} of the command above, expected 0")
    from exp.files.atomic import write_atomically

    write_atomically(stamp, text)


def code_checksum() -> str:
    """SHA-256 of the program's own sources."""
    digest = hashlib.sha256()
    for path in (ROOT / "rankseg_rma.py", *sorted((ROOT / "exp").rglob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def table_rows(network: Evaluated, rules: Sequence[str], half: str | None) -> Iterator[dict]:
    """The figures of a network's rules, a row each: the first one's scores, of the others the differences from it."""
    from exp.evaluation.comparison import paired_differences, share_losing, standard_error

    results = [take_half(load_joined([folder / f"{rule}.csv" for folder in network.results]), half) for rule in rules]
    results = [leave_out_unlabelled(result) for result in results]
    base = results[0]
    unit, num = ("images", len(base.names)) if base.cases is None else ("volumes", len(set(base.cases)))
    timings = [json.loads(path.read_text(encoding="utf-8")) for path in network.timings]
    times = {rule: np.mean([t["decision_milliseconds_per_image"][rule] for t in timings]) for rule in rules}
    first = base.scores()
    for result in results:
        row = {"network": network.title, "unit": unit, "units": num, "rule": result.rule, "ms": times[result.rule]}
        row["scores"] = {name: result.scores()[name] for name in SCORES}
        if result is not base:
            row["differences"] = {name: row["scores"][name] - first[name] for name in SCORES}
            row["errors"] = {name: standard_error(base, result, name) for name in SCORES}
            values = {name: paired_differences(base, result, name) for name in PER_UNIT}
            row["better"] = {name: int((v > 0).sum()) for name, v in values.items()}
            row["worse"] = {name: int((v < 0).sum()) for name, v in values.items()}
            row["losing"] = {name: share_losing(v) for name, v in values.items()}
        yield row


def load_joined(paths: Sequence[Path]) -> "EvalResult":
    """One rule's table, or those of several folds as one."""
    from exp.evaluation.results import load_result

    first, *others = (load_result(path) for path in paths)
    for other in others:
        if again := set(first.names) & set(other.names):
            raise InputError(f"{paths[0]}: got image {min(again)} in two of the folders, expected it in one")
        cases = (*first.cases, *other.cases) if first.cases and other.cases else None
        counts = np.concatenate([first.counts, other.counts])
        first = replace(first, names=(*first.names, *other.names), cases=cases, counts=counts)
    return first


def take_half(result: "EvalResult", half: str | None) -> "EvalResult":
    """Every other of a result's images (volumes) by name, from the first (even) or the second (odd) on."""
    if half is None:
        return result
    units = result.cases or result.names
    chosen = set(sorted(set(units))[half == "odd" :: 2])
    indices = [i for i, unit in enumerate(units) if unit in chosen]
    names = tuple(result.names[i] for i in indices)
    cases = result.cases and tuple(result.cases[i] for i in indices)
    return replace(result, names=names, cases=cases, counts=result.counts[indices])


def leave_out_unlabelled(result: "EvalResult") -> "EvalResult":
    """Without the classes that no label has.

    They have no part in scores of an image, but one in those of the data set, where a single predicted pixel makes them
    count as 0. Two classes stay as they are: their scores are those of the foreground.
    """
    present = (result.counts[:, 0] + result.counts[:, 2]).any(0)
    if present.sum() <= 2:
        return result
    classes = tuple(name for name, is_there in zip(result.classes, present) if is_there)
    return replace(result, classes=classes, counts=result.counts[..., present])


def save_table(rows: Sequence[dict], args: argparse.Namespace) -> None:
    """Write table.md and table.json, print the former, and put it between the marks of a text if asked to."""
    from exp.files.atomic import write_atomically
    from exp.reproduction.report.writers import write_between

    text, half = format_table(rows), f".{args.half}" if args.half else ""
    write_atomically(args.output_dir / f"table{half}.md", text)
    write_atomically(args.output_dir / f"table{half}.json", json.dumps(rows, indent=2) + "\n")
    if args.plot is not None:
        write_atomically(args.plot, draw_gains(rows).decode())
    print(f"\n{text}\ntable: {args.output_dir / f'table{half}.md'}")
    if args.write is not None:
        write_between(args.write, BEGIN, END, text)


def draw_gains(rows: Sequence[dict]) -> bytes:
    """Rows -> an SVG of the gains of PLOTTED by network."""
    from exp.reproduction.report.pictures.plots import gains

    networks: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if row["rule"] in PLOTTED and "differences" in row:
            values = row["differences"]["mIoUI"], NORMAL * row["errors"]["mIoUI"]
            networks.setdefault(row["network"], {})[row["rule"]] = values
    return gains(networks, "mIoUI")


def format_table(rows: Sequence[dict]) -> str:
    """Rows -> Markdown."""
    from exp.evaluation.results import LOSING_HEADER
    from exp.reproduction.report.sections import Section, text_rows
    from exp.reproduction.report.writers import markdown_parts

    further = [f"{what} ({name})" for what in ("better / worse", f"lose {LOSING_HEADER}, %") for name in PER_UNIT]
    header = ("network", "rule", *SCORES, *further, "ms")
    cells = []
    for row in rows:
        if "differences" not in row:
            scores, units = [f"{row['scores'][name]:.2f}" for name in SCORES], [""] * len(further)
        else:
            scores = [format_difference(row["differences"][name], row["errors"][name]) for name in SCORES]
            units = [f"{row['better'][name]} / {row['worse'][name]}" for name in PER_UNIT]
            units += [" / ".join(f"{v:.1f}" for v in row["losing"][name].values()) for name in PER_UNIT]
        title = "" if "differences" in row else f"{row['network']}, {row['units']} {row['unit']}"
        cells.append((title, row["rule"], *scores, *units, f"{row['ms']:.1f}"))
    return markdown_parts(Section("trained-networks", "", "", header, text_rows(cells)))[0]


def format_difference(value: float, error: float | None) -> str:
    return f"{value:+.2f}" if error is None else f"{value:+.2f} ± {NORMAL * error:.2f}"


if __name__ == "__main__":
    sys.exit(run_and_report(main))
