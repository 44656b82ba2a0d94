#!/usr/bin/env bash
# Evaluate a checkpoint on a Slurm cluster, or without one on this machine; all arguments go to eval.py (docs/SLURM.md):
#   sbatch script/eval.sh --checkpoint checkpoints/imagenet_1p/best.pth
#   sbatch --ntasks-per-node=4 --gres=gpu:4 script/eval.sh --checkpoint checkpoints/imagenet_1p/best.pth       on 4 GPUs
#SBATCH --job-name=simmatch-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=1:00:00
#SBATCH --output=log/%x-%j.out
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -f "$here/script/setup.sh" ] || here=$SLURM_SUBMIT_DIR    # Slurm runs a copy of this file from a folder of its own
[ -f "$here/script/setup.sh" ] || { echo "error: $here is not the repository: call sbatch from its top folder" >&2; exit 2; }
source "$here/script/setup.sh"
one_gpu_a_task
find_python requirements.txt
[ -z "${SLURM_JOB_ID:-}" ] && exec "$PYTHON" eval.py "$@"
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$PYTHON" eval.py "$@"
