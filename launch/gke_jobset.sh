#!/usr/bin/env bash
# Submits gke_jobset.yaml to the cluster that kubectl is connected with. Flags that are not listed go to llada_jax.train.
#
#   bash launch/gke_jobset.sh --name=NAME --image=IMAGE --type=v6e --topology=4x4 --bucket=BUCKET [--slices=N]
#       [--chips_per_host=4] [--restarts=100] [--service_account=default] [--dry_run]
#       --config=configs/llada_8b_pretrain.py --workdir=/bucket/run …
#
# type: v4, v5e, v5p, v6e or 7x. The image is made with launch/Dockerfile. --dry_run prints the manifest alone.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 2; }

name="" image="" type="" topology="" bucket="" slices=1 chips=4 restarts=100 account=default dry_run="" rest=()
for flag in "$@"; do
  case $flag in
    --name=*) name=${flag#*=} ;;
    --image=*) image=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --topology=*) topology=${flag#*=} ;;
    --bucket=*) bucket=${flag#*=} bucket=${bucket#gs://} ;;
    --slices=*) slices=${flag#*=} ;;
    --chips_per_host=*) chips=${flag#*=} ;;
    --restarts=*) restarts=${flag#*=} ;;
    --service_account=*) account=${flag#*=} ;;
    --dry_run) dry_run=yes ;;
    *) rest+=("$flag") ;;
  esac
done
for needed in name image type topology bucket; do
  if [ -z "${!needed}" ]; then fail "--$needed is needed; the head of $0 explains"; fi
done
case $type in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  7x) accelerator=tpu7x ;;
  *) fail "--type=$type is not one of v4, v5e, v5p, v6e, 7x" ;;
esac
if ! [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]]; then fail "--topology=$topology is not like 4x4 or 2x2x4"; fi
hosts=$((${topology//x/*} / chips))
if [ "$hosts" -lt 1 ]; then fail "--topology=$topology has fewer chips than --chips_per_host=$chips"; fi
if [ -z "$dry_run" ] && ! command -v kubectl >/dev/null; then
  fail "kubectl is not installed; run gcloud components install kubectl, then gcloud container clusters get-credentials"
fi

json() { # a list of strings
  local text="" item
  for item in "$@"; do
    item=${item//\\/\\\\}
    text+="${text:+, }\"${item//\"/\\\"}\""
  done
  echo "[$text]"
}
manifest=$(<launch/gke_jobset.yaml)
fill() { manifest=${manifest//"@$1@"/"$2"}; }
fill NAME "$name"
fill RESTARTS "$restarts"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill SERVICE_ACCOUNT "$account"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill IMAGE "$image"
fill BUCKET "$bucket"
fill ARGS "$(json ${rest[@]+"${rest[@]}"})"
echo "$manifest"
if [ -n "$dry_run" ]; then exit; fi
echo "+ kubectl apply -f -   # logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name" >&2
kubectl apply -f - <<<"$manifest"
