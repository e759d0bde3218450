#!/usr/bin/env bash
# CvT-13 on ImageNet on two nodes with 8 GPUs each: sbatch launch/slurm.sh, in a checkout with its
# environment in .venv (requirements-cuda.txt). Options of sbatch go before the file's name, the
# arguments of train.py after it:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/cvt21_imagenet.py --workdir=runs/cvt21
#
# A node has as many tasks as GPUs: change --gpus-per-node and --ntasks-per-node together.
#
# Five minutes before its time is over, or when it is preempted, the run saves and ends with 75: the
# job is put into the queue again, and goes on.
#SBATCH --job-name=cvt
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
: "${SLURM_JOB_ID:?is for sbatch: sbatch launch/slurm.sh}"

if [ "$#" -eq 0 ]; then
  set -- --config=configs/cvt13_imagenet.py
fi
# What is compiled is kept, for the run that goes on.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compiled}"
code=0
trap : TERM  # the steps answer it; this has to see how they end
# A process for each GPU, which is how JAX finds them under Slurm. From 22.05 on srun takes no
# --cpus-per-task from the job.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" --kill-on-bad-exit=0 \
  .venv/bin/python train.py "$@" --distributed=auto || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
