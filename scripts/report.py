#!/usr/bin/env python
"""Published figures beside what was measured, from whatever results there are:

    python scripts/report.py OUTPUT_DIR
    python scripts/report.py OUTPUT_DIR/RUN
    python scripts/report.py OUTPUT_DIR --readme FILE
    python scripts/report.py --folds OUTPUT/*fold* --output folds.json

OUTPUT_DIR is that of scripts/reproduce.py, or any folder with runs below it. Writes OUTPUT_DIR/report/tables.md, .tex
and index.html, with the same sections in the same order: every table of the paper with the published value, the
measured one and their difference; what a rule gains over argmax, with a bootstrap interval; misprints as notes; and
trainings that belong to no table, with all of their rules and every loss. index.html has plots and pictures, too, and
needs nothing else; of each training it also has the classes, the images that lose, the calibration, and the confusion
matrices. tables.csv has the published tables. Scores are computed anew from the counts of every image, so the same
results give the same files, byte for byte. --readme FILE writes a shorter account between two marks of that file: what
was and was not reproduced, the rules, and every loss.

Of the folder of a single run, or the --output_dir of scripts/evaluate_probabilities.py, RUN/report/ has that alone,
without the published tables.

--folds RUN RUN ... prints the mean scores over the folds of a cross-validation, by rule. RUN is the folder of a run
(<output_dir>/<model>.<data>....) with results/<rule>.json; all were evaluated alike, each on another fold.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.config.cli import build_script_parser
from exp.runtime.commands import PAGE
from exp.runtime.errors import InputError, run_and_report


def main() -> None:
    parser = build_script_parser(__doc__)
    parser.add_argument("output_dir", type=Path, nargs="?", metavar="OUTPUT_DIR")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="renew the results between the marks in this file")
    parser.add_argument("--folds", type=Path, nargs="+", metavar="RUN", help="the runs of a cross-validation")
    parser.add_argument("--output", type=Path, metavar="FILE", help="with --folds: write the scores there, JSON")
    args = parser.parse_args()
    if args.folds:
        from exp.reproduction.report.folds import report_folds

        print(report_folds(args.folds, args.output))
        return
    if args.output_dir is None:
        raise InputError("OUTPUT_DIR: got none, expected a folder with runs below it, or --folds")
    if not args.output_dir.is_dir():
        raise InputError(f"{args.output_dir}: no such folder, expected one with runs below it")
    if args.readme is not None and not args.readme.is_file():
        raise InputError(f"--readme {args.readme}: no such file, expected one with marks for results")
    from exp.reproduction.report.build import write_report

    print(f"page: {write_report(args.output_dir, args.readme) / PAGE}")
    if args.readme is not None:
        print(f"results: {args.readme}")


if __name__ == "__main__":
    sys.exit(run_and_report(main))
