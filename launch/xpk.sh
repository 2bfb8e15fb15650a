#!/usr/bin/env bash
# Submits a run with XPK to a GKE cluster that `xpk cluster create` made: v5e, v5p, v6e and 7x. Flags that are not
# listed here go to llada_jax.train.
#
#   bash launch/xpk.sh --name=NAME --cluster=CLUSTER --type=v6e-16 --image=IMAGE [--slices=N] [--project=ID]
#       [--zone=ZONE] [--dry_run] --config=configs/llada_8b_pretrain.py --workdir=/bucket/run …
#
# type: as XPK names them: v5litepod-256, v5p-128, v6e-16, tpu7x-4x4x4. The workdir must be on storage that the cluster
# mounts on every host (xpk storage attach). The image is made with launch/Dockerfile.
set -euo pipefail

fail() { echo "error: $*" >&2; exit 2; }

name="" cluster="" type="" image="" slices=1 project="" zone="" dry_run="" rest=()
for flag in "$@"; do
  case $flag in
    --name=*) name=${flag#*=} ;;
    --cluster=*) cluster=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --image=*) image=${flag#*=} ;;
    --slices=*) slices=${flag#*=} ;;
    --project=*) project=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --dry_run) dry_run=yes ;;
    *) rest+=("$flag") ;;
  esac
done
for needed in name cluster type image; do
  if [ -z "${!needed}" ]; then fail "--$needed is needed; the head of $0 explains"; fi
done
if [ -z "$dry_run" ]; then
  for program in gcloud xpk; do
    if ! command -v "$program" >/dev/null; then fail "$program is not installed (xpk: pip install xpk)"; fi
  done
fi
default() { gcloud config get-value "$1" 2>/dev/null || true; }
if [ -z "$project" ]; then project=$(default project); fi
if [ -z "$zone" ]; then zone=$(default compute/zone); fi
if [ -z "$project" ]; then fail "no project: give --project=ID, or run gcloud config set project ID"; fi
if [ -z "$zone" ]; then fail "no zone: give --zone=ZONE, or run gcloud config set compute/zone ZONE"; fi

flags=$(if [ ${#rest[@]} -gt 0 ]; then printf ' %q' "${rest[@]}"; fi)
command=(xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" --num-slices="$slices"
  --docker-image="$image" --project="$project" --zone="$zone" --command="python -m llada_jax.train$flags")
{ printf '+'; printf ' %q' "${command[@]}"; echo; } >&2
if [ -z "$dry_run" ]; then "${command[@]}"; fi
