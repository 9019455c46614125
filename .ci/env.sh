# Sourced by what stands in scripts/: sets ROOT and PYTHON, and makes ROOT/.venv where it is not yet complete.
# RANKSEG_PYTHON names an existing Python that has the requirements; then nothing is installed.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -n "${RANKSEG_PYTHON:-}" ]; then
    PYTHON="$RANKSEG_PYTHON"
    command -v "$PYTHON" >/dev/null || { echo "error: RANKSEG_PYTHON=$PYTHON: no such program" >&2; exit 2; }
else
    PYTHON="$ROOT/.venv/bin/python"
    if ! cmp -s "$ROOT/requirements.txt" "$ROOT/.venv/installed-requirements.txt"; then
        echo "installing the requirements into $ROOT/.venv (once; some minutes)" >&2
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            { echo "error: got $(python3 --version), expected Python 3.10 or newer as python3" >&2; exit 2; }
        python3 -m venv "$ROOT/.venv"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
        cp "$ROOT/requirements.txt" "$ROOT/.venv/installed-requirements.txt"
    fi
fi
