# Sourced by the other scripts. Changes to the repository's root. `find_python` sets PYTHON to an interpreter that has everything
# in the files that the caller names: the active python3 if it has all of it, else .venv, which is made on first use.
unset CDPATH
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
cd "$ROOT" || exit 2
export PYTHONUNBUFFERED=1

has_requirements() {  # has_requirements PYTHON FILE...: whether it meets every "name>=version" line
  "$1" - "${@:2}" 2>/dev/null <<'PY'
import sys
from importlib.metadata import version

def numbers(text):
    return [int(part) for part in text.split("+")[0].split(".") if part.isdigit()]

for path in sys.argv[1:]:
    for line in open(path):
        name, _, least = line.strip().partition(">=")
        if name and numbers(version(name)) < numbers(least):
            sys.exit(1)
PY
}

find_python() {  # find_python FILE...: sets PYTHON
  local files=("$@") args=()
  PYTHON=$(command -v python3 || command -v python)     # the active environment's, or a container's
  if [ -n "$PYTHON" ] && has_requirements "$PYTHON" "${files[@]}"; then
    echo "setup: using $PYTHON, which has what is needed"
    return
  fi
  PYTHON=$ROOT/.venv/bin/python
  if has_requirements "$PYTHON" "${files[@]}"; then
    echo "setup: using $ROOT/.venv"
    return
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || { echo "error: python3 is missing or older than 3.10: install 3.10 or later, then run the same command again" >&2; exit 2; }
  echo "setup: installing $(echo $(cat "${files[@]}")) into $ROOT/.venv (a few minutes, up to 6 GB)"
  [ -x "$PYTHON" ] && "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv \
    || { echo "error: python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
  for file in "${files[@]}"; do args+=(-r "$file"); done
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "${args[@]}" \
    || { echo "error: pip install failed; the lines above say why. Fix the cause, then run the same command again" >&2; exit 2; }
}

one_gpu_a_task() {  # in a Slurm job: refuse ranks that would share a GPU, warn about GPUs that no rank would use
  local gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_TASKS_PER_NODE:-1}
  tasks=${tasks%%[(,]*}                                     # "8(x2)" and "8,4" -> 8, on the first node, where this runs
  [ "$gpus" = 0 ] || [ "$tasks" = "$gpus" ] && return
  local asked="$tasks task(s) and $gpus GPU(s) on each node"
  local instead="use --ntasks-per-node=$gpus --gres=gpu:$gpus"
  [ "$tasks" -gt "$gpus" ] && { echo "error: $asked, so tasks would share a GPU: $instead (--gres=none: CPUs only)" >&2; exit 2; }
  echo "warning: $asked, so $((gpus - tasks)) GPU(s) would be idle: $instead, or --gres=gpu:$tasks" >&2
}
