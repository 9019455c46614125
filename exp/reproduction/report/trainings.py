"""The trainings below a folder: those of the paper's tables and others, those that differ in their seeds, series."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from exp.reproduction.measured import Measured, Training
from exp.reproduction.plans import ALL, table_jobs
from exp.reproduction.report.series import Series, find_series


@dataclass(frozen=True)
class Trainings:
    """By name, length and seed: those that belong to no table of the paper (`others`), those of its tables (`paper`),
    and rules evaluated on true probabilities (`true_maps`)."""

    others: tuple[Training, ...]
    paper: tuple[Training, ...]
    true_maps: tuple[Training, ...]

    @property
    def all_others(self) -> tuple[Training, ...]:
        return *self.others, *self.true_maps

    @property
    def seeded(self) -> list[list[Training]]:
        """Those that differ in their seeds alone, together; each with argmax and another rule."""
        return [group for group in group_seeds(self.others) if len(group) > 1 and len(group[0].results) > 1]

    @property
    def series(self) -> list[Series]:
        return find_series(self.others, self.true_maps)


def find_trainings(measured: Measured) -> Trainings:
    digests = {job.digest for job in table_jobs(ALL)}
    found: tuple[list[Training], list[Training]] = ([], [])
    for digest, training in measured.trainings():
        found[digest in digests].append(training)
    others, paper = (
        tuple(sorted(ts, key=lambda t: (t.name, t.iteration, t.config["seed"], len(t.place), t.place))) for ts in found
    )
    return Trainings(others, paper, tuple(sorted(measured.true_maps(), key=lambda t: (t.name, t.place))))


def group_seeds(trainings: Iterable[Training]) -> list[list[Training]]:
    """Trainings that differ in their seed alone, together; of several evaluations of one seed the first."""
    groups: dict[tuple, dict[int, Training]] = {}
    for training in trainings:
        groups.setdefault(training.unseeded, {}).setdefault(training.config["seed"], training)
    return [list(group.values()) for group in groups.values()]


def training_titles(trainings: Sequence[Training]) -> list[str]:
    """One title each; further evaluations of one training have the names of their folders in it."""
    titles: list[str] = []
    for training in trainings:
        folder = PurePosixPath(training.place).parent.name
        titles.append(f"{training.title} ({folder})" if training.title in titles else training.title)
    return titles
