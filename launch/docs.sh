#!/usr/bin/env bash
# Builds the documentation site into build/docs; every warning is an error.
#   launch/docs.sh [flags of `mkdocs build`]     then open build/docs/index.html, also without a network
# Installs the extra `docs` of setup.py into .venv-docs. The site reads docstrings and imports nothing,
# so neither jax nor the package is installed there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python3}"
packages=$("$PYTHON" - <<'READ'
import ast
import pathlib

for node in ast.parse(pathlib.Path("setup.py").read_text()).body:
  if isinstance(node, ast.Assign) and node.targets[0].id == "DOCS":
    print(*ast.literal_eval(node.value), sep="\n")
READ
)
if [ -z "$packages" ]; then
  echo "docs: setup.py has no list DOCS, which names the packages of the site." >&2
  exit 1
fi
stamp=.venv-docs/installed.txt
if [ "$(cat "$stamp" 2>/dev/null)" != "$packages" ]; then
  [ -x .venv-docs/bin/python ] || "$PYTHON" -m venv .venv-docs
  mapfile -t list <<<"$packages"
  .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check "${list[@]}"
  echo "$packages" >"$stamp"
fi
exec .venv-docs/bin/python -m mkdocs build --strict "$@"
