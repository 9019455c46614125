"""Nothing of the project waits for connections; what torchrun opens for its processes to meet is torchrun's own."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

SOURCES = sorted([*(ROOT / "exp").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "rankseg_rma.py"])
# Modules that serve or are made to; exp.runtime.distributed alone may name torch.distributed (test_architecture.py).
SERVERS = ("http.server", "socketserver", "xmlrpc", "asyncio", "wsgiref", "flask", "werkzeug", "tornado", "aiohttp")
SERVING = ("bind", "listen", "create_server", "serve_forever", "start_server", "launch")
# Runs exp/main.py; a hook of Python's sees what is bound or connected.
DRIVER = """
import json, sys
seen = []
def hook(event, args):
    if event in ("socket.bind", "socket.connect", "socket.sendto", "socket.getaddrinfo"):
        if getattr(args[0], "family", None) != 1:  # AF_UNIX: loader workers hand files over, within the machine
            seen.append([event, repr(args)])
sys.addaudithook(hook)
from exp.runtime.errors import run_and_report
from exp.main import main
status = run_and_report(main)
before = list(seen)
import socket
socket.create_server(("127.0.0.1", 0)).close()
print()
print(json.dumps({"status": status, "seen": before, "control": len(seen) - len(before)}))
"""


def test_a_run_on_one_process_opens_no_port(tmp_path: Path):
    flags = [flag.replace("num_workers=0", "num_workers=1") for flag in TINY]
    flags += ["--output_dir", str(tmp_path), "--save_pred", "1", "--save_masks"]
    command = [sys.executable, "-c", DRIVER, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout.splitlines()[-1])
    assert run == {"status": 0, "seen": [], "control": 1}  # the control would have been seen


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_serves_unpickles_or_runs_text(path: Path):
    """torch.load only with weights_only=True, numpy only with allow_pickle=False, YAML only by the strict loader."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not any(name.startswith(SERVERS) for name in names)
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name.rpartition(".")[2] not in SERVING, f"line {node.lineno}"
        assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.unsafe_load"), name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        if name == "np.load":
            assert keywords.get("allow_pickle") == "False"
        if name == "yaml.load":
            assert keywords.get("Loader") == "_StrictLoader"
        assert keywords.get("shell", "False") == "False"
