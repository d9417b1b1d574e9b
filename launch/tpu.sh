#!/usr/bin/env bash
# One job over the hosts of a Cloud TPU slice, by queued resources (v4, v5e, v5p, v6e). Ironwood (tpu7x) is had on GKE only.
#   launch/tpu.sh create NAME TYPE          asks for a slice and waits for it, e.g. v5litepod-16, v5p-16, v6e-16, v4-16
#   launch/tpu.sh install NAME              copies the checkout to all hosts and installs it there
#   launch/tpu.sh run NAME JOB [FLAGS ...]  e.g. train --config=configs/ks.py --workdir=/shared/runs/ks
#   launch/tpu.sh delete NAME
#   ZONE=      e.g. us-central2-b     PROJECT=   of gcloud's config if empty     SPOT=1   preemptible, and cheaper
#   VERSION=   of the TPU's software; by the type if empty
# With --dry_run as the first word it prints every line and runs none. Work folders lie on a disk that all hosts see.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() { echo "tpu: $*" >&2; exit 1; }
call() {
  if [ -n "${dry:-}" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
dry=
[ "${1:-}" = --dry_run ] && { dry=1; shift; }
[ $# -ge 2 ] || fail "got '$*', need create, install, run or delete, and a name: launch/tpu.sh create mine v5litepod-16"
verb=$1 name=$2
shift 2
[ -n "${ZONE:-}" ] || fail "ZONE is not set, e.g. ZONE=us-central2-b"
command -v gcloud >/dev/null || [ -n "$dry" ] || fail "gcloud is not there; see https://cloud.google.com/sdk"
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})
vm=(gcloud compute tpus tpu-vm)
on_all() { call "${vm[@]}" ssh "$name" "${where[@]}" --worker=all --command="$1"; }

version_of() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x*) fail "$1 is had on GKE only: launch/gke_jobset.yaml" ;;
    *) fail "$1: need v4-N, v5litepod-N, v5p-N or v6e-N" ;;
  esac
}

case $verb in
  create)
    [ $# = 1 ] || fail "create needs a name and a type: launch/tpu.sh create mine v5litepod-16"
    version=${VERSION:-$(version_of "$1")}
    call gcloud compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
      --accelerator-type="$1" --runtime-version="$version" ${SPOT:+--spot}
    state=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)")
    if [ -n "$dry" ]; then call "${state[@]}"; exit; fi
    while found=$("${state[@]}"); do
      case $found in
        ACTIVE) echo "tpu: $name is there; next: launch/tpu.sh install $name" >&2; exit ;;
        FAILED | SUSPENDED) fail "$name is $found: launch/tpu.sh delete $name, then ask again, perhaps elsewhere" ;;
      esac
      echo "tpu: $name is $found; waiting" >&2
      sleep 60
    done
    fail "the state of $name cannot be read"
    ;;
  install)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    git -C "$root" archive --format=tar.gz -o "$archive" HEAD
    call "${vm[@]}" scp "$archive" "$name:downscaling.tar.gz" "${where[@]}" --worker=all
    # The images have Python 3.10; Ubuntu's own packages have 3.11.
    on_all "mkdir -p downscaling && tar xzf downscaling.tar.gz -C downscaling && cd downscaling && \
{ command -v python3.11 || sudo apt-get install -y python3.11-venv; } && python3.11 -m venv .venv && \
.venv/bin/pip install --quiet --require-hashes -r launch/locks/tpu.txt && .venv/bin/pip install --quiet --no-deps ."
    ;;
  run)
    [ $# -ge 1 ] || fail "run needs a job: launch/tpu.sh run $name doctor"
    # 143: preempted, 75: a hang. The same command goes on.
    on_all "cd downscaling && until .venv/bin/downscaling $(printf '%q ' "$@"); do case \$? in 143|75) ;; *) exit 1 ;; esac; done"
    ;;
  delete)
    call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
    ;;
  *) fail "got '$verb', need create, install, run or delete" ;;
esac
