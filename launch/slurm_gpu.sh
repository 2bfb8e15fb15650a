#!/usr/bin/env bash
#SBATCH --job-name=llada_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-gpu=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --output=runs/slurm-%j.log
# A run on GPUs of a Slurm cluster, one process a GPU; the checkout and --workdir are on the shared file system.
# Flags of llada_jax.train follow the script; those of sbatch come before it and outdo the ones above:
#
#   mkdir -p runs && sbatch --nodes=2 launch/slurm_gpu.sh --config=configs/llada_8b_pretrain.py --workdir=runs/8b …
#
# Five minutes before the time limit the run is asked to stop; it saves, and the job is queued again and continues.
# scancel ends it for good; submitting the same command again continues it. Compiled programs are kept beside the
# workdir, or in JAX_COMPILATION_CACHE_DIR.
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: not a Slurm job; submit it: sbatch --nodes=N --gpus-per-node=G $0 --config=… --workdir=…" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
if [ ! -f launch/environment.sh ]; then
  echo "error: submit it from the checkout: cd llada_jax && sbatch launch/slurm_gpu.sh …" >&2
  exit 2
fi
. launch/common.sh
. launch/environment.sh
prepare_environment "$PWD/.venv-llada" gpu
directory=$(cache_for "${JAX_COMPILATION_CACHE_DIR:-}" "$@")
unset JAX_COMPILATION_CACHE_DIR
if [ -n "$directory" ]; then export JAX_COMPILATION_CACHE_DIR=$directory; fi

cancelled=""
trap 'cancelled=yes' TERM # scancel; the signal before the time limit goes to the steps alone
code=0
# One process a GPU comes from the options above. Each sees the GPUs of its node and takes the one of its local rank, so
# that they can reach each other. A process that has saved and ended must not make Slurm kill the others, which are about
# to: they end by themselves, or after --wait seconds.
show srun --gpu-bind=none --kill-on-bad-exit=0 --wait=120 \
  "$PYTHON" -m llada_jax.train --distributed "$@" || code=$?
if [ "$code" = 75 ] && [ -z "$cancelled" ]; then show scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
