"""Nothing of the project waits for connections; what torchrun opens for its processes to meet is torchrun's own."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY

SOURCES = sorted([*(ROOT / "exp").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "rankseg_rma.py"])
# Modules that serve or are made to; exp.runtime.distributed alone may name torch.distributed (test_architecture.py).
SERVERS = ("http.server", "socketserver", "xmlrpc", "asyncio", "wsgiref", "flask", "werkzeug", "tornado", "aiohttp")
SERVING = ("bind", "listen", "create_server", "serve_forever", "start_server", "launch")
# Runs exp/main.py; a hook of Python's sees what Python binds or connects, a thread what anything in the process opens.
DRIVER = """
import json, os, sys, threading
seen, ports, stop = [], set(), threading.Event()
def hook(event, args):
    if event in ("socket.bind", "socket.connect", "socket.sendto", "socket.getaddrinfo"):
        if getattr(args[0], "family", None) != 1:  # AF_UNIX: loader workers hand files over, within the machine
            seen.append([event, repr(args)])
sys.addaudithook(hook)
def listening():
    for name in ("tcp", "tcp6", "udp", "udp6"):
        with open(f"/proc/net/{name}") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if name.startswith("udp") or fields[3] == "0A":  # 0A: waits for connections
                    yield fields[9], f"{name} {fields[1]}"
def watch():
    while not stop.wait(0.02):
        known = dict(listening())
        for fd in os.listdir("/proc/self/fd"):
            try:
                inode = os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").rstrip("]")
            except OSError:
                continue
            if inode in known:
                ports.add(known[inode])
watcher = threading.Thread(target=watch)
watcher.start()
from exp.runtime.errors import run_and_report
from exp.main import main
status = run_and_report(main)
if "--open" in os.environ.get("CONTROL", ""):
    import socket, time
    control = socket.create_server(("127.0.0.1", 0))
    time.sleep(0.2)
stop.set()
watcher.join()
print()
print(json.dumps({"status": status, "seen": seen, "ports": sorted(ports)}))
"""


def watch_run(flags: list[object], control: str = "") -> dict:
    """Flags of exp/main.py -> its status, what Python's sockets did, and the ports that the process had open."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CONTROL": control},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net")
def test_a_run_on_one_process_opens_no_port(tmp_path: Path):
    flags = [flag.replace("num_workers=0", "num_workers=1") for flag in TINY]
    run = watch_run([*flags, "--output_dir", tmp_path, "--save_pred", "1", "--save_masks"])
    assert run["status"] == 0
    assert run["ports"] == []
    assert run["seen"] == []
    control = watch_run([*flags, "--print_config"], control="--open")
    assert len(control["ports"]) == 1  # it would have been seen
    assert any(event == "socket.bind" for event, _ in control["seen"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_serves(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(SERVERS) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith(SERVERS)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in SERVING, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_runs_text(path: Path):
    """torch.load only with weights_only=True, numpy only with allow_pickle=False, YAML only by the strict loader."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.unsafe_load"), name
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        if name == "np.load":
            assert keywords.get("allow_pickle") == "False"
        if name == "yaml.load":
            assert keywords.get("Loader") == "_StrictLoader"
        assert keywords.get("shell", "False") == "False"
