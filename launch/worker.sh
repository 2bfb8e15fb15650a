#!/usr/bin/env bash
# On one host of a TPU, called by tpu_vm.sh: worker.sh setup [BUCKET] | run MODULE FLAGS… | state | stop
# The run's output is run.log; run.pid and run.exit say whether it goes on and how it ended.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

is_running() { [ -f run.pid ] && kill -0 "$(cat run.pid)" 2>/dev/null; }

stop() { # the run and what it started
  if is_running; then
    kill -TERM -- "-$(cat run.pid)"
    for _ in $(seq 600); do is_running || break; sleep 0.5; done # it saves before it ends
    if is_running; then kill -KILL -- "-$(cat run.pid)"; fi
  fi
  rm -f run.pid run.exit
}

setup() {
  if ! command -v python3.11 python3.12 python3.13 >/dev/null; then # the images bring 3.10
    sudo add-apt-repository -y ppa:deadsnakes/ppa >/dev/null
    sudo apt-get update -q >/dev/null
    sudo apt-get install -qy python3.12 python3.12-venv >/dev/null
  fi
  prepare_environment "$PWD/.venv-llada" tpu
  if [ $# -gt 0 ]; then mount_bucket "$1"; fi
}

mount_bucket() { # at ~/bucket
  if mountpoint -q "$HOME/bucket"; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc apt=https://packages.cloud.google.com/apt
    curl -fsS "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -q >/dev/null
    sudo apt-get install -qy gcsfuse >/dev/null
  fi
  mkdir -p "$HOME/bucket"
  gcsfuse --implicit-dirs "$1" "$HOME/bucket"
  ln -sfn "$HOME/bucket" bucket
}

run() {
  prepare_environment "$PWD/.venv-llada" tpu
  stop
  rm -f run.exit
  # A session of its own, so that it outlives the connection and can be stopped as a whole.
  # SIGTERM goes to the whole session; its first process waits for the run, which saves.
  setsid bash -c 'trap : TERM; echo $$ >run.pid; "$@"; echo $? >run.exit; rm -f run.pid' _ "$PYTHON" -m "$@" --distributed \
    >>run.log 2>&1 </dev/null &
  echo "$(hostname): started python -m $*"
}

state() {
  if is_running; then echo RUNNING; elif [ -f run.exit ]; then echo "EXITED $(cat run.exit)"; else echo NOTHING; fi
}

action=$1
shift
"$action" "$@"
