"""Compose an experiment from YAMLs, train it, evaluate it under one or more decision rules."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import check_paths, parse_args, requested_yamls
from exp.config.experiment import check_files, dump_config, load_experiment
from exp.runtime.errors import InputError, memory_named, run_and_report


def main() -> None:
    args = parse_args()
    config = load_experiment(requested_yamls(args), args.overrides, args.seed)
    if args.print_config:
        print(dump_config(config), end="")
        return
    if args.save_page and "argmax" not in {rule.name for rule in config.predict}:
        raise InputError("--save_page: got no argmax among --predict_yaml, expected it: the page sets rules beside it")
    folder = args.output_dir / config.run_name
    trained = check_paths(args, folder, config.is_published)
    check_files(config, from_scratch=not trained)
    # Waiting threads sleep: spinning ones make a step several times as slow where loader workers share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from exp import run  # PyTorch and all that stands on it come in only now
    from exp.data.loader import worker_deaths_named
    from exp.evaluation.outputs import save_outputs
    from exp.runtime import distributed
    from exp.runtime.commands import PAGE, page_command
    from exp.training.precision import set_up_cuda

    doing = "evaluating" if args.test_only else "training"
    with (
        distributed.session(args.device) as dist,
        worker_deaths_named(),
        memory_named(),
        run.locked(folder, doing, dist) as check_owner,
    ):
        set_up_cuda(config.schedule.tf32, config.schedule.cudnn_benchmark, dist.device)
        if args.test_only:
            trained = run.load_trained(config, folder, args.model_checkpoint, args.data_dir, dist)
            if args.fit_temperature:
                run.fit_temperature(trained, folder, args.fit_temperature, args.data_dir, check_owner)
            trained = run.with_fitted_temperature(trained, folder)
            evaluation = run.evaluate(trained, folder, args.save_masks)
        else:
            trained, evaluation = run.train_run(
                config, folder, args.data_dir, dist, args.save_masks, check_owner, args.model_checkpoint
            )
        if dist.is_main:
            check_owner()
            if args.save_masks:
                print(f"masks: {folder / 'masks'}")
            save_outputs(
                evaluation,
                folder,
                trained.evaluator,
                trained.model,
                config=trained.config.to_dict(),
                training=trained.training,
                num_pictures=args.save_pred,
                num_maps=args.save_prob,
            )
            if not (folder / "results" / "argmax.json").is_file():
                return  # comparisons and the page set rules beside argmax
            rules = [rule.name for rule in config.predict]
            if "argmax" not in rules:
                from exp.reproduction.measured import beside_argmax

                if text := beside_argmax(folder, rules, config.test.metric):
                    print(text)
            if args.save_page:
                from exp.reproduction.report.build import write_report

                print(f"page: {write_report(folder) / PAGE}")
            else:
                print(f"for a page: {page_command(folder)}")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
