#!/usr/bin/env bash
# Set up and run the tests. `bash script/test.sh -m "not slow"` for the quick ones; all arguments go to pytest.
# They run side by side, one stream a core; Slurm's tests, which mostly wait, in one more. `-n 0` runs them one by one.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
find_python requirements.txt tests/requirements.txt
streams=$(getconf _NPROCESSORS_ONLN)
[ "$streams" -le 8 ] || streams=8                         # each takes 1 GB
command -v sbatch >/dev/null && streams=$((streams + 1))
echo "test: running pytest in $streams streams $*"
exec "$PYTHON" -m pytest -n "$streams" "$@"
