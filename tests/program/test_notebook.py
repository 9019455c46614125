"""The notebook of examples/ runs from top to bottom, in a kernel and folder of its own, as a person would run it."""

import re

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "examples"


def printed_text(notebook) -> str:
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages between here and the kernel
def test_the_notebook_runs_and_its_rules_gain():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(FOLDER / "rule_on_your_network.ipynb", as_version=4)
    before = printed_text(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = printed_text(notebook)
    stored, found = ([float(number) for number in re.findall(r"\d+\.\d+", part)] for part in (before, text))
    assert found == pytest.approx(stored, abs=0.05), "the notebook shows figures of before: run it again"
    lowest = re.findall(r"^(rankseg_\w+).*? \[([+-]\d+\.\d+),", text, re.MULTILINE)
    assert [name for name, _ in lowest] == ["rankseg_rma", "rankseg_rma", "rankseg_levelset"]
    assert all(float(low) > 0 for _, low in lowest)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
