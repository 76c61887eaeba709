#!/usr/bin/env bash
# Builds the datasets on an Apache Spark cluster.
#
#   launch/spark.sh --spark_master_url=spark://HOST:PORT --environment_config=IMAGE [OPTION...] \
#     -- --config=configs/tiny.py --data_dir=s3://BUCKET/data --source=KIND:s3://BUCKET/songs [...]
#
#   --spark_master_url=URL       the cluster's master; Beam starts its job server here (Java, a jar from Maven)
#   --job_endpoint=HOST:PORT     instead: a job server of Beam that runs already
#   --spark_job_server_jar=JAR   path or URL of the job server, where Maven Central cannot be reached
#   --environment_type=TYPE      where workers run. DOCKER (default): containers that the executors start;
#                                EXTERNAL: worker pools beside the executors; PROCESS: processes they start
#   --environment_config=VALUE   DOCKER: the image made from launch/beam_worker.Dockerfile; EXTERNAL: HOST:PORT of the
#                                pool as an executor sees it; PROCESS: JSON with "command"
#   --sdk_worker_parallelism=N   worker processes an executor; default 0: Beam chooses
#   --beam_option=NAME[=VALUE]   any other option of Beam, as in its documentation without the dashes; repeatable
#   --dry-run                    print the command and stop
#
# What follows -- goes to data_pipeline.build.

set -euo pipefail
source "$(dirname "$0")/engine.sh"

parse_build_arguments "spark_master_url job_endpoint spark_job_server_jar environment_type environment_config \
sdk_worker_parallelism" "$@"
check spark_master_url 'spark://[^/]+:[0-9]+' "spark://HOST:PORT"
run_on_cluster SparkRunner spark_master_url
