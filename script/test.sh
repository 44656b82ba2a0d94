#!/usr/bin/env bash
# Set up and run the tests. `bash script/test.sh -m "not slow"` for the quick ones; all arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
find_python requirements.txt tests/requirements.txt
echo "test: running pytest $*"
exec "$PYTHON" -m pytest "$@"
