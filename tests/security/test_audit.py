"""scripts/audit.py: which findings count, and when nobody could be asked."""

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from exp.runtime.errors import InputError
from tests.conftest import ROOT

FOUND = {
    "dependencies": [
        {"name": "a", "version": "1.0", "vulns": []},
        {
            "name": "b",
            "version": "2.0",
            "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.1"], "description": ""}],
        },
        {"name": "c", "skip_reason": "Dependency not found on PyPI"},
    ]
}
NONE_KNOWN = {"dependencies": [{"name": "a", "skip_reason": "Dependency not found on PyPI"}]}
NO_NETWORK = "requests.exceptions.ConnectionError: Max retries exceeded: Failed to resolve 'api.osv.dev'"


@pytest.fixture
def audit():
    from scripts import audit

    return audit


def test_findings_count_unless_they_are_accepted(audit):
    assert audit.find_new(FOUND, {}) == ["b 2.0: CVE-1, PYSEC-1; fixed in 2.1"]
    assert audit.find_new(FOUND, {"CVE-1": "not used here"}) == []
    with pytest.raises(audit.Unreachable, match=r"none of 1 packages was looked up \(Dependency not found on PyPI\)"):
        audit.find_new(NONE_KNOWN, {})


def test_every_requirement_has_a_lower_bound_that_is_met(audit):
    pins = dict(pin.split("==") for pin in audit.lower_bounds((ROOT / "requirements.txt").read_text()))
    assert len(pins) > 15

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)[:3]]

    for name, oldest in pins.items():
        assert numbers(version(name)) >= numbers(oldest), name
    assert numbers(pins["torch"]) >= [2, 6]  # CVE-2025-32434
    with pytest.raises(InputError, match="got 'torch<3', expected a lower bound"):
        audit.lower_bounds("numpy>=1\ntorch<3  # any")


@pytest.mark.parametrize(
    ("outputs", "status", "part"),
    [
        ({"pypi": (json.dumps(FOUND), "")}, 1, "installed packages: 1 known vulnerabilities"),
        (
            {"pypi": (json.dumps({"dependencies": FOUND["dependencies"][:1]}), "")},
            0,
            "allows: no known vulnerabilities",
        ),
        ({"pypi": (json.dumps(NONE_KNOWN), ""), "osv": ("", NO_NETWORK)}, 0, "skipped: no list of vulnerabilities"),
        ({"pypi": ("", NO_NETWORK), "osv": (json.dumps(FOUND), "")}, 1, "b 2.0: CVE-1, PYSEC-1; fixed in 2.1"),
        ({"pypi": ("", "Traceback\nKeyError: 'a'")}, 2, "pip-audit: got 'KeyError: 'a'', expected a report"),
    ],
)
def test_answers(audit, script, monkeypatch, outputs: dict, status: int, part: str):
    def run(command: list[str], **kwargs) -> subprocess.CompletedProcess:
        out, err = outputs[command[command.index("--vulnerability-service") + 1]]
        return subprocess.CompletedProcess(command, 1, out, err)

    monkeypatch.setattr(audit, "install", lambda folder: Path("pip-audit"))
    monkeypatch.setattr(audit.subprocess, "run", run)
    got, printed, err = script("audit")
    assert got == status
    assert part in printed + err


def test_without_an_index_it_is_skipped(audit, script, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found for pip-audit")
    monkeypatch.setattr(audit.venv, "create", lambda folder, with_pip: None)
    monkeypatch.setattr(audit.subprocess, "run", lambda *args, **kwargs: failed)
    status, printed, _ = script("audit")
    assert status == 0
    assert "skipped: pip-audit could not be installed: ERROR: No matching distribution" in printed
