"""The report of a folder: its sections, and the files that the writers make of them."""

from pathlib import Path

from exp.files.atomic import write_atomically
from exp.reproduction.measured import Measured
from exp.reproduction.published import load_tables
from exp.reproduction.report.page import html
from exp.reproduction.report.paper import published_section, summary
from exp.reproduction.report.sections import Section
from exp.reproduction.report.training_sections import other_sections, overview_sections, paper_sections
from exp.reproduction.report.trainings import Trainings, find_trainings
from exp.reproduction.report.writers import csv_text, latex, markdown, update_readme


def build_sections(measured: Measured, trainings: Trainings) -> tuple[list[Section], str]:
    """Everything in its order, and what comes before it in a few sentences.

    What was measured comes first: the paper's tables if any of their lines is, or else the other trainings.
    """
    published = [published_section(table, measured) for table in load_tables().values()]
    lines = [line for section in published for line in section.lines]
    paper, others = [*published, *paper_sections(trainings)], other_sections(trainings)
    is_measured = any(line.measured is not None for line in lines)
    return [*paper, *others] if is_measured else [*others, *paper], summary(lines, trainings)


def write_report(output: Path, readme: Path | None = None) -> Path:
    """Write <output>/report/tables.{md,tex,csv} and index.html from the results below `output` -> the folder.

    readme: a file in which the results between two marks are renewed, too.
    """
    measured = Measured(output)
    trainings = find_trainings(measured)
    sections, lead = build_sections(measured, trainings)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "tables.md", markdown(sections, lead))
    write_atomically(folder / "tables.tex", latex(sections))
    write_atomically(folder / "tables.csv", csv_text(sections))
    write_atomically(folder / "index.html", html(sections, lead))
    if readme is not None:
        update_readme(readme, overview_sections(trainings, main_rules=True), lead)
    return folder
