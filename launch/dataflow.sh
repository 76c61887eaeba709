#!/usr/bin/env bash
# Builds the datasets on Google Cloud Dataflow.
#
#   launch/dataflow.sh --project=ID --region=REGION --temp_location=gs://BUCKET/FOLDER --sdk_container_image=IMAGE \
#     [OPTION...] -- --config=configs/tiny.py --data_dir=gs://BUCKET/data --source=KIND:gs://BUCKET/songs [...]
#
#   --project=ID                 Google Cloud project that pays
#   --region=REGION              such as europe-west4; that of the bucket
#   --temp_location=gs://...     where Dataflow keeps temporary files
#   --staging_location=gs://...  where the job is staged; next to the temporary files if not given
#   --sdk_container_image=IMAGE  made from launch/beam_worker.Dockerfile
#   --worker_machine_type=TYPE   default: e2-standard-4. Each vCPU runs one worker process, which needs 2 GB
#   --disk_size_gb=N             default: 64, for the image and one song a process
#   --max_num_workers=N          machines at most
#   --accelerator=TYPE:COUNT     such as nvidia-l4:1, with a machine type that takes it; then one process a machine
#   --beam_option=NAME[=VALUE]   any other option of Beam, as in its documentation without the dashes; repeatable
#   --dry-run                    print the command and stop
#
# What follows -- goes to data_pipeline.build; with --accelerator and --source=songs:..., --separator_device=cuda too, or
# the separator stays on the CPU. Needs apache-beam[gcp] and Google Cloud credentials here.

set -euo pipefail
source "$(dirname "$0")/engine.sh"

parse_build_arguments "project region temp_location staging_location sdk_container_image worker_machine_type \
disk_size_gb max_num_workers accelerator" "$@"
require project region temp_location sdk_container_image
for name in temp_location staging_location; do check $name 'gs://[^/]+.*' "gs://BUCKET/FOLDER"; done
for name in disk_size_gb max_num_workers; do check $name '[1-9][0-9]*' "a whole number above 0"; done
check accelerator '[a-z0-9-]+:[1-9][0-9]*' "TYPE:COUNT, such as nvidia-l4:1"
check_argument data_dir 'gs://[^/]+.*' "gs://BUCKET/FOLDER: workers do not see this disk"
check_argument source '[a-z0-9]+:(gs|s3)://[^/]+.*' "KIND:gs://BUCKET/FOLDER: workers do not see this disk"
[[ -z ${given[accelerator]-} ]] || require worker_machine_type

: "${given[worker_machine_type]:=e2-standard-4}" "${given[disk_size_gb]:=64}"
# A thread more would hold another song in memory without being faster: Dataflow starts a process for each vCPU.
given[number_of_worker_harness_threads]=1
given[sdk_location]=container
if [[ -n ${given[accelerator]-} ]]; then
  kind=${given[accelerator]%:*} count=${given[accelerator]#*:}
  given[dataflow_service_options]="worker_accelerator=type:$kind;count:$count;install-nvidia-driver"
  # The first process would take the accelerator's memory from the others.
  given[experiments]=no_use_multiple_sdk_containers
  unset 'given[accelerator]'
fi
run_build DataflowRunner
