"""Tables -> the trainings that they need, and for every published figure the one that gives its counterpart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from exp.config.strict_yaml import closest
from exp.reproduction.job import Cell, join_cells
from exp.reproduction.laptop import laptop_cells
from exp.reproduction.published import Figure, load_tables, load_unavailable
from exp.runtime.errors import InputError

NATURAL = ("pascal_voc", "cityscapes", "ade20k")
MEDICAL = ("lits", "kits")
FOLDS, SEEDS = range(5), range(10)
UPERNET = "upernet_convnext_base.fb_in22k_ft_in1k_384"
DEEPLAB = "deeplabv3plus_resnet50d"
SCHEDULES = {
    "pascal_voc": "40k_iters",
    "cityscapes": "80k_iters",
    "ade20k": "160k_iters",
    "lits": "60_epochs",
    "kits": "60_epochs",
}
# The rules of the paper's code, to the letter; the shipped rankseg_rma differs in pixels that are in no set.
RULES = {
    "argmax": "argmax",
    "rankseg_rma": "rankseg_rma_paper",
    "rankseg_ba": "rankseg_ba",
    "rma_score": "rankseg_rma_paper",
    "prob": "rankseg_rma_paper_prob",
    "weight_prob": "rankseg_rma_paper_weight_prob",
}
BASIC = ("argmax", "rankseg_rma_paper", "rankseg_rma")
ALL, LAPTOP = "all", "laptop"


@dataclass(frozen=True)
class Counterpart:
    """Where the measured value of a published figure comes from: a rule's score on cells, and how these are joined.

    score: a name in `metrics` of results/<rule>.json, "IoUC:<class>" in `per_class`, or "seconds:<step>" of the timing.
    joined: "one" cell, the "mean" over folds or seeds, their standard deviation ("std"), or "p" of the paired test.
    """

    cells: tuple[Cell, ...]
    rule: str
    score: str
    joined: str = "one"


def paper_cell(model: str, data: str, rules: Sequence[str], *, fold: int | None = None, seed: int = 0) -> Cell:
    """The paper's training of a network on a data set, under schedules and rates as in the model YAMLs' headers."""
    optim = "sgd_lr1e-2" if "resnet" in model else "adamw_lr6e-5"
    test = "test_dice" if data in MEDICAL else "test_iou"
    return Cell(model, data, SCHEDULES[data], optim, tuple(rules), test=test, fold=fold, seed=seed)


def figure_cells(figure: Figure) -> tuple[Cell, ...]:
    """The trainings behind a published figure; none where the framework has no such network."""
    model = figure.row
    if figure.row in load_unavailable():
        return ()
    if figure.table == "table3":
        model = UPERNET if figure.data in NATURAL else DEEPLAB
    elif figure.table == "table4":
        model = UPERNET
    rules = BASIC
    if figure.table == "table6":
        rules = (*BASIC, RULES["prob"], RULES["weight_prob"])
    if figure.data in MEDICAL:
        rules = (*BASIC, "rankseg_ba") if figure.table in ("table2", "table3") else BASIC
        folds = FOLDS[:1] if figure.table == "table3" else FOLDS
        return tuple(paper_cell(model, figure.data, rules, fold=fold) for fold in folds)
    seeds = SEEDS if figure.table == "table7" else SEEDS[:1]
    return tuple(paper_cell(model, figure.data, rules, seed=seed) for seed in seeds)


def find_counterpart(figure: Figure) -> Counterpart | str:
    """A published figure -> where its measured value comes from, or why there is none.

    Where print has another score or data set than is meant, it is that of what is meant.
    """
    for erratum in figure.errata:
        meant = erratum.meant or {}
        figure = replace(figure, data=meant.get("data", figure.data), column=meant.get("score", figure.column))
    cells = figure_cells(figure)
    if not cells:
        return load_unavailable()[figure.row]
    if figure.value is None:
        return "no such value"
    rule = RULES.get(figure.rule, "argmax")
    if figure.table == "table3":
        step = "forward" if figure.rule == "forward" else f"decision:{rule}"
        return Counterpart(cells, rule, f"seconds:{step}")
    if figure.table == "table4":
        return Counterpart(cells, rule, f"IoUC:{figure.row}")
    if figure.table == "table7":
        score, _, joined = figure.column.partition("_")
        return Counterpart(cells, rule, "mIoUI" if figure.column == "p" else score, joined or "p")
    return Counterpart(cells, rule, figure.column, "mean" if len(cells) > 1 else "one")


def table_cells(name: str) -> list[Cell]:
    """The trainings of a table, of `all` of them, or of `laptop`, each once."""
    tables = load_tables()
    if name == LAPTOP:
        return join_cells(laptop_cells())
    if name != ALL and name not in tables:
        raise InputError(f"{name}: unknown table{closest(name, [*tables, ALL, LAPTOP])}")
    chosen = tables.values() if name == ALL else [tables[name]]
    return join_cells(cell for table in chosen for figure in table.figures for cell in figure_cells(figure))


def with_settings(cells: Iterable[Cell], overrides: Sequence[str], weights: str | None) -> list[Cell]:
    """Further overrides for all cells, and a file of encoder weights for those that take MobileNetV2's."""
    changed = []
    for cell in cells:
        more = tuple(overrides)
        if weights is not None and cell.model.endswith("mobilenetv2_100"):
            more = (f"model.pretrained={weights}", *more)
        changed.append(replace(cell, overrides=(*cell.overrides, *more)))
    return changed
