"""Tables -> the trainings that they need, and for every published value the one that gives its counterpart."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from exp.config.experiment import CONFIG_DIR, load_published
from exp.config.published import FOLDER
from exp.config.strict_yaml import closest, load_mapping
from exp.reproduction.job import Job, join_jobs
from exp.reproduction.laptop import laptop_jobs
from exp.reproduction.published import PublishedValue, load_tables
from exp.runtime.errors import InputError

NATURAL = ("pascal_voc", "cityscapes", "ade20k")
MEDICAL = ("lits", "kits")
FOLDS, SEEDS = range(5), range(10)
UPERNET = "upernet_convnext_base.fb_in22k_ft_in1k_384"
DEEPLAB = "deeplabv3plus_resnet50d"
SCHEDULES = {
    "pascal_voc": "40k_iters",
    "cityscapes": "40k_iters",
    "ade20k": "80k_iters",
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
OURS = {"rankseg_rma_paper": "rankseg_rma"}  # the rule that this project ships in place of the paper's
LETTER = ("data.augmentation=letter", "test.padding=centred")  # where the defaults are not the paper's
# Scores of the medical tables that the paper's code takes within each case: its name -> the name of that here.
WITHIN_CASES = {"Acc": "mAcc3D", "mAccD": "mAcc3D", "mIoUD": "mIoU3D", "mDiceD": "mDice3D"}
ALL, LAPTOP, PUBLISHED = "all", "laptop", "published"
# Of networks that others trained: the rules that decide on many classes and look at an image once.
ONE_PASS = (
    "argmax",
    "rankseg_rma_paper",
    "rankseg_rma_iou",
    "rankseg_levelset",
    "rankseg_dep",
    "rankseg_dep_levels",
    "rankseg_rma",
)


@dataclass(frozen=True)
class Counterpart:
    """Where the measured value of a published value comes from: a rule's score on jobs, and how these are joined.

    score: a name in `metrics` of results/<rule>.json, "IoUC:<class>" in `per_class`, or "seconds:<step>" of the timing.
    joined: "one" job, the "mean" over folds or seeds, their standard deviation ("std"), or "p" of the paired test.
    """

    jobs: tuple[Job, ...]
    rule: str
    score: str
    joined: str = "one"


def paper_job(model: str, data: str, rules: Sequence[str], *, fold: int | None = None, seed: int = 0) -> Job:
    """The paper's training of a network on a data set; docs/fidelity.md says where its settings stand."""
    optim = "sgd_lr1e-2" if data in MEDICAL else "adamw_lr6e-5"
    test = "test_dice" if data in MEDICAL else "test_iou"
    return Job(model, data, SCHEDULES[data], optim, tuple(rules), test=test, fold=fold, seed=seed, overrides=LETTER)


def jobs_behind(published: PublishedValue) -> tuple[Job, ...]:
    """The trainings behind a published value."""
    model = published.row
    if published.table == "table3":
        model = UPERNET if published.data in NATURAL else DEEPLAB
    elif published.table == "table4":
        model = UPERNET
    rules = BASIC
    if published.table == "table6":
        rules = (*BASIC, RULES["prob"], RULES["weight_prob"])
    if published.data in MEDICAL:
        rules = (*BASIC, "rankseg_ba") if published.table in ("table2", "table3") else BASIC
        folds = FOLDS[:1] if published.table == "table3" else FOLDS
        return tuple(paper_job(model, published.data, rules, fold=fold) for fold in folds)
    seeds = SEEDS if published.table == "table7" else SEEDS[:1]
    return tuple(paper_job(model, published.data, rules, seed=seed) for seed in seeds)


def find_counterpart(published: PublishedValue) -> Counterpart:
    """A published value -> where its measured value comes from.

    Where print has another score or data set than is meant, it is that of what is meant.
    """
    for erratum in published.errata:
        meant = erratum.meant or {}
        data, column = meant.get("data", published.data), meant.get("score", published.column)
        published = replace(published, data=data, column=column)
    jobs = jobs_behind(published)
    rule = RULES.get(published.rule, "argmax")
    if published.table == "table3":
        step = "forward" if published.rule == "forward" else f"decision:{rule}"
        return Counterpart(jobs, rule, f"seconds:{step}")
    if published.table == "table4":
        return Counterpart(jobs, rule, f"IoUC:{published.row}")
    if published.table == "table7":
        score, _, joined = published.column.partition("_")
        return Counterpart(jobs, rule, "mIoUI" if published.column == "p" else score, joined or "p")
    score = WITHIN_CASES.get(published.column, published.column) if published.data in MEDICAL else published.column
    return Counterpart(jobs, rule, score, "mean" if len(jobs) > 1 else "one")


def ours_beside(found: Counterpart) -> Counterpart | None:
    """The same value under the rule that is shipped, which the same pass evaluates; None for other rules."""
    rule = OURS.get(found.rule)
    return None if rule is None else replace(found, rule=rule)


def table_jobs(name: str) -> list[Job]:
    """The trainings of a table, of `all` of them, or of `laptop`, each once; or the networks that others trained."""
    tables = load_tables()
    if name == PUBLISHED:
        return join_jobs(map(published_job, published_networks()))
    if name == LAPTOP:
        return join_jobs(laptop_jobs())
    if name != ALL and name not in tables:
        raise InputError(f"{name}: unknown table{closest(name, [*tables, ALL, LAPTOP, PUBLISHED])}")
    chosen = tables.values() if name == ALL else [tables[name]]
    return join_jobs(job for table in chosen for published in table.values for job in jobs_behind(published))


def published_networks() -> list[str]:
    """The networks of configs/model/published that a data set is known for, as --model_yaml has them."""
    names = []
    for path in sorted((CONFIG_DIR / "model" / FOLDER).glob("*.yaml")):
        variants = load_mapping(path).get("variants", {})
        names += [f"{FOLDER}/{path.stem}:{variant}" for variant in variants] or [f"{FOLDER}/{path.stem}"]
    return [name for name in names if load_published(name).data is not None]


def published_job(name: str) -> Job:
    """The evaluation of a network that others trained, on the data set that its YAML names."""
    return Job(name, load_published(name).data, "quickstart", "adamw_lr6e-4", ONE_PASS)


def with_settings(jobs: Iterable[Job], overrides: Sequence[str], weights: str | None) -> list[Job]:
    """Further overrides for all jobs, and a file of encoder weights for those that take MobileNetV2's."""
    own = () if weights is None else (f"model.pretrained={weights}",)
    return [
        replace(job, overrides=(*job.overrides, *(own if job.model.endswith("mobilenetv2_100") else ()), *overrides))
        for job in jobs
    ]
