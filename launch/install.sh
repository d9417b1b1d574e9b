# Sourced by the launch scripts: cd to the checkout, and a .venv beside it that matches requirements.lock.
# Installs only when the lock has changed; needs Python 3.11 or newer and, the first time, a package index.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v "${PYTHON:=python3}" >/dev/null; then
  echo "launch: $PYTHON is not there; need Python 3.11 or newer. Install it, or set PYTHON=/path/to/python3." >&2
  exit 1
fi
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "launch: $("$PYTHON" --version) came, need 3.11 or newer. Set PYTHON=/path/to/python3.11." >&2
  exit 1
fi
stamp=.venv/installed.lock
if ! cmp -s requirements.lock "$stamp"; then
  echo "launch: installing into $PWD/.venv (about 1.7 GB)" >&2
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  # uv where it is there and reaches the index; else pip, slower and always there.
  if ! { command -v uv && uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements.lock; } >/dev/null 2>&1; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index -e .
  cp requirements.lock "$stamp"
fi
# Compiled programs are kept between runs; a second start is seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/jax-cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}"
