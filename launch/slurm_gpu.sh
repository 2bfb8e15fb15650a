#!/usr/bin/env bash
#SBATCH --job-name=llada_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --output=runs/slurm-%j.log
# A run on GPUs of a Slurm cluster, one process a GPU; the checkout and --workdir are on the shared file system.
# Flags of llada_jax.train follow the script:
#
#   mkdir -p runs && sbatch --nodes=2 launch/slurm_gpu.sh --config=configs/llada_8b_pretrain.py --workdir=runs/8b …
#
# Submitting the same command again, or Slurm's requeueing it, continues the run.
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
. launch/environment.sh
prepare_environment "$PWD/.venv-llada" gpu
gpus=${SLURM_GPUS_ON_NODE:-8}
# Each process sees the GPUs of its node and takes the one of its local rank, so that they can reach each other.
command=(srun --ntasks="$((SLURM_JOB_NUM_NODES * gpus))" --ntasks-per-node="$gpus" --gpu-bind=none --kill-on-bad-exit=1
  "$PYTHON" -m llada_jax.train --distributed "$@")
{ printf '+'; printf ' %q' "${command[@]}"; echo; } >&2
exec "${command[@]}"
