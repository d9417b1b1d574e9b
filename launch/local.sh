#!/usr/bin/env bash
# The Kuramoto–Sivashinsky pipeline on this machine: install, simulate, debias, train, sample, report.
#   launch/local.sh [WORKDIR] [flags of `downscaling pipeline`]     WORKDIR defaults to runs/ks in the checkout
set -euo pipefail
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then workdir=$(realpath -m "$1"); shift; fi
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec .venv/bin/python -m downscaling pipeline --config="${CONFIG:-configs/ks.py}" --workdir="${workdir:-$PWD/runs/ks}" "$@"
