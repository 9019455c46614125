#!/usr/bin/env bash
# Run the tests (flags go to pytest; "-m slow" runs the longer ones, "-m long" the longest). RANKSEG_TEST_DATA names a
# folder with camvid/, hippocampus/, weights/ and others for the tests on real data, which skip without it.
source "$(dirname "${BASH_SOURCE[0]}")/../.ci/env.sh"
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a core for each of the two
exec "$PYTHON" -m pytest --numprocesses 2 "$@" # a later --numprocesses, 0 for one process, wins
