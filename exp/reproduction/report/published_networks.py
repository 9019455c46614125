"""Networks that others trained: measured beside their owners' scores, and the paper's of the same architecture."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exp.data.registry import DATASETS
from exp.evaluation.comparison import mean_interval, paired_differences
from exp.evaluation.metrics import EvalResult, compute_scores
from exp.reproduction.existing import differences
from exp.reproduction.job import Job
from exp.reproduction.measured import Measured, Training, other_images
from exp.reproduction.plans import PUBLISHED, RULES, table_jobs
from exp.reproduction.published import load_tables
from exp.reproduction.report.sections import Section, format_interval, format_number, text_rows

GROUP = "Networks that others trained"
TOLERANCE = 1.0  # points by which a measured mIoU may differ from what the owner states
HEADER = (
    "network", "data", "rule", "mIoUD", "mIoUI", "mDiceI", "mIoUI - argmax", "95 % interval", "paper: mIoUI",
    "paper: - argmax",
)  # fmt: skip
NOTE = (
    "The last two columns are the paper's, of the same architecture: other weights, trained by its authors. "
    "`python scripts/reproduce.py published --data_dir DATA --output_dir OUTPUT` evaluates every network whose data "
    "set is there."
)


@dataclass(frozen=True)
class Evaluated:
    """A network that others trained, with the results of its rules, argmax first. paths: their JSONs."""

    job: Job
    paths: tuple[Path, ...]
    results: tuple[EvalResult, ...]

    @property
    def name(self) -> str:
        return self.job.config.model.name

    @property
    def is_wrong(self) -> bool:
        """Whether the owner's score is missed by more than TOLERANCE, on the images that it was measured on."""
        stated = self.job.config.model.miou
        return stated is not None and self._comparable is None and abs(self._measured - stated) > TOLERANCE

    @property
    def verdict(self) -> str:
        """A line: the measured mIoU beside its owner's."""
        stated, line = self.job.config.model.miou, f"{self.name}: mIoU {self._measured:.2f} under argmax"
        if stated is None:
            return f"{line}; its owner states none"
        why = self._comparable
        if why is not None:
            return f"{line}, {stated:g} by its owner: not to be compared ({why})"
        said = f"WRONG: more than {TOLERANCE:g} point from it" if self.is_wrong else "as stated"
        return f"{line}, {stated:g} by its owner: {said}"

    @property
    def _measured(self) -> float:
        return compute_scores(self.results[0].counts, self.results[0].cases)["mIoUD"]

    @property
    def _comparable(self) -> str | None:
        """Why the owner's score is that of other images; None: it is not."""
        data, model = self.job.config.data, self.job.config.model
        if model.miou_on is not None:
            return f"the owner's images: {model.miou_on}"
        total, number = DATASETS[data.dataset].totals.get(data.val_split), len(self.results[0].names)
        return None if total in (None, number) else f"{number} of {total} images"


def evaluated_networks(measured: Measured, jobs: Iterable[Job] | None = None) -> list[Evaluated]:
    """The networks that have results of argmax, with those of their other rules on the same weights and images.

    jobs: None: those of the plan.
    """
    found, contents = [], dict(measured.existing.published)
    if not contents:
        return found
    for job in table_jobs(PUBLISHED) if jobs is None else jobs:
        by_rule = {rule: path for rule in job.rules if (path := measured.existing.find(job, rule)) is not None}
        if "argmax" not in by_rule:
            continue
        base = contents[by_rule["argmax"]]
        alike = [path for path in by_rule.values() if not differences(base, contents[path])]
        pairs = [(path, result) for path in alike if (result := measured.load(path)) is not None]
        if pairs and pairs[0][1].rule == "argmax":
            same = [(path, result) for path, result in pairs if not other_images(pairs[0][1], result)]
            found.append(Evaluated(job, *zip(*same)))
    return found


def not_among(networks: Sequence[Evaluated], trainings: Iterable[Training]) -> list[Training]:
    """The trainings without those of which every rule is in the section of published networks."""
    shown = {path for network in networks for path in network.paths}
    return [t for t in trainings if any(t.folder / f"{rule}.json" not in shown for rule in t.rules)]


def published_sections(networks: Sequence[Evaluated]) -> list[Section]:
    """One section; none where no network was evaluated."""
    if not networks:
        return []
    rows = [row for network in networks for row in _rows(network)]
    verdicts = tuple(network.verdict for network in networks)
    return [Section("published", GROUP, "Published networks", HEADER, text_rows(rows), NOTE, notes=verdicts)]


def _rows(network: Evaluated) -> Iterator[tuple[str, ...]]:
    base, model, data = network.results[0], network.job.config.model, network.job.data
    for result in network.results:
        scores = compute_scores(result.counts, result.cases)
        values = paired_differences(base, result, "mIoUI")
        gain, interval = (None, None) if result is base else (float(values.mean()), mean_interval(values))
        paper, paper_gain = paper_values(model.like, data, result.rule)
        yield (
            network.name, data, result.rule, *(format_number(scores[n]) for n in ("mIoUD", "mIoUI", "mDiceI")),
            format_number(gain, signed=True), format_interval(interval), format_number(paper),
            format_number(paper_gain, signed=True),
        )  # fmt: skip


def paper_values(row: str | None, data: str, rule: str) -> tuple[float | None, float | None]:
    """The paper's mIoUI of a row (a model YAML) on a data set under a rule, and its gain over argmax; None: none."""
    printed = next((name for name, ours in RULES.items() if ours == rule), None)
    by_rule = {}
    for table in ("table1", "readme_natural"):
        for value in load_tables()[table].values:
            if (value.row, value.data, value.column) == (row, data, "mIoUI") and value.value is not None:
                by_rule.setdefault(value.rule, value.value)
    value, base = by_rule.get(printed), by_rule.get("argmax")
    return value, None if value is None or base is None or rule == "argmax" else value - base
