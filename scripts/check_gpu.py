#!/usr/bin/env python
"""Is the program right and fast on this machine's CUDA devices? A verdict and the figures within a time budget:

    python scripts/check_gpu.py --dry_run                            # the parts and what they take; needs no device
    python scripts/check_gpu.py --output gpu --minutes 10            # everything, the most important first
    python scripts/check_gpu.py --output gpu --parts rules networks --networks 512x1024 --data_dir DATA
    python scripts/check_gpu.py --output gpu --keep                  # into docs/gpu.md; needs no device

One device is enough; the part nccl uses all. No network and no data set is needed; with --data_dir the training is on
CamVid. Every part runs in a process of its own within its share of the time that is left, so one that crashes or hangs
costs the others nothing. DIR/results.jsonl gets every row at once, DIR/results.md the tables, DIR/speeds.json the
measured speeds, DIR/log.txt all output. --keep merges them: every part that ran (of --parts) replaces that part of
docs/gpu.md, every speed that of exp/reproduction/speeds.json, and all else stays as it is.
Exit status: 0 all is right, 1 something is wrong, 2 there is no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exp.files.atomic import move_aside, write_atomically
from exp.runtime.errors import InputError, run_and_report
from scripts.benchmarks.gpu.page import Page, format_page, make_page, merge_pages, parse_page

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
NO_DEVICE = "no CUDA device here: nothing was checked (--dry_run lists the parts)"
NOT_BEGUN = "not begun"
PAGE, SPEEDS = ROOT / "docs" / "gpu.md", ROOT / "exp" / "reproduction" / "speeds.json"
FILES = ("results.jsonl", "results.md", "log.txt", "speeds.json")
GRACE = 15  # seconds that a part may take beyond its share before it is ended
ENDING = 3  # seconds that the last part keeps of its share, beyond which there is nothing
START = time.monotonic()  # importing PyTorch is part of a part's share


@dataclass(frozen=True)
class Part:
    """module: has a function `check_<name>(check)`. minutes: of some ten, which the budget is shared out by."""

    module: str
    minutes: float
    text: str


PARTS = {  # in the order of their importance
    "tests": Part("training", 2.0, "the tests marked gpu"),
    "rules": Part("rules", 1.4, "the rule's labels against the CPU's; its time and memory beside other rules'"),
    "networks": Part("networks", 2.4, "the paper's networks: images/s in training, windows/s in evaluation, memory"),
    "training": Part("training", 1.6, "a training, interrupted and resumed; its evaluation against the CPU's"),
    "nccl": Part("training", 0.6, "SyncBN and DDP in a process group against one process without a group"),
    "loader": Part("loader", 0.8, "how many workers keep one device busy at 512x512"),
    "compile": Part("networks", 1.6, "training steps under torch.compile beside the same ones without"),
}


@dataclass
class Check:
    """What a part is given: where, on what and for how long it runs, and where its findings go."""

    part: str
    device: torch.device
    output: Path
    seconds: float
    data_dir: Path | None
    networks: tuple[str, ...] = ()
    start: float = field(default_factory=time.monotonic)

    @property
    def tiny(self) -> bool:
        """On a CPU, which only the tests of this script ask for, everything is small."""
        return self.device.type == "cpu"

    def left(self) -> float:
        """Seconds of this part's share."""
        return self.seconds - (time.monotonic() - self.start)

    def row(self, table: str, **values: Any) -> None:
        """A line of one of the part's tables, written at once."""
        write_row(self.output, {"part": self.part, "table": table, "values": values})

    def wrong(self, text: str) -> None:
        write_row(self.output, {"part": self.part, "wrong": text})
        print(f"wrong: {text}", flush=True)

    def say(self, text: str) -> None:
        """A sentence of the report."""
        write_row(self.output, {"part": self.part, "note": text})
        print(text, flush=True)


