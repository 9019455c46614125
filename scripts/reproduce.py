#!/usr/bin/env python
"""Train and evaluate what a table of the paper needs:

    python scripts/reproduce.py table1 --data_dir DATA --output_dir OUTPUT --dry_run
    python scripts/reproduce.py table1 --data_dir DATA --output_dir OUTPUT --nproc_per_node 4
    python scripts/reproduce.py all --data_dir DATA --output_dir OUTPUT --launcher slurm
    python scripts/reproduce.py published --data_dir DATA --output_dir OUTPUT --dry_run

TABLE: readme_natural, readme_medical, table1 ... table7, all, laptop (a smoke test for two CPU cores, on CamVid,
hippocampus and shapes), or published (networks that others trained, of configs/model/published: evaluated alone, where
their data set is there; one whose owner's score is missed by more than a point is called wrong). Every training is run
once, whichever tables need it, and evaluated by all of their rules in one pass. What is done is skipped, by what it
says of its config; an interrupted training resumes; a failed one is told and does not stop the others. Started again,
the same command does what is missing. --dry_run prints what exists, what is missing with its commands and, where
exp/reproduction/speeds.json has the speeds of a device, what each table costs on it; of networks that others trained,
what is to be downloaded, its size and licence, and the score that its owner states.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import add_device, add_overrides, build_script_parser, require_data_dir
from exp.reproduction.existing import TRAINED, UNTRAINED, WAITING, Existing, State
from exp.reproduction.job import Job
from exp.reproduction.plans import ALL, LAPTOP, PUBLISHED, join_jobs, table_jobs, with_settings
from exp.reproduction.published import load_tables
from exp.reproduction.runner import Runner, laptop_data, missing_jobs
from exp.runtime.errors import InputError, run_and_report
from exp.runtime.interrupt import catch_signals


def parse_args() -> argparse.Namespace:
    parser = build_script_parser(__doc__)
    parser.add_argument("tables", nargs="+", metavar="TABLE")
    parser.add_argument("--data_dir", type=Path, required=True, metavar="DIR", help="the data sets (see DATA.md)")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="one folder per training")
    parser.add_argument("--dry_run", action="store_true", help="print what exists, what is missing, and the commands")
    parser.add_argument("--nproc_per_node", type=int, default=1, metavar="N", help="processes per training (torchrun)")
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


def choose_jobs(tables: Iterable[str], args: argparse.Namespace) -> list[Job]:
    """The trainings of these tables, each once, under the settings of the command line."""
    weights = None if args.weights is None else str(Path(args.weights).resolve())
    jobs = [job for name in tables for job in table_jobs(name)]
    return join_jobs(with_settings(jobs, args.overrides, weights))


def describe_job(job: Job, state: State, runner: Runner) -> str:
    rules = f" ({', '.join(state.rules)})" if state.rules else ""
    command = "" if not state.rules else "\n    " + shlex.join(runner.command(job, state))
    network = ""
    if job.is_published:
        from exp.reproduction.dry_run import describe_network  # with PyTorch behind it, as in main()

        network = f"\n    {describe_network(job)}"
    return f"{job.name}: {state.kind}{rules}{network}{command}"


def count(jobs: list[Job]) -> str:
    """How many trainings, and further evaluations of them, in words."""
    again, others = sum(job.reevaluation is not None for job in jobs), sum(job.is_published for job in jobs)
    texts = [f"{len(jobs) - again - others} trainings"] if len(jobs) > others else []
    texts += [f"{again} further evaluations"] if again else []
    return " and ".join([*texts, *([f"{others} networks that others trained"] if others or not texts else [])])


def print_costs(args: argparse.Namespace, jobs: list[Job]) -> None:
    """What each table and all of them take in device hours; nothing where no speeds were measured."""
    from exp.reproduction import dry_run  # with PyTorch behind it, as in main()

    measured = dry_run.load_speeds(dry_run.SPEEDS_FILE)
    if measured is not None and set(args.tables) != {PUBLISHED}:
        names = dict.fromkeys(n for name in args.tables for n in (load_tables() if name == ALL else [name]))
        names.pop(PUBLISHED, None)
        jobs = [job for job in jobs if not job.is_published]
        tables = {name: choose_jobs([name], args) for name in names}
        print("\n".join(dry_run.describe_costs(tables, jobs, measured)))


def run_local(pairs: list[tuple[Job, State]], runner: Runner) -> int:
    """Run what is missing one after the other -> how many failed."""
    failed = 0
    with catch_signals() as stop:
        for number, (job, state) in enumerate(pairs, start=1):
            print(f"[{number}/{len(pairs)}] {job.name}: {TRAINED if job.reevaluation else state.kind}", flush=True)
            failure = runner.run(job, state, stop)
            if failure is not None:
                failed += 1
                print(f"  failed: {failure}", flush=True)
    return failed


def leave_out(jobs: list[Job], data_dir: Path) -> list[Job]:
    """Without the networks that others trained whose data set is not there, which is said."""
    from exp.reproduction.dry_run import has_data  # with PyTorch behind it, as in main()

    names = dict.fromkeys(job.data for job in jobs if job.is_published)
    missing = [name for name in names if not has_data(next(j for j in jobs if j.data == name), data_dir)]
    for name in missing:
        number = sum(job.is_published and job.data == name for job in jobs)
        print(f"left out: {number} networks that others trained for {name}: no such data set in {data_dir}")
    return [job for job in jobs if not (job.is_published and job.data in missing)]


def print_verdicts(jobs: list[Job], output: Path) -> None:
    """The measured score of every network that others trained beside its owner's; InputError if one is missed."""
    from exp.reproduction.measured import Measured  # with PyTorch behind it, as in main()
    from exp.reproduction.report.published_networks import evaluated_networks

    networks = evaluated_networks(Measured(output), jobs)
    for network in networks:
        print(network.verdict)
    wrong = [network.name for network in networks if network.is_wrong]
    if wrong:
        raise InputError(f"{len(wrong)} network(s) miss their owner's score by more than a point: {', '.join(wrong)}")


