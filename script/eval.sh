#!/usr/bin/env bash
# Evaluate a checkpoint on a Slurm cluster, or, without one, here; all arguments go to eval.py:
#   sbatch script/eval.sh --checkpoint checkpoints/imagenet_1p/best.pth
#SBATCH --job-name=simmatch-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=1:00:00
#SBATCH --output=log/%x-%j.out
here=${SLURM_JOB_ID:+$SLURM_SUBMIT_DIR}
here=${here:-$(dirname "${BASH_SOURCE[0]}")/..}
[ -f "$here/script/setup.sh" ] || { echo "error: $here is not the repository: call sbatch from its top folder" >&2; exit 2; }
source "$here/script/setup.sh"
find_python requirements.txt
exec "$PYTHON" eval.py "$@"