def write_row(output: Path, row: dict[str, Any]) -> None:
    with open(output / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/check_gpu"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=10, help="the whole of it takes no longer (default: 10)")
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="holds camvid/, and weights/ if there are any")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all)")
    text = "of the part networks those with WORD in their name, crop (512x1024) or setting (bf16) (default: all)"
    parser.add_argument("--networks", nargs="+", default=[], metavar="WORD", help=text)
    parser.add_argument("--dry_run", action="store_true", help="list the parts and their minutes, run nothing")
    text = "run nothing: merge what DIR has of --parts into docs/gpu.md and exp/reproduction/speeds.json"
    parser.add_argument("--keep", action="store_true", help=text)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)  # for its tests
    parser.add_argument("--run_part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def shares(parts: Iterable[str], minutes: float) -> dict[str, float]:
    """Parts -> the minutes that each gets of a budget."""
    total = sum(PARTS[name].minutes for name in parts)
    return {name: minutes * (PARTS[name].minutes / total) for name in parts}


def describe_machine(device: str) -> dict[str, str]:
    """Device, driver, libraries and code, by name."""
    import torch

    from exp.provenance import describe_code

    code = describe_code()
    facts = {"date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), "commit": code["revision"]}
    if device == "cuda":
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        facts["devices"] = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names)
        facts["driver"] = _driver()
        facts["CUDA, cuDNN"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    facts["processor"] = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    versions = {**code["versions"], **_versions(("triton", "rankseg", "opencv-python-headless"))}
    return {**facts, "versions": ", ".join(f"{name} {value}" for name, value in versions.items())}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _versions(names: Iterable[str]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def run_part(args: argparse.Namespace) -> None:
    """In a process of its own: one part; whatever it raises is a wrong outcome."""
    import torch

    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    check = Check(args.run_part, device, args.output, args.seconds, args.data_dir, tuple(args.networks), START)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        module = importlib.import_module(f"scripts.benchmarks.gpu.{PARTS[args.run_part].module}")
        getattr(module, f"check_{args.run_part}")(check)
    except Exception as error:
        traceback.print_exc()
        check.wrong(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def start_part(name: str, seconds: float, limit: float, args: argparse.Namespace) -> str:
    """Run a part in a process of its own, which is ended after `limit` seconds -> how it ended."""
    command = [sys.executable, __file__, "--run_part", name, "--seconds", f"{seconds:.1f}", "--output", args.output]
    command += ["--device", args.device, *(("--data_dir", args.data_dir) if args.data_dir else ())]
    command += ["--networks", *args.networks] if args.networks else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with open(args.output / "log.txt", "a", encoding="utf-8") as log:
        log.write(f"\n==== {name}\n")
        log.flush()
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s"
        finally:
            _end_group(process)
    return "done" if status == 0 else f"crashed with status {status}"


def _end_group(process: subprocess.Popen) -> None:
    """The part and everything that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def read_rows(output: Path) -> list[dict[str, Any]]:
    rows = []
    for line in (output / "results.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut off with the process that wrote it
            rows.append({"part": "check", "wrong": f"half a line: {line[:80]}"})
    return rows


def make_own_page(output: Path, parts: Iterable[str] = PARTS) -> Page:
    """The page of a check's folder."""
    return make_page(read_rows(output), {name: part.text for name, part in PARTS.items()}, list(parts))


def keep(output: Path, parts: list[str]) -> None:
    """Merge the parts that ran into docs/gpu.md, and the measured speeds into exp/reproduction/speeds.json."""
    if not (output / "results.jsonl").is_file():
        raise InputError(f"--output {output}: got a folder without results.jsonl, expected that of a check")
    rows = read_rows(output)
    ran = {row["part"] for row in rows if "outcome" in row and not row["outcome"].startswith(NOT_BEGUN)}
    kept = [name for name in parts if name in ran]
    text = PAGE.read_text(encoding="utf-8")
    page = merge_pages(parse_page(text), make_own_page(output, kept))
    speeds = output / "speeds.json"
    if "networks" in kept and speeds.is_file():
        write_atomically(SPEEDS, json.dumps(merge_speeds(SPEEDS, speeds), indent=1) + "\n")
    write_atomically(PAGE, format_page(page, PARTS))
    print(
        f"{PAGE}: {', '.join(kept) or 'nothing new'}; what is written by hand there is to be brought up to date by hand"
    )


def merge_speeds(old_path: Path, new_path: Path) -> dict[str, Any]:
    """Two files of speeds -> one, with the newer speed where both have one; InputError if they are of two machines."""
    new = json.loads(new_path.read_text(encoding="utf-8"))
    if not old_path.is_file():
        return new
    old = json.loads(old_path.read_text(encoding="utf-8"))
    for name in ("device", "torch"):
        if old[name] != new[name]:
            raise InputError(
                f"{new_path}: got speeds of {name} {new[name]}, expected {old[name]} as in {old_path} (move that away)"
            )
    return {**new, "networks": old["networks"] | new["networks"]}


def run_parts(args: argparse.Namespace) -> bool:
    """All parts asked for, one after the other -> whether all is right."""
    end, output = time.monotonic() + 60 * args.minutes, args.output
    output.mkdir(parents=True, exist_ok=True)
    move_aside([output / name for name in FILES])  # an earlier check's, or anybody's
    command = shlex.join(["python", "scripts/check_gpu.py", *sys.argv[1:]])
    machine = {**describe_machine(args.device), "command": f"`{command}`"}
    write_row(output, {"machine": machine, "networks": args.networks})
    for place, name in enumerate(args.parts):
        start = time.monotonic()
        seconds = 60 * shares(args.parts[place:], (end - start) / 60)[name]
        limit = min(seconds + GRACE, end - start)
        ended = f"{NOT_BEGUN}: no time was left"
        if limit > ENDING:
            ended = start_part(name, min(seconds, limit - ENDING), limit, args)
        found_wrong = any(row.get("part") == name and "wrong" in row for row in read_rows(output))
        outcome = "wrong" if ended == "done" and found_wrong else "right" if ended == "done" else ended
        write_row(output, {"part": name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)})
        (output / "results.md").write_text(format_page(make_own_page(output), PARTS), encoding="utf-8")
        print(f"{name}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
    rows = read_rows(output)
    for row in rows:
        if "wrong" in row:
            print(f"wrong: {row['part']}: {row['wrong']}")
    print(output / "results.md")
    return all(row["outcome"] == "right" for row in rows if "outcome" in row) and not any("wrong" in r for r in rows)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.networks and not args.run_part:
        from scripts.benchmarks.gpu.networks import plan_networks

        if status := run_and_report(lambda: plan_networks(args.networks)):
            return status
    if args.dry_run:
        for name, minutes in shares(args.parts, args.minutes).items():
            print(f"{name:<9} {minutes:4.1f} min  {PARTS[name].text}")
        return 0
    args.output = args.output.resolve()
    args.data_dir = args.data_dir.resolve() if args.data_dir else None
    if args.keep:
        return run_and_report(lambda: keep(args.output, args.parts))
    if args.run_part:
        run_part(args)
        return 0
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print(NO_DEVICE, file=sys.stderr)
            return 2
    return 0 if run_parts(args) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without a wait for the compiler's processes, which a part that ran out of time leaves behind
