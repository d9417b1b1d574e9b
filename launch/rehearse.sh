#!/usr/bin/env bash
# N real processes of one command on this machine, joined as on a cluster: rehearse a job before paying for a pod.
#   launch/rehearse.sh N CMD...     e.g. DEVICES=2 launch/rehearse.sh 2 downscaling train --config=configs/ks.py --workdir=runs/ks
# When one process dies, or all were preempted (143), the whole group is started again, as a cluster would; an error that
# a person must mend (1) is not tried again. SIGTERM or Ctrl-C is passed on to all.
#   DEVICES=1   virtual CPU devices a process      RESTARTS=3  how often the group is started again
#   GRACE=40    seconds from SIGTERM to SIGKILL     PIDFILE=    file that gets a line "number pid" a process
set -uo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "rehearse: got '$*', need a number of processes and a command: launch/rehearse.sh 2 downscaling doctor" >&2
  exit 1
fi
count=$1; shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ -d "$root/.venv/bin" ] && export PATH="$root/.venv/bin:$PATH"
flags=$(sed 's/--xla_force_host_platform_device_count=[0-9]*//g' <<<"${XLA_FLAGS:-}")
export XLA_FLAGS="$flags --xla_force_host_platform_device_count=${DEVICES:-1}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_PROCESSES=$count PYTHONUNBUFFERED=1
pids=() asked=0

say() { echo "rehearse: $*" >&2; }

tell() {  # a signal to every process of the group that still runs
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null; done
}

begin() {
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
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
  local deadline=$((SECONDS + ${GRACE:-40}))
  while [ -n "$(jobs -rp)" ] && [ $SECONDS -lt $deadline ]; do sleep 0.1; done
  tell KILL
  wait "${pids[@]}" 2>/dev/null
}

trap 'asked=1; tell TERM' TERM INT
for ((try = 0; ; try++)); do
  say "$count process(es) of ${DEVICES:-1} device(s): $*"
  begin "$@"
  worst=0
  running=" ${pids[*]} "
  while [ -n "${running// /}" ]; do
    wait -n -p ended $running
    code=$?
    if [ $asked = 1 ]; then
      # the trap woke us, or a process has ended as it was told
      finish
      say "stopped, as asked"
      exit 143
    fi
    running=${running/ $ended / }
    [ $code = 0 ] && continue
    worst=$code
    [ $code = 143 ] && continue  # preempted: the others follow by themselves
    break
  done
  [ $worst = 0 ] && { say "all done"; exit 0; }
  finish
  if [ $worst = 1 ]; then
    say "a process ended with an error, which starting again would not mend"
    exit 1
  fi
  if [ $try -ge "${RESTARTS:-3}" ]; then
    say "a process ended with code $worst; started ${RESTARTS:-3} times again already, giving up"
    exit "$worst"
  fi
  say "a process ended with code $worst; starting all again ($((try + 1)) of ${RESTARTS:-3})"
done
