#!/usr/bin/env bash
# N real processes of one command on this machine, joined as on a cluster: rehearse a job before paying for a pod.
#   launch/rehearse.sh N JOB [FLAGS ...]   e.g. DEVICES=2 launch/rehearse.sh 2 pipeline --config=configs/ks.py:smoke
#   launch/rehearse.sh N CMD...            any other command, e.g. python -m my_program
# It installs first, if need be. A job without --workdir works in runs/rehearsal.
# When one process dies, hangs (75) or is preempted (143), the whole group is ended and started again, as a cluster would;
# an error that a person must mend (1, or 126 and 127 of the shell) is not tried again. SIGTERM or Ctrl-C is passed on to all.
#   DEVICES=1   virtual CPU devices a process      RESTARTS=3  how often the group is started again
#   GRACE=40    seconds from SIGTERM to SIGKILL     PIDFILE=    file that gets a line "number pid" a process
# Exit code: 0; 1, 126 or 127 after an error; 143 when asked to stop; otherwise that of the process after which it gave up.
set -uo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "rehearse: got '$*', need a number of processes and a job: launch/rehearse.sh 2 doctor" >&2
  exit 1
fi
count=$1; shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(source "$root/launch/install.sh") || exit 1
export PATH="$root/.venv/bin:$PATH" JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.venv/jax-cache}"
case $1 in
  generate | debias | train | sample | evaluate | pipeline)
    [[ " $* " = *" --workdir"* ]] || set -- "$@" --workdir="$root/runs/rehearsal"
    set -- downscaling "$@" ;;
  doctor) set -- downscaling "$@" ;;
esac
flags=$(sed 's/--xla_force_host_platform_device_count=[0-9]*//g' <<<"${XLA_FLAGS:-}")
export XLA_FLAGS="$flags --xla_force_host_platform_device_count=${DEVICES:-1}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_PROCESSES=$count PYTHONUNBUFFERED=1
pids=() asked=0

say() { echo "rehearse: $*" >&2; }

tell() {  # a signal to every process of the group that still runs; not to one that now bears the number of a dead one
  local pid
  for pid in $(jobs -rp); do kill "-$1" "$pid" 2>/dev/null; done
}

running() {  # does this one? " pid ", blanks included
  [[ " $(jobs -rp | tr '\n' ' ')" = *"$1"* ]]
}

await() {  # until none runs, or for so many seconds; with 0 behind them, also until we are asked to stop
  local deadline=$((${EPOCHREALTIME//[.,]/} + $1 * 1000000))
  while [ -n "$(jobs -rp)" ] && [ "${EPOCHREALTIME//[.,]/}" -lt $deadline ] && [ $asked = "${2:-$asked}" ]; do
    sleep 0.1
  done
}

begin() {
  local port i
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 1
  export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port
  pids=()
  for ((i = 0; i < count; i++)); do
    JAX_PROCESS_ID=$i "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
  done
  if [ -n "${PIDFILE:-}" ]; then
    for i in "${!pids[@]}"; do echo "$i ${pids[i]}"; done >"$PIDFILE.new" && mv "$PIDFILE.new" "$PIDFILE"
  fi
}

finish() {  # ends what is left of the group: SIGTERM, then SIGKILL
  tell TERM
  await "${GRACE:-40}"
  tell KILL
  wait "${pids[@]}" 2>/dev/null
}

stop_if_asked() {
  [ $asked = 0 ] && return
  finish
  say "stopped, as asked"
  exit 143
}

trap 'asked=1; tell TERM' TERM INT
for ((try = 0; ; try++)); do
  say "$count process(es) of ${DEVICES:-1} device(s): $*"
  begin "$@"
  worst=0
  left=" ${pids[*]} "
  while [ -n "${left// /}" ]; do
    stop_if_asked
    wait -n -p ended $left
    code=$?
    stop_if_asked  # the trap woke us, or a process has ended as it was told
    left=${left/ $ended / }
    [ $code = 0 ] && continue
    worst=$code
    break
  done
  [ $worst = 0 ] && { say "all done"; exit 0; }
  for pid in $left; do  # one that died of another's error may be noticed before it
    running " $pid " || { wait "$pid"; [ $? = 1 ] && worst=1; }
  done
  [ $worst = 143 ] && await "${GRACE:-40}" 0  # preempted: the others have agreed to it and follow, once all is saved
  finish
  stop_if_asked
  if [ $worst = 1 ] || [ $worst = 126 ] || [ $worst = 127 ]; then
    say "a process ended with an error, which starting again would not mend"
    exit "$worst"
  fi
  if [ $try -ge "${RESTARTS:-3}" ]; then
    say "a process ended with code $worst; that was the last of ${RESTARTS:-3} restart(s)"
    exit "$worst"
  fi
  say "a process ended with code $worst; starting all again ($((try + 1)) of ${RESTARTS:-3})"
done
