"""Ask the public lists of vulnerabilities about the packages that the project runs on.

    python scripts/audit.py

Two questions to pip-audit, which is installed into a folder of its own that is removed again: are there known
vulnerabilities in what is installed beside this Python, and in the oldest versions that requirements.txt allows?
Exit status 0: none but those of ACCEPTED below, or nobody could be asked, which is said ("skipped: ..."); 1: there are.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.runtime.errors import InputError, run_and_report

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
# Findings that do no harm here: identifier (or an alias of it) -> why.
ACCEPTED: dict[str, str] = {}
SERVICES = ("pypi", "osv")  # the second where the first is not reached
TIMEOUT = 300  # seconds for a question; some 60 packages take half a minute
NO_NETWORK = re.compile(
    r"ConnectionError|NameResolution|Max retries|ConnectTimeout|ReadTimeout|timed out|ProxyError|HTTPError"
)


class Unreachable(Exception):
    """Nobody could be asked, and why."""


def lower_bounds(text: str) -> list[str]:
    """requirements.txt -> the oldest version that each line allows, 'name==version'; InputError for a line without."""
    pins = []
    for line in text.splitlines():
        requirement = line.partition("#")[0].strip()
        if not requirement:
            continue
        match = re.match(r"([A-Za-z0-9._-]+)(?:>=|==)([0-9][0-9.]*)", requirement)
        if not match:
            raise InputError(f"{REQUIREMENTS}: got '{requirement}', expected a lower bound")
        pins.append(f"{match[1]}=={match[2]}")
    return pins


def find_new(report: Mapping[str, Any], accepted: Mapping[str, str]) -> list[str]:
    """pip-audit's JSON -> a line for each finding that is not accepted; Unreachable if no package was looked up."""
    packages = report["dependencies"]
    if packages and all("skip_reason" in package for package in packages):
        raise Unreachable(f"none of {len(packages)} packages was looked up ({packages[0]['skip_reason']})")
    lines = []
    for package in packages:
        for finding in package.get("vulns", ()):
            names = {finding["id"], *finding.get("aliases", ())}
            if not names & accepted.keys():
                fixed = ", ".join(finding.get("fix_versions", ())) or "no version yet"
                lines.append(f"{package['name']} {package['version']}: {', '.join(sorted(names))}; fixed in {fixed}")
    return lines


def ask(audit: Path, question: Sequence[str], service: str) -> dict[str, Any]:
    """Flags of pip-audit that say what is looked up -> its JSON; Unreachable without an answer."""
    command = [audit, *question, "--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"no answer in {TIMEOUT} s") from None
    last = (done.stderr.strip() or "no answer").splitlines()[-1][:200]
    try:
        return json.loads(done.stdout)
    except ValueError:
        if NO_NETWORK.search(done.stderr):
            raise Unreachable(last) from None
        raise InputError(f"pip-audit: got '{last}', expected a report in JSON") from None


def install(folder: Path) -> Path:
    """A folder -> pip-audit's program in a new environment there; Unreachable if it cannot be had."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    command = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"pip-audit was not installed in {TIMEOUT} s") from None
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1][:300]
        raise Unreachable(f"pip-audit could not be installed: {reason}")
    return programs / "pip-audit"


def answer(audit: Path, question: Sequence[str]) -> list[str]:
    """A question -> what is found and not accepted, from the first service that answers; Unreachable if none does."""
    reasons = []
    for service in SERVICES:
        try:
            return find_new(ask(audit, question, service), ACCEPTED)
        except Unreachable as error:
            reasons.append(f"{service}: {error}")
    raise Unreachable(f"no list of vulnerabilities was reached; {'; '.join(reasons)}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pins = lower_bounds(REQUIREMENTS.read_text(encoding="utf-8"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        oldest = Path(folder) / "oldest.txt"
        oldest.write_text("\n".join(pins) + "\n", encoding="utf-8")
        questions = {
            "installed packages": ["--path", sysconfig.get_path("purelib")],
            "oldest versions that requirements.txt allows": ["-r", str(oldest), "--no-deps", "--disable-pip"],
        }
        try:
            audit = install(Path(folder) / "environment")
            for what, question in questions.items():
                lines = answer(audit, question)
                print(*lines, f"{what}: {len(lines) or 'no'} known vulnerabilities", sep="\n", flush=True)
                found += lines
        except Unreachable as error:
            print(f"skipped: {error}")
    if found:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_and_report(main))
