#!/usr/bin/env bash
# Submits a run with XPK to a GKE cluster that `xpk cluster create` made: v5e, v5p, v6e and 7x. Flags that are not
# listed here go to llada_jax.train.
#
#   bash launch/xpk.sh --name=NAME --cluster=CLUSTER --type=v6e-16 --image=IMAGE [--slices=N] [--project=ID]
#       [--zone=ZONE] [--restarts=100] [--cache=DIR] [--storage=NAME] [--priority=P] [--spot | --reservation=NAME]
#       [--dry_run] --config=configs/llada_8b_pretrain.py --workdir=gs://BUCKET/run …
#
# type: as XPK names them: v5litepod-256, v5p-128, v6e-16, tpu7x-4x4x4. The image is made with launch/Dockerfile.
# --restarts counts crashes and preemptions; a mistake in the flags ends at once. --cache (none: no cache) is where
# compiled programs are kept; else beside the workdir. --storage mounts what `xpk storage attach` made.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

name="" cluster="" type="" image="" slices=1 project="" zone="" restarts=100 cache="" dry_run="" passed=() rest=()
for flag in "$@"; do
  case $flag in
    --name=*) name=${flag#*=} ;;
    --cluster=*) cluster=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --image=*) image=${flag#*=} ;;
    --slices=*) slices=${flag#*=} ;;
    --project=*) project=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --restarts=*) restarts=${flag#*=} ;;
    --cache=*) cache=${flag#*=} ;;
    --storage=* | --priority=* | --spot | --reservation=*) passed+=("$flag") ;;
    --dry_run) dry_run=yes ;;
    --help) usage ;;
    *) rest+=("$flag") ;;
  esac
done
for needed in name cluster type image; do
  if [ -z "${!needed}" ]; then fail "--$needed is needed; --help explains"; fi
done
if [ -z "$dry_run" ]; then
  for program in gcloud xpk; do
    if ! command -v "$program" >/dev/null; then fail "$program is not installed (xpk: pip install xpk)"; fi
  done
fi
if [ -z "$project" ]; then project=$(gcloud_default project); fi
if [ -z "$zone" ]; then zone=$(gcloud_default compute/zone); fi
if [ -z "$project" ]; then fail "no project: give --project=ID, or run gcloud config set project ID"; fi
if [ -z "$zone" ]; then fail "no zone: give --zone=ZONE, or run gcloud config set compute/zone ZONE"; fi

directory=$(cache_for "$cache" ${rest[@]+"${rest[@]}"})
# Every exit code but 0 and 2 starts the run again (127 to 255 do so anyway). exec: XPK's shell sends SIGTERM to the
# command's process, which must be the run itself.
show xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" --num-slices="$slices" \
  --docker-image="$image" --project="$project" --zone="$zone" --max-restarts="$restarts" \
  --restart-on-exit-codes=1,3-126 --termination-grace-period-seconds=120 \
  ${directory:+--env="JAX_COMPILATION_CACHE_DIR=$directory"} ${passed[@]+"${passed[@]}"} \
  --command="exec python -m llada_jax.train$(quoted ${rest[@]+"${rest[@]}"})"
