#!/usr/bin/env bash
# Cloud TPU VMs, v4 to v6e, one slice or several, from this machine. Flags that are not listed here go to the program.
#
#   bash launch/tpu_vm.sh create --name=NAME --type=v5litepod-16 [--slices=N] [--spot | --reserved] [--runtime=VERSION]
#       [--network=NAME] [--subnetwork=NAME] [--internal-ips] [--service-account=EMAIL] [--labels=KEY=VALUE] [--tags=TAG]
#   bash launch/tpu_vm.sh setup  --name=NAME [--bucket=BUCKET]    # this checkout and its environment on every host
#   bash launch/tpu_vm.sh run    --name=NAME [--cache=DIR] --config=configs/llada_8b_pretrain.py --workdir=gs://BUCKET/run …
#   bash launch/tpu_vm.sh logs | status | stop | ssh | delete --name=NAME
#
# Everywhere: [--project=ID] [--zone=ZONE] (else gcloud's defaults), [--tunnel-through-iap | --internal-ip] for TPUs
# without external addresses, [--dry_run] to see the commands alone, [--quiet] not to see them. `run` starts
# python -m llada_jax.train (or --program=MODULE) on every host and returns; the same command again continues the run.
# All hosts must reach --workdir: a gs:// address, or a relative path under bucket/, where `setup --bucket=BUCKET` mounts
# a Cloud Storage bucket. --cache (none: no cache) is where compiled programs are kept; else beside the workdir.
# launch/babysit.py does all of this, and again after each preemption.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

action=${1:-}
if [ $# -gt 0 ]; then shift; fi
name="" type="" slices=1 runtime="" bucket="" project="" zone="" program=llada_jax.train cache="" dry_run="" quiet=""
created=() reached=() rest=()
for flag in "$@"; do
  case $flag in
    --name=*) name=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --slices=*) slices=${flag#*=} ;;
    --runtime=*) runtime=${flag#*=} ;;
    --bucket=*) bucket=${flag#*=} bucket=${bucket#gs://} ;;
    --project=*) project=${flag#*=} ;;
    --zone=*) zone=${flag#*=} ;;
    --program=*) program=${flag#*=} ;;
    --cache=*) cache=${flag#*=} ;;
    --dry_run) dry_run=yes ;;
    --quiet) quiet=yes ;;
    --spot | --reserved | --network=* | --subnetwork=* | --service-account=* | --labels=* | --tags=*) created+=("$flag") ;;
    --internal-ips) created+=("$flag"); if [ ${#reached[@]} = 0 ]; then reached=(--tunnel-through-iap); fi ;;
    --tunnel-through-iap | --internal-ip) reached=("$flag") ;;
    --help) usage ;;
    *) rest+=("$flag") ;;
  esac
done

case $action in
  create | setup | run | logs | status | state | run_state | stop | ssh | delete) ;;
  --help) usage ;;
  *) fail "say what to do: create, setup, run, logs, status, stop, ssh or delete; --help explains" ;;
esac
if [ "$action" != run ] && [ ${#rest[@]} -gt 0 ]; then fail "$action takes no ${rest[0]}"; fi
if ! [[ $slices =~ ^[1-9][0-9]*$ ]]; then fail "--slices=$slices is not a number of slices"; fi
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
fi
if [ -z "$project" ]; then project=$(gcloud_default project); fi
if [ -z "$zone" ]; then zone=$(gcloud_default compute/zone); fi
if [ -z "$name" ]; then fail "--name=NAME is needed: what the TPU is or will be called"; fi
if [ -z "$project" ]; then fail "no project: give --project=ID, or run gcloud config set project ID"; fi
if [ -z "$zone" ]; then fail "no zone: give --zone=ZONE, or run gcloud config set compute/zone ZONE"; fi

# --quiet: gcloud asks nothing, and so never waits for an answer.
place=(--project="$project" --zone="$zone" --quiet)
resources=(gcloud compute tpus queued-resources)
reach() { show "${resources[@]}" "$1" "${@:2}" "${place[@]}" ${reached[@]+"${reached[@]}"}; }
on_all() { reach ssh "$name" --node=all --worker=all --command="$1"; }
on_first() { reach ssh "$name" --node=0 --worker=0 --command="$1"; }

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
    --runtime-version="$runtime" ${created[@]+"${created[@]}"}
}

setup() { # the files of the checkout that are there, then worker.sh on every host
  if ! git rev-parse --git-dir >/dev/null 2>&1; then fail "this is no git checkout, whose files setup would copy"; fi
  made=$(mktemp -d)
  trap 'rm -r "$made"' EXIT
  git ls-files -z --cached --others --exclude-standard | while IFS= read -rd '' file; do
    if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi
  done | tar --null -T - -czf "$made/llada_jax.tgz"
  reach scp "$made/llada_jax.tgz" "$name:llada_jax.tgz" --node=all --worker=all
  on_all "mkdir -p llada_jax && tar -xzf llada_jax.tgz -C llada_jax && bash llada_jax/launch/worker.sh setup$(quoted ${bucket:+"$bucket"})"
}

state() { # of the queued resource in a word, with the reason if it FAILED; NONE if there is no such
  local command=("${resources[@]}" describe "$name" "${place[@]}") found error code=0
  command+=(--format="value(state.state,state.failedData.error.message)") # with a tab between them
  if [ -n "$dry_run" ]; then show "${command[@]}"; return; fi
  error=$(mktemp)
  found=$("${command[@]}" 2>"$error") || code=$?
  if [ "$code" = 0 ]; then
    found=${found%$'\t'}
    echo "${found/$'\t'/: }"
  elif grep -qi 'not[ _]found' "$error" && grep -qE 'queuedResources/|Resource ' "$error"; then # a zone can be so, too
    echo NONE
    code=0
  else
    cat "$error" >&2
  fi
  rm "$error"
  return "$code"
}

case $action in
  create) create ;;
  setup) setup ;;
  run)
    directory=$(cache_for "$cache" ${rest[@]+"${rest[@]}"})
    on_all "bash llada_jax/launch/worker.sh run$(quoted "${directory:-none}" "$program" ${rest[@]+"${rest[@]}"})" ;;
  logs) on_first "tail -n 200 -F llada_jax/run.log" ;;
  state) state ;;
  run_state) on_first "bash llada_jax/launch/worker.sh state 2>/dev/null || echo NOTHING" ;;
  status)
    now=$(state)
    if [ -z "$dry_run" ]; then echo "$name: $now"; fi
    if [ -n "$dry_run" ] || [ "$now" = ACTIVE ]; then on_first "bash llada_jax/launch/worker.sh state"; fi ;;
  stop) on_all "bash llada_jax/launch/worker.sh stop" ;;
  ssh) reach ssh "$name" --node=0 --worker=0 --ssh-flag=-t --command="bash -l" ;; # it has to have a command
  delete) show "${resources[@]}" delete "$name" "${place[@]}" --force ;;
esac
