#!/usr/bin/env bash
# Submits gke_jobset.yaml to the cluster that kubectl is connected with. Flags that are not listed go to llada_jax.train.
#
#   bash launch/gke_jobset.sh --name=NAME --image=IMAGE --type=v6e --topology=4x4 [--slices=N] [--chips_per_host=4]
#       [--restarts=100] [--service_account=default] [--cache=DIR] [--bucket=BUCKET] [--dry_run]
#       --config=configs/llada_8b_pretrain.py --workdir=gs://BUCKET/run …
#
# type: v4, v5e, v5p, v6e or 7x. The image is made with launch/Dockerfile. --restarts counts crashes; a preempted run
# starts again without end, and a mistake in the flags ends at once. --cache (none: no cache) is where compiled programs
# are kept; else beside the workdir. --bucket mounts a Cloud Storage bucket at /bucket. --dry_run prints the manifest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

name="" image="" type="" topology="" bucket="" slices=1 chips=4 restarts=100 account=default cache="" dry_run="" rest=()
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
    --cache=*) cache=${flag#*=} ;;
    --dry_run) dry_run=yes ;;
    --help) usage ;;
    *) rest+=("$flag") ;;
  esac
done
for needed in name image type topology; do
  if [ -z "${!needed}" ]; then fail "--$needed is needed; --help explains"; fi
done
case $type in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  7x) accelerator=tpu7x ;;
  *) fail "--type=$type is not one of v4, v5e, v5p, v6e, 7x" ;;
esac
if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then fail "--name=$name: at most 40 of a-z, 0-9 and -, from a letter"; fi
if ! [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]]; then fail "--topology=$topology is not like 4x4 or 2x2x4"; fi
for number in slices chips restarts; do
  if ! [[ ${!number} =~ ^[1-9][0-9]*$ ]]; then fail "--${number/chips/chips_per_host}=${!number} is not a number"; fi
done
total=$((${topology//x/*}))
if [ $((total % chips)) != 0 ]; then fail "--topology=$topology: $total chips are no whole hosts of --chips_per_host=$chips"; fi
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
directory=$(cache_for "$cache" ${rest[@]+"${rest[@]}"})
environment="[]"
if [ -n "$directory" ]; then environment="[{name: JAX_COMPILATION_CACHE_DIR, value: $(json "$directory" | tr -d '[]')}]"; fi
if [ -n "$bucket" ]; then
  manifest=$(sed 's/ # bucket$//' launch/gke_jobset.yaml)
else
  manifest=$(sed '/ # bucket$/d' launch/gke_jobset.yaml)
fi
fill() { manifest=${manifest//"@$1@"/"$2"}; }
fill NAME "$name"
fill RESTARTS "$restarts"
fill SLICES "$slices"
fill HOSTS "$((total / chips))"
fill CHIPS "$chips"
fill SERVICE_ACCOUNT "$account"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill IMAGE "$image"
fill BUCKET "$bucket"
fill ENV "$environment"
fill ARGS "$(json ${rest[@]+"${rest[@]}"})"
echo "$manifest"
if [ -n "$dry_run" ]; then exit; fi
# Not apply, which would do nothing where a JobSet of that name has ended.
echo "+ kubectl create -f -   # logs: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name" >&2
echo "                        # to start it again: kubectl delete jobset $name, then this command" >&2
kubectl create -f - <<<"$manifest"
