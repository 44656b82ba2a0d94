"""The shell scripts: their syntax, and how they choose a Python environment."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "script").glob("*.sh")))
def test_syntax(script):
    subprocess.run(["bash", "-n", str(ROOT / "script" / script)], check=True)


def setup(function, *args, **env):
    return subprocess.run(
        [
            "bash",
            "-c",
            f'source "{ROOT}/script/setup.sh"; {function} "$@"; code=$?; echo "$PYTHON"; exit $code',
            "-",
            *map(str, args),
        ],
        cwd="/",
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    "line, met", [("numpy>=1.0", True), ("numpy>=999", False), ("no-such-package>=1", False), ("", True)]
)
def test_has_requirements(tmp_path, line, met):
    (tmp_path / "r.txt").write_text(line + "\n")
    assert (setup("has_requirements", sys.executable, tmp_path / "r.txt").returncode == 0) == met


def test_an_active_environment_that_has_everything_is_used(tmp_path):
    (tmp_path / "r.txt").write_text("numpy>=1.0\n")
    done = setup("find_python", tmp_path / "r.txt", PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")
    assert done.returncode == 0 and "has what is needed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{sys.prefix}/bin/python3"


def test_the_continuous_integration_runs_the_command_of_the_readme():
    assert "script/test.sh" in (ROOT / ".ci" / "run").read_text()
    assert "bash script/test.sh" in (ROOT / "README.md").read_text()
