#!/usr/bin/env bash
# Installs, then runs the tests on four virtual CPU devices.   launch/test.sh [pytest flags, e.g. -m slow]
# A process for each core, at most four (5 GB each); -n 0 for one alone. Which runs what: tests/conftest.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile "$@"
