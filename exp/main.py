"""Compose an experiment from YAMLs, train it, evaluate it under one or more decision rules."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import check_paths, parse_args, requested_yamls
from exp.config.experiment import check_files, dump_config, load_experiment
from exp.runtime.errors import run_and_report

if TYPE_CHECKING:
    from exp.run import Run


def main() -> None:
    args = parse_args()
    config = load_experiment(requested_yamls(args), args.overrides, args.seed)
    if args.print_config or not args.test_only:
        config = config.with_window(config.data.crop_size)
    if args.print_config:
        print(dump_config(config), end="")
        return
    trained = check_paths(args, args.output_dir / config.run_name)
    check_files(config, from_scratch=not trained)
    # Waiting threads sleep: spinning ones make a step several times as slow where loader workers share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from exp.data.loader import worker_deaths_named
    from exp.evaluation.evaluator import build_evaluator
    from exp.run import Run
    from exp.runtime import distributed  # PyTorch and all that stands on it come in only now
    from exp.training.precision import set_up_cuda

    with distributed.session(args.device) as dist, worker_deaths_named():
        set_up_cuda(config.schedule.tf32, config.schedule.cudnn_benchmark, dist.device)
        evaluator = build_evaluator(config.with_window(config.data.crop_size), args.data_dir, dist)
        run = Run(config, args.output_dir / config.run_name, evaluator, dist, args.save_masks)
        with run.locked("evaluating" if args.test_only else "training"):
            perform(run, args)


def perform(run: "Run", args: argparse.Namespace) -> None:
    """Train or load, evaluate, report."""
    from exp.evaluation.outputs import Report

    if args.test_only:
        run, model, training = run.load(args.model_checkpoint)
        if args.fit_temperature:
            run.fit_temperature(model, training, args.fit_temperature, args.data_dir)
        run = run.with_temperature(model)
        evaluation = run.evaluate(model, training)
    else:
        model, training, evaluation = run.train(args.data_dir)
    if run.dist.is_main:
        report = Report(run.config, run.folder, run.evaluator, model, training)
        if args.save_masks:
            print(f"masks: {run.folder / 'masks'}")
        report.save(evaluation, num_pictures=args.save_pred, num_maps=args.save_prob)


if __name__ == "__main__":
    sys.exit(run_and_report(main))
