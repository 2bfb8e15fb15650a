#!/usr/bin/env bash
# On one host of a TPU, called by tpu_vm.sh: worker.sh setup [BUCKET] | run CACHE MODULE FLAGS… | state | stop
# The run's output is run.log. While a run goes on its shell holds a lock on run.lock, which a reboot takes away as the
# run itself; run.exit is the code with which the last one ended.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
. launch/environment.sh

is_running() { ! flock --nonblock run.lock true; }

stop() { # the run and what it started
  if is_running; then
    kill -TERM -- "-$(cat run.pid)"
    for _ in $(seq 600); do is_running || break; sleep 0.5; done # it saves before it ends
    if is_running; then kill -KILL -- "-$(cat run.pid)"; fi
  fi
  rm -f run.pid run.exit
}

setup() {
  remove_what_is_gone
  if ! find_python; then # the images bring 3.10
    sudo add-apt-repository --yes --no-update ppa:deadsnakes/ppa >/dev/null
    install_packages python3.12 python3.12-venv
  fi
  prepare_environment "$PWD/.venv-llada" tpu gcs
  if [ $# -gt 0 ]; then
    echo "$1" >bucket.name # for the runs to come: a reboot takes the mount away
    mount_bucket
  fi
}

remove_what_is_gone() { # the files of the last setup that this one did not bring
  tar -tzf "$HOME/llada_jax.tgz" --quoting-style=literal | LC_ALL=C sort >.files.new
  if [ -f .files ]; then LC_ALL=C comm -23 .files .files.new | tr '\n' '\0' | xargs -0 rm -f --; fi
  mv .files.new .files
}

install_packages() { # waits for the updates that a new machine makes by itself
  local apt=(sudo env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=a apt-get -qy -o DPkg::Lock::Timeout=600)
  for _ in $(seq 30); do "${apt[@]}" update >/dev/null && break; sleep 10; done
  "${apt[@]}" install "$@" >/dev/null
}

mount_bucket() { # at ~/bucket, which is bucket/ here
  if mountpoint -q "$HOME/bucket" && [ "$(findmnt -no SOURCE "$HOME/bucket")" = "$(cat bucket.name)" ]; then return; fi
  fusermount -uz "$HOME/bucket" 2>/dev/null || true # one that is broken, or another bucket
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
    curl -fsS "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    install_packages gcsfuse
  fi
  mkdir -p "$HOME/bucket"
  # A flat bucket renames a directory file by file, and none at all without the limit.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 "$(cat bucket.name)" "$HOME/bucket" >&2
  mountpoint -q "$HOME/bucket" || { echo "error: gcsfuse did not mount $(cat bucket.name) at ~/bucket" >&2; exit 1; }
  ln -sfn "$HOME/bucket" bucket
}

run() { # CACHE MODULE FLAGS…
  local cache=$1
  shift
  case " $*" in
    *" --workdir=bucket/"* | *" --workdir bucket/"*)
      if [ ! -f bucket.name ]; then fail "--workdir is under bucket/, where nothing is mounted; setup --bucket=BUCKET does it"; fi ;;
  esac
  stop
  prepare_environment "$PWD/.venv-llada" tpu gcs
  if [ -f bucket.name ]; then mount_bucket; fi
  if [ "$cache" != none ]; then export JAX_COMPILATION_CACHE_DIR=$cache; fi
  echo "== $(date '+%F %T') python -m $*" >>run.log
  exec 9>run.lock
  flock --nonblock 9 || { echo "error: another run has just been started" >&2; exit 1; }
  # A session of its own, so that it outlives the connection and can be stopped as a whole.
  # SIGTERM goes to the whole session; its first process waits for the run, which saves.
  setsid bash -c 'trap : TERM; code=0; "$@" 9>&- || code=$?; echo "$code" >run.exit' _ \
    "$PYTHON" -m "$@" --distributed >>run.log 2>&1 </dev/null &
  echo $! >run.pid
  echo "$(hostname): started python -m $*"
}

state() { # RUNNING, NOTHING or "EXITED code", the newest step that the log names, and the line that says most
  local now=NOTHING log="" step="" said=""
  if is_running; then now=RUNNING; elif [ -f run.exit ]; then now="EXITED $(cat run.exit)"; fi
  if [ -f run.log ]; then log=$(tail -c 1000000 run.log | tac | sed '/^== /Q') || true; fi # of this run, the last line first
  step=$(grep -oE '\bstep [0-9]+' <<<"$log" | sort -k2nr | sed -n 1p) || true
  said=$(grep -m 1 '^error: ' <<<"$log" || grep -m 1 '[^[:space:]]' <<<"$log") || true
  echo "$now${step:+ $step}"
  if [ -n "$said" ]; then echo "said: $said"; fi
}

action=$1
shift
"$action" "$@"
