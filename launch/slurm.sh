#!/usr/bin/env bash
# Trains on the GPUs of a SLURM cluster: one process a node.
#
#   launch/slurm.sh --nodes=N --gpus_per_node=M --time=HH:MM:SS [OPTION...] \
#     -- --config=configs/tiny.py:STAGE --data_dir=DIR --workdir=RUN [...]
#
#   --nodes=N                    how many
#   --gpus_per_node=M            GPUs of each
#   --time=LIMIT                 such as 24:00:00; the job is queued again as often as the run needs
#   --cpus_per_task=N            cores for each process; default: 8
#   --job_name=NAME              default: subtractive-jax; the log is NAME-JOB.out
#   --venv=DIR                   Python environment with the extra cuda; default: .venv of this checkout
#   --sbatch_option=NAME[=VALUE] any other option of sbatch, such as partition=gpu or mem=0; repeatable
#   --dry-run                    print the batch script and stop
#
# What follows -- goes to launch.train. The checkout, DIR and RUN must be on disks that all nodes share.

set -euo pipefail
source "$(dirname "$0")/arguments.sh"

parse_arguments "nodes gpus_per_node time cpus_per_task job_name venv" sbatch_option "$@"
require nodes gpus_per_node time
for name in nodes gpus_per_node cpus_per_task; do check $name '[1-9][0-9]*' "a whole number above 0"; done
check time '([0-9]+-)?[0-9]+(:[0-9]+){0,2}' "a time limit of SLURM, such as 24:00:00"
check job_name '[A-Za-z0-9._-]+' "letters, digits, dots, dashes and underscores"
for option in "${passed[@]}"; do
  [[ $option =~ ^[a-z-]+(=[^[:space:]\"\'\\#]+)?$ ]] || fail "--sbatch_option=$option: must be NAME or NAME=VALUE"
done
require_arguments launch.train

root=$(cd "$(dirname "$0")/.." && pwd)
: "${given[cpus_per_task]:=8}" "${given[job_name]:=subtractive-jax}" "${given[venv]:=$root/.venv}"
train=("${given[venv]}/bin/python" -m launch.train "${arguments[@]}" --distributed --stopped_status=75)

script() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=${given[job_name]}
#SBATCH --nodes=${given[nodes]}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=${given[gpus_per_node]}
#SBATCH --cpus-per-task=${given[cpus_per_task]}
#SBATCH --time=${given[time]}
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue
END
  ((!${#passed[@]})) || printf '#SBATCH --%s\n' "${passed[@]}"
  cat <<END

# Five minutes before the limit SLURM signals the processes that srun started, and not this shell, as it would with
# --signal=B:TERM@300. They save a checkpoint and end with status 75. --requeue only allows this job to be queued again
# (after preemption or a lost node SLURM does so by itself); at the limit that is up to this script.

set -euo pipefail
cd $(quoted "$root")
# JAX gives a process of SLURM one GPU if it is not told of more.
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((given[gpus_per_node] - 1)))
status=0
# The first process to end with status 75 is no reason to kill the others; one that is lost ends them by itself.
srun --cpus-per-task=${given[cpus_per_task]} --kill-on-bad-exit=0 $(quoted "${train[@]}") || status=\$?
if ((status == 75)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
END
}

if [[ -n $dry_run ]]; then
  script
else
  script | sbatch
fi
