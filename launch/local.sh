#!/usr/bin/env bash
# Trains with several processes on this machine: to try what a cluster will do, or to give each some of the GPUs.
#
#   launch/local.sh --processes=N --cpu_devices=M [OPTION...] \
#     -- --config=configs/tiny.py:STAGE --data_dir=DIR --workdir=RUN [...]
#
#   --processes=N    how many
#   --cpu_devices=M  each process has M virtual CPU devices
#   --gpus=M         instead: each process has M of this machine's GPUs, the first process the first M
#   --port=N         where process 0 listens; a free one if not given
#   --dry-run        print the commands and stop
#
# What follows -- goes to launch.train. Lines of process 1 begin with [1]. SIGTERM and SIGINT are passed on as SIGTERM,
# which saves a checkpoint. If a process fails, the others are killed and its status is this program's.

set -euo pipefail
source "$(dirname "$0")/arguments.sh"

parse_arguments "processes cpu_devices gpus port" "" "$@"
require processes
for name in processes cpu_devices gpus port; do check $name '[1-9][0-9]*' "a whole number above 0"; done
[[ -n ${given[cpu_devices]-}${given[gpus]-} ]] || fail "give --cpu_devices or --gpus: see --help"
[[ -z ${given[cpu_devices]-} || -z ${given[gpus]-} ]] || fail "give --cpu_devices or --gpus, not both"
require_arguments launch.train

port=${given[port]-}
[[ -n $port ]] || port=$(python -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')

# command_of PROCESS: sets `command`.
command_of() {
  command=(env "JAX_COORDINATOR_ADDRESS=localhost:$port" "JAX_NUM_PROCESSES=${given[processes]}" "JAX_PROCESS_ID=$1")
  if [[ -n ${given[cpu_devices]-} ]]; then
    # Only process 0 would find what it compiled before, and on CPUs it waits no more than 30 seconds for the others.
    command+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${given[cpu_devices]}" JAX_ENABLE_COMPILATION_CACHE=false)
  else
    command+=("JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * given[gpus])) $((($1 + 1) * given[gpus] - 1)))")
  fi
  command+=(python -m launch.train "${arguments[@]}" --distributed)
}

if [[ -n $dry_run ]]; then
  for ((i = 0; i < given[processes]; i++)); do
    command_of $i
    echo "$(quoted "${command[@]}") &"
  done
  echo wait
  exit
fi

pids=()
printers=()
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
trap '((!${#pids[@]})) || kill -TERM "${pids[@]}" || true' TERM INT

# print PROCESS STREAM: what comes through a pipe, each line marked. A signal to the whole group does not end it early.
print() (
  trap '' TERM INT
  exec sed -u "s/^/[$1] /" <"$folder/$1.$2"
)

for ((i = 0; i < given[processes]; i++)); do
  mkfifo "$folder/$i.out" "$folder/$i.err"
  print $i out &
  printers+=($!)
  print $i err >&2 &
  printers+=($!)
  command_of $i
  "${command[@]}" >"$folder/$i.out" 2>"$folder/$i.err" &
  pids+=($!)
done

status=0
while ((${#pids[@]})); do
  sleep 0.2 &
  wait $! || true # unlike a command in the foreground, it lets the trap run at once
  for i in "${!pids[@]}"; do
    ! kill -0 "${pids[i]}" 2>/dev/null || continue
    code=0
    wait "${pids[i]}" || code=$?
    unset "pids[$i]"
    if ((code && !status)); then
      status=$code
      ((!${#pids[@]})) || kill -KILL "${pids[@]}" 2>/dev/null || true
      failure="error: process $i ended with status $code, and so did the run"
    fi
  done
done
wait "${printers[@]}" || true
[[ -z ${failure-} ]] || echo "$failure" >&2
exit $status
