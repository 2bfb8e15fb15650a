#!/usr/bin/env bash
# Cloud TPU VMs, v4 to v6e, one slice or several, from this machine. Flags that are not listed here go to the program.
#
#   bash launch/tpu_vm.sh create --name=NAME --type=v5litepod-16 [--slices=N] [--spot] [--runtime=VERSION]
#   bash launch/tpu_vm.sh setup  --name=NAME [--bucket=BUCKET]    # this checkout and its environment on every host
#   bash launch/tpu_vm.sh run    --name=NAME --config=configs/llada_8b_pretrain.py --workdir=bucket/run …
#   bash launch/tpu_vm.sh logs | status | stop | ssh | delete --name=NAME
#
# Everywhere: [--project=ID] [--zone=ZONE] (else gcloud's defaults), [--dry_run] to see the commands alone. `run` starts
# python -m llada_jax.train (or --program=MODULE) on every host and returns; the same command again continues the run.
# All hosts must see --workdir: --bucket mounts a Cloud Storage bucket at ~/bucket, which relative paths reach.
# launch/babysit.py does all of this, and again after each preemption.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 2; }

show() { # prints a command and, unless --dry_run, runs it
  { printf '+'; printf ' %q' "$@"; echo; } >&2
  if [ -z "$dry_run" ]; then "$@"; fi
}

action=${1:-}
if [ $# -gt 0 ]; then shift; fi
name="" type="" slices=1 spot="" runtime="" bucket="" project="" zone="" program=llada_jax.train dry_run="" rest=()
for flag in "$@"; do
  case $flag in
    --name=*) name=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --slices=*) slices=${flag#*=} ;;
    --spot) spot=yes ;;
    --runtime=*) runtime=${flag#*=} ;;
    --bucket=*) bucket=${flag#*=} bucket=${bucket#gs://} ;;
    --project=*) project=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --program=*) program=${flag#*=} ;;
    --dry_run) dry_run=yes ;;
    *) rest+=("$flag") ;;
  esac
done

case $action in
  create | setup | run | logs | status | state | run_state | stop | ssh | delete) ;;
  *) fail "say what to do: create, setup, run, logs, status, stop, ssh or delete; the head of $0 explains" ;;
esac
if [ "$action" != run ] && [ ${#rest[@]} -gt 0 ]; then fail "$action takes no ${rest[0]}"; fi
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
fi
default() { gcloud config get-value "$1" 2>/dev/null || true; }
if [ -z "$project" ]; then project=$(default project); fi
if [ -z "$zone" ]; then zone=$(default compute/zone); fi
if [ -z "$name" ]; then fail "--name=NAME is needed: what the TPU is or will be called"; fi
if [ -z "$project" ]; then fail "no project: give --project=ID, or run gcloud config set project ID"; fi
if [ -z "$zone" ]; then fail "no zone: give --zone=ZONE, or run gcloud config set compute/zone ZONE"; fi

place=(--project="$project" --zone="$zone")
resources=(gcloud compute tpus queued-resources)
on_all() { show "${resources[@]}" ssh "$name" "${place[@]}" --node=all --worker=all --command="$1"; }
on_first() { show "${resources[@]}" ssh "$name" "${place[@]}" --node=0 --worker=0 --command="$1"; }
quoted() { if [ $# -gt 0 ]; then printf ' %q' "$@"; fi; }

create() {
  case $type in
    "") fail "--type is needed: v5litepod-16, v5p-32, v6e-8, v4-32, …" ;;
    *7x*) fail "TPU 7x comes through GKE only: launch/xpk.sh or launch/gke_jobset.sh" ;;
    v6e-*) runtime=${runtime:-v2-alpha-tpuv6e} ;;
    v5p-*) runtime=${runtime:-v2-alpha-tpuv5} ;;
    v5litepod-*) runtime=${runtime:-v2-alpha-tpuv5-lite} ;;
    *) runtime=${runtime:-tpu-ubuntu2204-base} ;;
  esac
  local node=(--node-id="$name")
  if [ "$slices" != 1 ]; then node=(--node-count="$slices" --node-prefix="$name"); fi
  show "${resources[@]}" create "$name" "${place[@]}" "${node[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" ${spot:+--spot}
}

setup() {
  local archive
  archive=$(mktemp -d)/llada_jax.tgz
  git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -czf "$archive"
  show "${resources[@]}" scp "$archive" "$name:llada_jax.tgz" "${place[@]}" --node=all --worker=all
  rm -r "$(dirname "$archive")"
  on_all "mkdir -p llada_jax && tar -xzf llada_jax.tgz -C llada_jax && bash llada_jax/launch/worker.sh setup $bucket"
}

state() { # of the queued resource in one word, NONE if there is no such
  local found
  if found=$(show "${resources[@]}" describe "$name" "${place[@]}" --format="value(state.state)" 2>&1); then
    echo "$found" | grep -v '^+' | tail -n 1
  elif echo "$found" | grep -qi "not[ _]found"; then
    echo NONE
  else
    fail "$(echo "$found" | tail -n 1)"
  fi
}

case $action in
  create) create ;;
  setup) setup ;;
  run) on_all "bash llada_jax/launch/worker.sh run $program$(quoted ${rest[@]+"${rest[@]}"})" ;;
  logs) on_first "tail -n 200 -F llada_jax/run.log" ;;
  state) state ;;
  run_state) on_first "bash llada_jax/launch/worker.sh state 2>/dev/null || echo NOTHING" ;;
  status)
    now=$(state)
    echo "$name: $now"
    if [ "$now" = ACTIVE ]; then on_first "bash llada_jax/launch/worker.sh state; tail -n 3 llada_jax/run.log"; fi ;;
  stop) on_all "bash llada_jax/launch/worker.sh stop" ;;
  ssh) show "${resources[@]}" ssh "$name" "${place[@]}" ;;
  delete) show "${resources[@]}" delete "$name" "${place[@]}" --force --quiet ;;
esac