def main() -> None:
    args = parse_args()
    output = args.output_dir
    jobs = choose_jobs(args.tables, args)
    if PUBLISHED in args.tables and not args.dry_run:
        jobs = leave_out(jobs, args.data_dir)
    existing = Existing(output)
    pairs = missing_jobs(jobs, existing)
    data_dir = args.data_dir
    if args.dry_run or args.launcher == "slurm":
        from exp.reproduction.dry_run import describe_data  # with PyTorch behind it: not before it is needed

        for line in describe_data(jobs, data_dir):
            print(line)
    if args.dry_run:
        runner = Runner(data_dir, output, args.nproc_per_node, args.device)
        for job in jobs:
            print(describe_job(job, existing.state(job), runner))
        print(f"{count(jobs)}, {len(jobs) - len(pairs)} of them done")
        print_costs(args, jobs)
        return
    if LAPTOP in args.tables and pairs:
        output.mkdir(parents=True, exist_ok=True)
        data_dir = laptop_data(data_dir, output)
    runner = Runner(data_dir.resolve(), output.resolve(), args.nproc_per_node, args.device)
    if args.launcher == "slurm" and pairs:
        ready = [pair for pair in pairs if pair[1].kind not in (WAITING, UNTRAINED)]
        print(f"{count(jobs)}, {len(ready)} to run" + ("; submit them from the clone:" if ready else " in an array"))
        if ready:
            print(f"sbatch {runner.write_array(ready, output.resolve() / '.'.join(['array', *args.tables]))}")
        if len(ready) < len(pairs):
            print(
                f"{len(pairs) - len(ready)} evaluations wait for their trainings, or need none: after the array, this "
                "command again, or without --launcher here"
            )
        return
    failed = run_local(pairs, runner)
    print(f"{count(jobs)}, {len(jobs) - len(pairs)} done before, {len(pairs) - failed} now, {failed} failed")
    published = [job for job in jobs if job.is_published]
    if published:
        print_verdicts(published, output)
    if failed:
        raise InputError(f"{failed} of {len(pairs)} failed (see above); the same command tries them again")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
