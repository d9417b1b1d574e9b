#!/usr/bin/env bash
# One job over N processes that MPI starts (Open MPI 4 and 5, MPICH, Intel MPI). They talk by jax, not by MPI.
#   launch/mpi.sh N JOB [FLAGS ...]     e.g. launch/mpi.sh 16 train --config=configs/ks.py --workdir=/shared/runs/ks
#   HOSTFILE=    hosts as mpirun reads them; process 0 runs on the first. Without it, this host
#   PORT=8476    where process 0 listens           MPIRUN=mpirun    which one
#   MPIFLAGS=    more flags of mpirun, e.g. "--mca btl_tcp_if_include eth0"
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "mpi: got '$*', need a number of processes and a job: launch/mpi.sh 2 doctor" >&2
  exit 1
fi
count=$1; shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && export PATH="$root/.venv/bin:$PATH"
MPIRUN=${MPIRUN:-mpirun}
if ! version=$("$MPIRUN" --version 2>&1); then
  echo "mpi: $MPIRUN does not run: $(head -1 <<<"$version"). Load the MPI module, or set MPIRUN=/path/to/mpirun." >&2
  exit 1
fi
first=$(hostname)
getent hosts "$first" >/dev/null || first=127.0.0.1
[ -n "${HOSTFILE:-}" ] && first=$(grep -v '^[[:space:]]*\(#\|$\)' "$HOSTFILE" | head -1 | sed 's/[[:space:]:].*//')
# Open MPI 5, MPICH and Intel MPI do not tell jax where process 0 is.
export JAX_COORDINATOR_ADDRESS="${JAX_COORDINATOR_ADDRESS:-$first:${PORT:-8476}}"
read -ra more <<<"${MPIFLAGS:-}"
case $version in
  *"Open MPI"* | *OpenRTE* | *prte* | *PRRTE*)
    # In a container everybody is root. A process has threads for many cores: it must not be bound to one.
    [ "$(id -u)" = 0 ] && export OMPI_ALLOW_RUN_AS_ROOT{,_CONFIRM}=1 PRTE_ALLOW_RUN_AS_ROOT{,_CONFIRM}=1
    flags=(-np "$count" --bind-to none --oversubscribe ${HOSTFILE:+--hostfile "$HOSTFILE"} -x JAX_COORDINATOR_ADDRESS -x PATH)
    ;;
  *)
    flags=(-n "$count" -bind-to none ${HOSTFILE:+-f "$HOSTFILE"} -genv JAX_COORDINATOR_ADDRESS "$JAX_COORDINATOR_ADDRESS" -genv PATH "$PATH")
    ;;
esac
exec "$MPIRUN" "${flags[@]}" "${more[@]}" downscaling "$@"
