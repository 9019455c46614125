"""The command line; nothing heavy is imported here."""

import argparse
from pathlib import Path

from exp.files.paths import require_utf8
from exp.runtime.errors import InputError

DEFAULT_YAMLS = {
    "model": "unet_mobilenetv3_small_100",
    "data": "shapes",
    "loss": "ce",
    "schedule": "quickstart",
    "optim": "adamw_lr6e-4",
    "test": "test_iou",
    "predict": ["argmax", "rankseg_rma"],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line -> checked flags; InputError for values that cannot be."""
    args = build_parser().parse_args(argv)
    if not args.test_only:
        if args.fit_temperature:
            raise InputError(f"--fit_temperature {args.fit_temperature}: expected together with --test-only")
        if args.model_checkpoint == Path("best"):
            raise InputError("--model_checkpoint best: expected together with --test-only: it has no state to resume")
    for name in ("save_pred", "save_prob", "seed"):
        if not 0 <= getattr(args, name) < 2**31:
            raise InputError(f"--{name}: got {getattr(args, name)}, expected 0 or more, less than 2**31")
    check_folder("--output_dir", args.output_dir)
    return args


def check_paths(args: argparse.Namespace, run_folder: Path, is_published: bool = False) -> bool:
    """Whether there are weights to resume from, or to evaluate.

    is_published: the network is one that others trained, and has its own. InputError for data or a checkpoint that is
    not there, said before PyTorch is loaded.
    """
    require_data_dir(args.data_dir)
    if is_published:
        if not args.test_only:
            raise InputError(
                f"--model_yaml {args.model_yaml}: got a network that others trained, expected it together with "
                "--test-only; to train from its encoder, take a model YAML of your own and model.pretrained="
                f"{args.model_yaml}"
            )
        if args.model_checkpoint is not None:
            raise InputError(
                f"--model_checkpoint {args.model_checkpoint}: expected none with a network that others trained; "
                "--set model.weights=FILE names a local file of it"
            )
        return True
    checkpoints, path = run_folder / "checkpoints", args.model_checkpoint
    if path is not None and path != Path("best"):
        if not path.is_file():
            raise InputError(f"--model_checkpoint: {path}: no such file, expected a checkpoint of this program")
        return True
    trained = any(checkpoints.glob("best.pt" if path else "iter_*.pt"))
    if args.test_only and not trained:
        kind = " best.pt" if path else ""
        raise InputError(f"{checkpoints}: got no checkpoint{kind}, expected one: train first, with the same flags")
    return trained


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Train a segmentation network and evaluate decision rules (argmax, RankSEG-RMA) on it. Without "
        "flags: a small network on synthetic shapes. Start under torchrun for several processes.",
        allow_abbrev=False,
    )
    for group, default in DEFAULT_YAMLS.items():
        if group == "predict":
            add_rules(parser, default)
        else:
            parser.add_argument(
                f"--{group}_yaml",
                default=default,
                metavar="NAME",
                help=f"configs/{group}/NAME.yaml, or a path ending in .yaml (default: {default})",
            )
    parser.add_argument("--data_dir", metavar="DIR", help="the folder that holds the data sets (see DATA.md)")
    parser.add_argument(
        "--output_dir",
        default="output",
        metavar="DIR",
        type=Path,
        help="holds a folder per run: <model>.<data>.<loss>.<schedule>.<optim> (default: ./output)",
    )
    add_overrides(parser)
    parser.add_argument(
        "--test-only", "--test_only", action="store_true", help="evaluate the run's newest checkpoint, train nothing"
    )
    parser.add_argument(
        "--model_checkpoint",
        metavar="FILE",
        type=Path,
        help="with --test-only: evaluate this checkpoint, or 'best' (of the run's validations), not the newest; in "
        "training: resume from this one, which is left as it is, unless the run has one that is further",
    )
    parser.add_argument(
        "--fit_temperature",
        choices=("train", "val-part"),
        help="with --test-only: fit the temperature of the logits on the training images, or on every other image "
        "(case) of the evaluation's, and store it for test.temperature=fitted",
    )
    parser.add_argument("--save_pred", type=int, default=0, metavar="N", help="panels: N gains, N losses, N at random")
    parser.add_argument("--save_masks", action="store_true", help="write every rule's labels as the data set's files")
    parser.add_argument("--save_prob", type=int, default=0, metavar="N", help="write N images' probabilities as .npy")
    parser.add_argument("--save_page", action="store_true", help="write the run's page, as scripts/report.py does")
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and exit")
    return parser


def build_script_parser(doc: str | None) -> argparse.ArgumentParser:
    """A script's docstring -> a parser that shows it as it stands."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_rules(parser: argparse.ArgumentParser, default: list[str]) -> None:
    parser.add_argument(
        "--predict_yaml",
        nargs="+",
        default=default,
        metavar="NAME",
        help="configs/predict/NAME.yaml, one or more rules, or NAME=YAML:KEY=VALUE,... for one of them under another "
        f"name with other values (default: {' '.join(default)})",
    )


def add_overrides(parser: argparse.ArgumentParser, metavar: str = "GROUP.KEY=VALUE") -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar=metavar,
        dest="overrides",
        help="override keys of the YAMLs, e.g. schedule.batch_size=4 data.crop_size=[64,64]",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def check_folder(flag: str, path: str | Path | None) -> None:
    """InputError for a file where a folder is to be, or is to be made, and for a path that cannot be one."""
    if path is not None:
        _check_path(flag, Path(path))
    if path is not None and Path(path).exists() and not Path(path).is_dir():
        raise InputError(f"{flag}: {path}: got a file, expected a folder")


def _check_path(flag: str, path: Path) -> None:
    require_utf8(path, str(path))
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a link to itself, a part of more than 255 bytes, a zero byte, ...
        raise InputError(f"{flag}: {path}: got a path that cannot be ({error}), expected a folder") from None


def require_data_dir(path: str | Path | None) -> None:
    if path is not None and not Path(path).is_dir():
        raise InputError(f"--data_dir: {path}: no such folder (DATA.md shows the expected tree)")


def requested_yamls(args: argparse.Namespace) -> dict[str, list[str]]:
    """Parsed flags -> the YAML names by group."""
    names = {group: getattr(args, f"{group}_yaml") for group in DEFAULT_YAMLS}
    return {group: name if isinstance(name, list) else [name] for group, name in names.items()}
