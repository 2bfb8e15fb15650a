#!/usr/bin/env bash
# The main job on the embedded corpus: bash launch/quickstart.sh [--workdir DIR] [--config.train.seed=1 …]
# Flags are those of tools/quickstart.py. A GPU or TPU is used when its extra is named: LLADA_EXTRAS=gpu bash …
set -euo pipefail
here=$(pwd)
cd "$(dirname "$0")/.."
. launch/environment.sh
# shellcheck disable=SC2086
prepare_environment "$PWD/.venv" ${LLADA_EXTRAS:-}

config=configs/quickstart.py workdir="$PWD/runs/quickstart" rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --workdir | --config)
      if [ $# -lt 2 ]; then echo "error: $1 needs a value" >&2; exit 2; fi
      set -- "$1=$2" "${@:3}" ;;
    --workdir=*) workdir=${1#*=}; case $workdir in /*) ;; *) workdir="$here/$workdir" ;; esac; shift ;;
    --config=*) config=${1#*=}; shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
exec "$PYTHON" tools/quickstart.py --config="$config" --workdir="$workdir" ${rest[@]+"${rest[@]}"}
