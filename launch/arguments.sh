# Sourced by the launchers: their options and errors, and how they print what would run. Needs bash 4.4.

declare -A given=() # options, by name
passed=()           # options for the program behind the launcher, as name=value
arguments=()        # what follows --
dry_run=""

fail() {
  echo "error: $1" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() { sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"; }

# parse_arguments "NAME ..." PASSING ARGUMENT...: --PASSING=NAME[=VALUE] is the repeatable option for what has no name
# here; empty if there is none. Options whose name ends in ! take no value.
parse_arguments() {
  local known=$1 passing=$2 name
  shift 2
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --dry-run) dry_run=1 ;;
      --) shift && arguments=("$@") && break ;;
      --"${passing:- }"=?*) passed+=("${1#*=}") ;;
      --?*=?*)
        name=${1%%=*}
        name=${name#--}
        [[ " $known " == *" $name "* ]] ||
          fail "unknown option --$name: see --help${passing:+, or give --$passing=$name=VALUE}"
        given[$name]=${1#*=}
        ;;
      --?*)
        [[ " $known " == *" ${1#--}! "* ]] || fail "unknown option $1: see --help; values are given as --NAME=VALUE"
        given[${1#--}]=1
        ;;
      *) fail "unexpected argument \"$1\": options are --NAME=VALUE, the program's own arguments follow --" ;;
    esac
    shift
  done
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

# check_argument FLAG REGEX MEANING: every value of a flag after -- has the right form.
check_argument() {
  local i value
  for i in "${!arguments[@]}"; do
    case ${arguments[i]} in
      -$1=* | --$1=*) value=${arguments[i]#*=} ;;
      -$1 | --$1) value=${arguments[i + 1]-} ;;
      *) continue ;;
    esac
    [[ $value =~ ^($2)$ ]] || fail "--$1=$value: must be $3"
  done
}

# require_arguments PROGRAM
require_arguments() {
  ((${#arguments[@]})) || fail "nothing to run: give $1's arguments after --, see --help"
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

# run [exec] COMMAND...: or, with --dry-run, print it.
run() {
  if [[ -n $dry_run ]]; then
    [[ $1 != exec ]] || shift
    quoted "$@"
  else
    "$@"
  fi
}
