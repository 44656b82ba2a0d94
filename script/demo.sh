#!/usr/bin/env bash
# Set up, then train SimMatch, FixMatch and supervised on handwritten digits with ten labels, one of each digit, evaluate
# them, and show the results side by side. Finished runs are kept: a second call only evaluates again.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set -e
find_python requirements.txt
methods=(simmatch fixmatch supervised)
for method in "${methods[@]}"; do
  echo; echo "demo: training $method on 10 labels"
  "$PYTHON" train_semi.py --config configs/digits.yaml --method "$method" \
    --output-dir "checkpoints/demo/$method"
done
for method in "${methods[@]}"; do
  echo; echo "demo: evaluating $method"
  "$PYTHON" eval.py --checkpoint "checkpoints/demo/$method/last.pth"
done
echo
"$PYTHON" -m util.report "${methods[@]/#/checkpoints/demo/}" --curves checkpoints/demo/curves.png
printf 'TensorBoard: %q -m tensorboard.main --logdir %q\n' "$PYTHON" "$ROOT/checkpoints/demo"
