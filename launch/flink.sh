#!/usr/bin/env bash
# Builds the datasets on an Apache Flink cluster.
#
#   launch/flink.sh --flink_master=HOST:PORT --environment_config=IMAGE [OPTION...] \
#     -- --config=configs/tiny.py --data_dir=s3://BUCKET/data --source=KIND:s3://BUCKET/songs [...]
#
#   --flink_master=HOST:PORT     the cluster's REST address; Beam starts its job server here (Java, a jar from Maven)
#   --job_endpoint=HOST:PORT     instead: a job server of Beam that runs already
#   --flink_version=VERSION      the cluster's, such as 1.20; Beam's newest if not given
#   --flink_job_server_jar=JAR   path or URL of the job server, where Maven Central cannot be reached
#   --environment_type=TYPE      where workers run. DOCKER (default): containers that the task managers start;
#                                EXTERNAL: worker pools beside the task managers; PROCESS: processes they start
#   --environment_config=VALUE   DOCKER: the image made from launch/beam_worker.Dockerfile; EXTERNAL: HOST:PORT of the
#                                pool as a task manager sees it; PROCESS: JSON with "command"
#   --parallelism=N              shards written at once; Flink's own default if not given
#   --sdk_worker_parallelism=N   worker processes a task manager; default 0: Beam chooses
#   --beam_option=NAME[=VALUE]   any other option of Beam, as in its documentation without the dashes; repeatable
#   --dry-run                    print the command and stop
#
# What follows -- goes to data_pipeline.build.

set -euo pipefail
source "$(dirname "$0")/engine.sh"

parse_build_arguments "flink_master job_endpoint flink_version flink_job_server_jar environment_type \
environment_config parallelism sdk_worker_parallelism" "$@"
check flink_master '(https?://)?[^/:]+:[0-9]+' "HOST:PORT"
check parallelism '[1-9][0-9]*' "a whole number above 0"
run_on_cluster FlinkRunner flink_master
