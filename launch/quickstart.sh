#!/usr/bin/env bash
# The main job on the embedded corpus, in an environment of its own (.venv-llada in the checkout):
#
#   bash launch/quickstart.sh [--workdir=DIR] [--config=configs/couplets_all.py] [--config.train.seed=1 …]
#
# A GPU or TPU is used when its extra is named: LLADA_EXTRAS=gpu bash launch/quickstart.sh
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
. launch/common.sh
. launch/environment.sh

config=configs/quickstart.py workdir="$PWD/runs/quickstart" rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage ;;
    --workdir=?*) workdir=${1#*=}; case $workdir in /*) ;; *) workdir="$here/$workdir" ;; esac ;;
    --config=*) config=${1#*=} ;;
    --config.*=*) rest+=("$1") ;;
    --workdir | --config | --config.*)
      if [ $# -lt 2 ]; then fail "$1 needs a value"; fi
      set -- "" "$1=$2" "${@:3}" ;;
    *) fail "unexpected argument '$1'; --help lists what there is" ;;
  esac
  shift
done
if [ -f "$here/${config%%:*}" ]; then config="$here/$config"; fi
if [[ $config == *.py* && ! -f ${config%%:*} ]]; then fail "--config=$config: no such file; the configs are in configs/"; fi

# shellcheck disable=SC2086
prepare_environment "$PWD/.venv-llada" ${LLADA_EXTRAS:-}
exec "$PYTHON" tools/quickstart.py --config="$config" --workdir="$workdir" ${rest[@]+"${rest[@]}"}
