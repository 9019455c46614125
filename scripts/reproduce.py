#!/usr/bin/env python
"""Train and judge what a table of the paper needs:

    python scripts/reproduce.py table1 --data_dir DATA --output_dir OUTPUT --dry_run
    python scripts/reproduce.py table1 --data_dir DATA --output_dir OUTPUT --nproc_per_node 4
    python scripts/reproduce.py all --data_dir DATA --output_dir OUTPUT --launcher slurm

TABLE: readme_natural, readme_medical, table1 ... table7, all, or laptop (small networks on CamVid and hippocampus, for
two CPU cores). Every training is run once, whichever tables need it, and judged by all of their rules in one pass. What
is done is skipped, by what it says of its config; an interrupted training goes on; a failed one is told and does not
stop the others. Started again, the same command does what is missing.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_device, add_overrides, build_script_parser, require_data_dir
from exp.reproduction.existing import TRAINED, UNTRAINED, WAITING, Existing, State
from exp.reproduction.job import Cell
from exp.reproduction.plans import LAPTOP, join_cells, table_cells, with_settings
from exp.reproduction.runner import Runner, laptop_data, missing_cells
from exp.runtime.errors import InputError, run_and_report
from exp.runtime.interrupt import catch_signals


def parse_args() -> argparse.Namespace:
    parser = build_script_parser(__doc__)
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="the data sets (see DATA.md)")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="a folder a training")
    parser.add_argument("--dry_run", action="store_true", help="print what exists, what is missing, and the commands")
    parser.add_argument("--nproc_per_node", type=int, default=1, metavar="N", help="processes a training (torchrun)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--weights", metavar="FILE", help="MobileNetV2's weights for laptop, where no hub is reached")
    add_overrides(parser)
    add_device(parser)
    args = parser.parse_args()
    if args.nproc_per_node < 1:
        raise InputError(f"--nproc_per_node: got {args.nproc_per_node}, expected 1 or more")
    require_data_dir(args.data_dir)
    if args.weights is not None and not Path(args.weights).is_file():
        raise InputError(f"--weights: {args.weights}: no such file, expected a state dict")
    return args


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    """The trainings of all tables asked for, each once, under the settings of the command line."""
    weights = None if args.weights is None else str(Path(args.weights).resolve())
    cells = [cell for name in args.tables for cell in table_cells(name)]
    return join_cells(with_settings(cells, args.overrides, weights))


def describe_cell(cell: Cell, state: State, runner: Runner) -> str:
    rules = f" ({', '.join(state.rules)})" if state.rules else ""
    command = "" if not state.rules else "\n    " + shlex.join(runner.command(cell, state))
    return f"{cell.name}: {state.kind}{rules}{command}"


def count(cells: list[Cell]) -> str:
    """How many trainings, and further evaluations of them, in words."""
    again = sum(cell.again is not None for cell in cells)
    return f"{len(cells) - again} trainings" + (f" and {again} further evaluations" if again else "")


def run_local(pairs: list[tuple[Cell, State]], runner: Runner) -> int:
    """Run what is missing one after the other -> how many failed."""
    failed = 0
    with catch_signals() as stop:
        for number, (cell, state) in enumerate(pairs, start=1):
            print(f"[{number}/{len(pairs)}] {cell.name}: {TRAINED if cell.again else state.kind}", flush=True)
            failure = runner.run(cell, state, stop)
            if failure is not None:
                failed += 1
                print(f"  failed: {failure}", flush=True)
    return failed


def main() -> None:
    args = parse_args()
    output = args.output_dir
    cells = choose_cells(args)
    existing = Existing(output)
    pairs = missing_cells(cells, existing)
    data_dir = args.data_dir
    if args.dry_run or args.launcher == "slurm":
        from exp.reproduction.data_state import describe_data  # with PyTorch behind it: not before it is needed

        for line in describe_data(cells, data_dir):
            print(line)
    if args.dry_run:
        runner = Runner(data_dir, output, args.nproc_per_node, args.device)
        for cell in cells:
            print(describe_cell(cell, existing.state(cell), runner))
        print(f"{count(cells)}, {len(cells) - len(pairs)} of them done")
        return
    if LAPTOP in args.tables and pairs:
        output.mkdir(parents=True, exist_ok=True)
        data_dir = laptop_data(data_dir, output)
    runner = Runner(data_dir.resolve(), output.resolve(), args.nproc_per_node, args.device)
    if args.launcher == "slurm" and pairs:
        ready = [pair for pair in pairs if pair[1].kind not in (WAITING, UNTRAINED)]
        print(f"{count(cells)}, {len(ready)} to run" + ("; submit them from the clone:" if ready else " in an array"))
        if ready:
            print(f"sbatch {runner.write_array(ready, output.resolve() / '.'.join(['array', *args.tables]))}")
        if len(ready) < len(pairs):
            print(
                f"{len(pairs) - len(ready)} evaluations wait for their trainings, or need none: after the array, this "
                "command again, or without --launcher here"
            )
        return
    failed = run_local(pairs, runner)
    print(f"{count(cells)}, {len(cells) - len(pairs)} done before, {len(pairs) - failed} now, {failed} failed")
    if failed:
        raise InputError(f"{failed} of {len(pairs)} failed (see above); the same command tries them again")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
