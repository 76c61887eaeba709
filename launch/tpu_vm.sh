#!/usr/bin/env bash
# Trains on a TPU pod: Cloud TPU VMs, one process a host.
#
#   launch/tpu_vm.sh create --name=NAME --zone=ZONE \
#     --accelerator_type=v5litepod-256 --runtime_version=v2-alpha-tpuv5-lite [OPTION...]
#   launch/tpu_vm.sh run --name=NAME --zone=ZONE \
#     -- --config=configs/tiny.py:STAGE --data_dir=gs://BUCKET/data --workdir=/runs/RUN [...]
#   launch/tpu_vm.sh logs | stop | install | delete --name=NAME --zone=ZONE
#   launch/tpu_vm.sh list --zone=ZONE
#
#   create   queues a request for the pod (a queued resource), waits until it is granted, and installs
#   install  copies the last commit of this checkout to every host and installs it there
#   run      starts launch.train with what follows --, as a service of every host; it does not need this machine
#   logs     follows the log
#   stop     SIGTERM: saves a checkpoint and ends the run; to go on, run again
#   delete   gives the pod back; a pod of Spot VMs that was preempted, too, before it can be created again
#   list     shows the requests of the zone and their states
#
#   --project=ID                 Google Cloud project; default: gcloud's
#   --spot                       create: Spot VMs, which may be preempted
#   --gcloud_option=NAME[=VALUE] create: any other option of gcloud compute tpus queued-resources create; repeatable
#   --setup=COMMAND              create, install: run on every host first, such as one that mounts /runs
#   --worker=N                   logs: whose; default: 0
#   --dry-run                    print the commands and stop
#
# The run folder must be on a disk that all hosts have mounted (--setup), the data there or in a bucket.

set -euo pipefail
source "$(dirname "$0")/arguments.sh"

action=${1-}
case $action in
  create | run | logs | stop | install | delete | list) shift ;;
  -h | --help) usage && exit 0 ;;
  *) fail "unknown action \"$action\": create, run, logs, stop, install, delete or list, see --help" ;;
esac
parse_arguments "name zone project accelerator_type runtime_version spot! setup worker" gcloud_option "$@"
require zone
[[ $action == list ]] || require name
check name '[a-z]([a-z0-9-]*[a-z0-9])?' "small letters, digits and dashes, a letter first"
check worker '[0-9]+' "a whole number"

name=${given[name]-}
root=$(cd "$(dirname "$0")/.." && pwd)
place=("--zone=${given[zone]}")
[[ -z ${given[project]-} ]] || place+=("--project=${given[project]}")

queued() { run gcloud compute tpus queued-resources "$@" "${place[@]}"; }

# on WORKER COMMAND
on() { run gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" "${place[@]}"; }

install() {
  local archive=${TMPDIR:-/tmp}/$name.tar.gz
  run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:subtractive-jax.tar.gz" --worker=all "${place[@]}"
  # The images have Python 3.10; uv brings its own.
  on all "set -e; ${given[setup]:+${given[setup]}; }mkdir -p subtractive-jax; \
tar -xzf subtractive-jax.tar.gz -C subtractive-jax; cd subtractive-jax; python3 -m pip install --user --quiet uv; \
python3 -m uv venv --allow-existing --python=3.12 .venv; \
python3 -m uv pip install --quiet --python=.venv -c constraints-py3.12.txt -e '.[tpu]' gcsfs"
}

case $action in
  create)
    require accelerator_type runtime_version
    queued create "$name" "--node-id=$name" "--accelerator-type=${given[accelerator_type]}" \
      "--runtime-version=${given[runtime_version]}" ${given[spot]:+--spot} "${passed[@]/#/--}"
    describe=$(quoted gcloud compute tpus queued-resources describe "$name" '--format=value(state.state)' "${place[@]}")
    run bash -c "until state=\$($describe) || exit; echo \"\$state\"; [[ \$state == ACTIVE ]]; do
  [[ ! \$state =~ FAILED|SUSPEND ]] || { echo 'error: $name was not granted: delete it' >&2; exit 2; }
  sleep 30
done"
    install
    ;;
  install) install ;;
  run)
    require_arguments launch.train
    # A service ends with its host: at a preemption it gets SIGTERM. --collect: the next run may have the same name.
    on all "sudo systemd-run --unit=subtractive-jax --collect --uid=\"\$(id -u)\" --gid=\"\$(id -g)\" \
--setenv=HOME=\"\$HOME\" --working-directory=\"\$HOME/subtractive-jax\" --property=TimeoutStopSec=300 \
\"\$HOME/subtractive-jax/.venv/bin/python\" -m launch.train $(quoted "${arguments[@]}") --distributed"
    ;;
  logs) on "${given[worker]:-0}" "sudo journalctl --unit=subtractive-jax --follow --lines=100" ;;
  stop) on all "sudo systemctl stop subtractive-jax" ;;
  delete) queued delete "$name" --force --quiet ;;
  list) queued list ;;
esac
