"""tests/fork_server.py against a new process: the same output and exit code."""

import os
import re
import signal
import subprocess
import sys
import time

import fork_server
import pytest
from conftest import DIGITS, ROOT, one_thread

from benchmark.same_run import difference

SCRIPTS = {
    "success": "import sys; print(sys.argv, __name__, __file__, sys.path[0]); print('w', file=sys.stderr)",
    "traceback": "def f():\n    raise ValueError('a bug')\n\nprint('before')\nf()",
    "a code": "import sys; print('no newline', end=''); sys.exit(75)",
    "a message": "import sys; sys.exit('what went wrong')",
    "Ctrl-C": "raise KeyboardInterrupt",
    "atexit": "import atexit; atexit.register(print, 'at exit'); atexit.register(lambda: 1 / 0)",
    "a thread": "import threading; threading.Timer(0.3, lambda: print('late')).start(); print('early')",
    "syntax": "def f(:\n",
    "environment": "import os; print(sorted(os.environ.items()), os.getcwd(), os.path.exists('script.py'))",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_and_returns_the_same(name, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPTS[name])
    both(["script.py", "--flag", "value"], cwd=tmp_path, env=one_thread({"ONLY": "here"}))


def both(args, **how):
    """Run in a new process and in a fork; returns the output, which must be the same."""
    new = subprocess.run([sys.executable, *args], capture_output=True, text=True, **how)
    fork = fork_server.run(args, **how)
    assert (fork.returncode, fork.stdout) == (new.returncode, new.stdout)
    fork_err, new_err = (re.sub("0x[0-9a-f]+", "0x…", done.stderr) for done in (fork, new))  # addresses
    assert fork_err == new_err
    return new


def test_a_user_error(tmp_path):
    done = both(["train_semi.py", "--config", str(tmp_path / "none.yaml")], cwd=ROOT, env=one_thread())
    assert done.returncode == 2 and "none.yaml" in done.stderr


def test_a_module(tmp_path):
    done = both(["-m", "util.doctor", str(tmp_path / "none")], cwd=ROOT, env=one_thread())
    assert done.returncode == 2 and "none" in done.stderr


@pytest.mark.slow(10)
def test_a_run_with_workers_computes_the_same_bits(tmp_path, command):
    """Workers import the main module by its path."""
    for name, new_process in (("new", True), ("fork", False)):
        flags = [*DIGITS, tmp_path / name, "--steps-per-epoch", "2", "--workers", "1"]
        done = command("train_semi.py", *flags, new_process=new_process)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    assert difference(tmp_path / "new", tmp_path / "fork") == ""


def test_a_fork_is_killed_waited_for_and_read_while_it_runs(tmp_path):
    (tmp_path / "script.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    process = fork_server.popen(
        ["script.py"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n" and process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    assert os.getpgid(process.pid) == process.pid
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30) == ("", None) and process.returncode == -signal.SIGTERM


def test_forks_run_side_by_side(tmp_path):
    (tmp_path / "script.py").write_text("import time; time.sleep(1)")
    begun = time.monotonic()
    forks = [fork_server.popen(["script.py"], cwd=tmp_path) for _ in range(8)]
    assert [fork.wait(timeout=60) for fork in forks] == 8 * [0]
    assert time.monotonic() - begun < 7
