"""A rank that hangs is named by the others without the help of a process group, as with NCCL."""

import signal
import subprocess
import time

import fork_server
import pytest
from conftest import ROOT, free_port, one_thread

pytestmark = pytest.mark.slow(9)
# Gloo waits ten minutes here, as NCCL waits without an end.
PROGRAM = """
import sys, time
from pathlib import Path
from util import dist_utils, heartbeat, process_groups
from util.errors import cli_main

folder, where, victim = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
heartbeat.PERIOD, heartbeat.SILENT_SECONDS = 0.2, 3

def wait_for_test():
    (folder / "waiting").touch()
    while not (folder / "stopped").exists():
        time.sleep(0.01)

def main():
    dist_utils.dist_init("cpu", 10, 0)
    process_groups.HEARTBEAT.timeout = 4
    is_victim = dist_utils.rank() == victim
    for step in range(5):
        dist_utils.begin_phase(f"step {step}: data")
        here = where if step == 3 else ""
        if here == "phase" and is_victim or here == "collective" and not is_victim:
            wait_for_test()
        if here == "thread" and is_victim:
            time.sleep(1000)
        if here == "slow":
            time.sleep(6)
            for part in range(30):
                dist_utils.begin_phase(f"step {step}: part {part}")
                time.sleep(0.2 * is_victim)
        dist_utils.any_rank(False)
    dist_utils.dist_end()

cli_main(main, describe_error=dist_utils.describe_lost_ranks)
"""


def start(folder, where, victim, processes):
    """Start ranks that run PROGRAM."""
    (folder / "program.py").write_text(PROGRAM)
    env = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"TORCHELASTIC_RUN_ID": "test", "PYTHONPATH": str(ROOT)}
    return [
        fork_server.popen(
            [folder / "program.py", folder, where, victim],
            env=one_thread({**env, "RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]


def finish(ranks):
    """(exit code, lines of stderr) of each."""
    try:
        return [(text := rank.communicate(60)) and (rank.returncode, text[1].splitlines()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_named(result, victim):
    code, lines = result
    assert code == 1 and len(lines) == 1, lines
    assert f" timed out waiting for rank {victim} on " in lines[0], lines
    assert ", which hangs or has ended (last seen in step 3: data): " in lines[0], lines


@pytest.mark.parametrize("where", ["phase", "collective"])
@pytest.mark.parametrize("victim, processes", [(0, 3), (1, 2)])
def test_a_stopped_rank_is_named_with_its_phase(where, victim, processes, tmp_path):
    ranks = start(tmp_path, where, victim, processes)
    wait_for(tmp_path / "waiting")
    time.sleep(1)  # until the phase is published, and the victim of "collective" is inside it
    ranks[victim].send_signal(signal.SIGSTOP)
    (tmp_path / "stopped").touch()
    stopped = ranks.pop(victim)
    try:
        for result in finish(ranks):
            assert_named(result, victim)
    finally:
        stopped.kill()


def test_a_rank_whose_main_thread_hangs_is_named_and_ends_too(tmp_path):
    first, (code, lines), last = finish(start(tmp_path, "thread", 1, 3))
    assert_named(first, 1)
    assert_named(last, 1)
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: rank 1 on "), lines
    assert "hangs in step 3: data: the other ranks timed out waiting for it" in lines[0], lines


def test_ranks_that_are_slower_than_the_timeout_are_not_lost(tmp_path):
    """A phase of all ranks takes longer than the timeout; then one rank makes progress, but slowly."""
    assert finish(start(tmp_path, "slow", 1, 2)) == [(0, []), (0, [])]
