#!/usr/bin/env bash
# Installs, then runs the tests on four virtual CPU devices.   launch/test.sh [pytest flags, e.g. -m slow]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec .venv/bin/python -m pytest "$@"
