# Sourced by dataflow.sh, flink.sh and spark.sh: their arguments, and the build that they start.

source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"

# parse_build_arguments "NAME ..." ARGUMENT...: what follows -- goes to data_pipeline.build.
parse_build_arguments() {
  local known=$1
  shift
  parse_arguments "$known" beam_option "$@"
  require_arguments data_pipeline.build
  [[ " ${arguments[*]}" != *" --beam_pipeline_options"* ]] ||
    fail "--beam_pipeline_options: give --beam_option=NAME=VALUE before --"
}

# data_pipeline.build splits Beam's options at commas, as CSV: one that holds a comma or a quote is quoted.
csv() {
  local field line=""
  for field; do
    [[ $field != *[,\"]* ]] || field="\"${field//\"/\"\"}\""
    line+=",$field"
  done
  echo "${line:1}"
}

# run_build RUNNER: with every option that is left in `given`, in alphabetical order, then those of --beam_option.
run_build() {
  local name options=("runner=$1")
  while read -r name; do
    options+=("$name=${given[$name]}")
  done < <(printf '%s\n' "${!given[@]}" | sort)
  options+=("${passed[@]}")
  run exec python -m data_pipeline.build "${arguments[@]}" "--beam_pipeline_options=$(csv "${options[@]}")"
}

# run_on_cluster RUNNER MASTER: what Flink and Spark share. MASTER is the name of the option with the cluster's address.
run_on_cluster() {
  local runner=$1 master=$2
  if [[ -n ${given[job_endpoint]-} ]]; then
    [[ -z ${given[$master]-} ]] || fail "--job_endpoint: the job server knows its cluster, so give no --$master"
    runner=PortableRunner
  else
    require "$master"
  fi
  : "${given[environment_type]:=DOCKER}" "${given[sdk_worker_parallelism]:=0}"
  require environment_config
  check environment_type 'DOCKER|EXTERNAL|PROCESS' "DOCKER, EXTERNAL or PROCESS"
  check job_endpoint '[^/:]+:[0-9]+' "HOST:PORT"
  check sdk_worker_parallelism '[0-9]+' "a whole number"
  case ${given[environment_type]} in
    EXTERNAL) check environment_config '[^/:]+:[0-9]+' "HOST:PORT of a worker pool" ;;
    PROCESS) check environment_config '\{.*"command".*\}' 'JSON such as {"command": "..."}' ;;
  esac
  # Beam would stage one file, a list of installed packages, which workers could read only from a shared folder.
  given[experiments]=disable_logging_submission_environment
  run_build "$runner"
}
