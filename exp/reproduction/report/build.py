"""The report of a folder: its sections, and the files that the writers make of them."""

from pathlib import Path

from exp.files.atomic import write_atomically
from exp.reproduction.measured import Measured
from exp.reproduction.published import load_tables
from exp.reproduction.report.page import html
from exp.reproduction.report.paper import csv_text, published_section, summary, table_lines
from exp.reproduction.report.published_networks import evaluated_networks, not_among, published_sections
from exp.reproduction.report.training_sections import (
    describe_run,
    other_sections,
    overview_sections,
    paper_sections,
    run_section,
)
from exp.reproduction.report.writers import latex, markdown, update_readme
from exp.runtime.commands import PAGE
from exp.runtime.errors import InputError


def write_report(output: Path, readme: Path | None = None) -> Path:
    """Write <output>/report/tables.{md,tex,csv} and index.html from the results below `output` -> the folder.

    What was measured comes first: the paper's tables if any of their lines is, or else the other trainings.
    readme: a file in which the results between two marks are renewed, too.
    Of the folder of a single run that run alone is told, without the published tables.
    """
    measured = Measured(output)
    if (output / "results").is_dir():
        if readme is not None:
            raise InputError(f"--readme: got {output}, a single run, expected a folder with runs below it")
        return _write_run(measured)
    tables = load_tables().values()
    by_table = [table_lines(table, measured) for table in tables]
    lines = [line for own in by_table for line in own]
    networks = evaluated_networks(measured)
    trained, others = measured.trainings()
    others = not_among(networks, others)
    paper = [*map(published_section, tables, by_table), *paper_sections(trained)]
    parts = [paper, other_sections(others)]
    first, second = parts if any(line.measured is not None for line in lines) else parts[::-1]
    sections, lead = [*published_sections(networks), *first, *second], summary(lines, others)
    folder = output / "report"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "tables.md", markdown(sections, lead))
    write_atomically(folder / "tables.tex", latex(sections))
    write_atomically(folder / "tables.csv", csv_text(lines))
    write_atomically(folder / PAGE, html(sections, lead))
    if readme is not None:
        update_readme(readme, overview_sections(others), lead)
    return folder


def _write_run(measured: Measured) -> Path:
    """Write tables.md, tables.tex and index.html of a single run -> the folder."""
    training = measured.run()
    if training is None:
        raise InputError(
            f"{measured.output / 'results'}: got no results of argmax, expected them beside other rules' "
            "(--predict_yaml argmax RULE evaluates both)"
        )
    sections, lead = [run_section(training)], describe_run(training)
    folder, title = measured.output / "report", training.title
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "tables.md", markdown(sections, lead, title))
    write_atomically(folder / "tables.tex", latex(sections))
    write_atomically(folder / PAGE, html(sections, lead, title))
    return folder
