# Sourced by dataflow.sh, flink.sh and spark.sh: their arguments, and the build that they start. Needs bash 4.4.

declare -A given=() # options of the script, by name
beam=()             # options for Beam, as name=value
build=()            # arguments of data_pipeline.build
dry_run=""

fail() {
  echo "error: $1" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() { sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"; }

# parse_arguments "NAME NAME ..." ARGUMENT...
parse_arguments() {
  local known=$1 name
  shift
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --) shift && build=("$@") && break ;;
      --beam_option=?*) beam+=("${1#*=}") ;;
      --?*=?*)
        name=${1%%=*}
        name=${name#--}
        [[ " $known " == *" $name "* ]] || fail "unknown option --$name: see --help, or give --beam_option=$name=VALUE"
        given[$name]=${1#*=}
        ;;
      *) fail "unexpected argument \"$1\": options are --NAME=VALUE, the build's arguments follow --" ;;
    esac
    shift
  done
  ((${#build[@]})) || fail "nothing to build: give data_pipeline.build's arguments after --, see --help"
  [[ " ${build[*]}" != *" --beam_pipeline_options"* ]] ||
    fail "--beam_pipeline_options: give --beam_option=NAME=VALUE before --"
}

# require NAME...
require() {
  local name
  for name; do [[ -n ${given[$name]-} ]] || fail "--$name is missing: see --help"; done
}

# check NAME REGEX MEANING: an option, if it is given, has the right form.
check() {
  [[ -z ${given[$1]-} || ${given[$1]} =~ ^($2)$ ]] || fail "--$1=${given[$1]}: must be $3"
}

# check_build FLAG REGEX MEANING: every value of a flag of data_pipeline.build has the right form.
check_build() {
  local i value
  for i in "${!build[@]}"; do
    case ${build[i]} in
      -$1=* | --$1=*) value=${build[i]#*=} ;;
      -$1 | --$1) value=${build[i + 1]-} ;;
      *) continue ;;
    esac
    [[ $value =~ ^($2)$ ]] || fail "--$1=$value: must be $3: workers do not see this disk"
  done
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

# For people to paste: quotes only what a shell would not take as it is.
quoted() {
  local word line=""
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line:1}"
}

# run_build RUNNER: with every option that is left in `given`, in alphabetical order, then those of --beam_option.
run_build() {
  local name options=("runner=$1") command
  while read -r name; do
    options+=("$name=${given[$name]}")
  done < <(printf '%s\n' "${!given[@]}" | sort)
  options+=("${beam[@]}")
  command=(python -m data_pipeline.build "${build[@]}" "--beam_pipeline_options=$(csv "${options[@]}")")
  if [[ -n $dry_run ]]; then
    quoted "${command[@]}"
  else
    exec "${command[@]}"
  fi
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
