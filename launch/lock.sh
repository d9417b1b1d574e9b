#!/usr/bin/env bash
# Renews the locks: every package that setup.py asks for, with its hashes.   launch/lock.sh [flags of uv]
# requirements.lock is for working on the code; launch/locks/ has what images install, at the same versions.
# All hold what clouds need (gcs, s3, k8s): images run there, and tests of object stores and of pods need it here.
#   launch/lock.sh --upgrade                 the newest versions; without it what is locked stays
#   launch/lock.sh --upgrade-package jax     of one package
# Needs uv (pip install uv) and a package index. Afterwards run launch/test.sh, which installs what has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v uv >/dev/null; then
  echo "lock: uv is not there; pip install uv, see https://docs.astral.sh/uv." >&2
  exit 1
fi
clouds="--extra gcs --extra s3 --extra k8s"
new=$(mktemp requirements.XXXXXX)
trap 'rm -f "$new" "$new.whole"' EXIT
cp requirements.lock "$new"
uv pip compile setup.py --extra dev $clouds --generate-hashes --python-version 3.11 --universal --no-header --quiet \
  "$@" -o "$new" >/dev/null
# Whole or not at all: launch/install.sh may read it at the same time.
{ echo "# Every version, with hashes. Made by launch/lock.sh."; cat "$new"; } >"$new.whole"
mv "$new.whole" requirements.lock
mkdir -p launch/locks
for extra in cpu cuda12 cuda13 tpu; do
  # The versions of requirements.lock, without its hashes, as constraints.
  uv pip compile setup.py $([ $extra = cpu ] || echo --extra $extra) $clouds --generate-hashes \
    --python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-header --no-annotate --quiet \
    -c <(sed -n '/^[a-zA-Z0-9]/s/ *\\$//p' requirements.lock) -o "$new" >/dev/null
  { echo "# Of an image with EXTRA=$extra. Made by launch/lock.sh."; cat "$new"; } >"$new.whole"
  mv "$new.whole" launch/locks/$extra.txt
done
git --no-pager diff --stat -- requirements.lock launch/locks || true
