#!/usr/bin/env bash
# Train on a Slurm cluster, or without one on all GPUs of this machine (docs/SLURM.md):
#   sbatch script/train.sh                                                       the 1 % recipe on one node with 8 GPUs
#   sbatch --nodes=2 script/train.sh configs/imagenet_10p.yaml --seed 1          10 % of the labels, on two nodes
#   sbatch --ntasks-per-node=4 --gres=gpu:4 script/train.sh                      on nodes with 4 GPUs
#   bash script/train.sh configs/digits.yaml --epochs 5                          on this machine
# Options on sbatch's command line override the lines below. Before the time limit, or when it is preempted, the job saves, goes
# back into the queue, and later continues at the same step.
#SBATCH --job-name=simmatch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=log/%x-%j.out
here=$(dirname "${BASH_SOURCE[0]}")/..
[ -f "$here/script/setup.sh" ] || here=$SLURM_SUBMIT_DIR    # Slurm runs a copy of this file from a folder of its own
[ -f "$here/script/setup.sh" ] || { echo "error: $here is not the repository: call sbatch from its top folder" >&2; exit 2; }
source "$here/script/setup.sh"
one_gpu_a_task
find_python requirements.txt
config=configs/imagenet_1p.yaml
case ${1:-} in ''|-*) ;; *) config=$1; shift ;; esac

if [ -z "${SLURM_JOB_ID:-}" ]; then
  gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
  if [ "$gpus" = 0 ] && command -v sbatch >/dev/null; then
    echo "train: no GPU on this machine, so training uses the CPU. To use the cluster's: sbatch script/train.sh $config $*"
  fi
  [ "$gpus" -le 1 ] && exec "$PYTHON" train_semi.py --config "$config" --debug "$@"
  exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus" train_semi.py --config "$config" --debug "$@"
fi
echo "train: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number ${SLURM_RESTART_COUNT:-0}: $config $*"
# The ranks handle USR1, and this script waits for them. TERM must end this script: it comes with scancel or Slurm's own requeue.
trap : USR1
# When a rank ends, srun ends the others a minute later, not at once: ranks that stop on request do not end at the same time.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  "$PYTHON" train_semi.py --config "$config" --debug "$@" &
wait $!; code=$?
while kill -0 $! 2>/dev/null; do wait $!; code=$?; done     # `wait` also returns when the trap runs
if [ $code = 75 ]; then                                     # asked to stop, and saved (util/run/preempt.py)
  echo "train: back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || echo "train: Slurm did not requeue the job; the same sbatch command continues" >&2
elif [ $code != 0 ]; then
  echo "train: ended with exit code $code and is not started again: fix the cause; the same sbatch command continues" >&2
fi
exit $code
