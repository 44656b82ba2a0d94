"""The log of a resumed run, and the progress line in a terminal."""

import json
import os
import pty
import subprocess
import sys

from conftest import ROOT

from util.run.log import Logger
from util.run.output_dir import init_output_dir

KEYS = ("loss_x", "loss_u", "loss_in", "loss", "mask", "pseudo_acc", "lr", "images_per_s")
VALUES = {**dict.fromkeys(KEYS, 1.0), "loss_u": None}


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_events_after_the_checkpoint_are_dropped(tmp_path):
    log = Logger(tmp_path, start=0, total=50, active=True)
    for step in (10, 20, 30):
        log.train(step, 1, 5, VALUES)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "train", "step": 40, "lo')  # a crash in the middle of a line
    log = Logger(tmp_path, start=20, total=50, active=True)
    assert steps(tmp_path) == [10, 20]
    log.train(30, 1, 5, VALUES)
    log.close()
    assert steps(tmp_path) == [10, 20, 30]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["loss_u"] is None


def test_a_new_run_archives_the_files_of_an_earlier_run(tmp_path):
    assert init_output_dir(tmp_path, tmp_path, tmp_path / "best.pth", "a: 1\n", new_run=True) == ""
    for number in (1, 2):
        log = Logger(tmp_path, start=0, total=50, active=True)
        log.log_start(0, "a split", "12")
        log.train(10, 1, 5, VALUES)
        log.close()
        (tmp_path / "best.pth").write_text(f"model {number}")
        assert init_output_dir(tmp_path, tmp_path, tmp_path / "best.pth", "a: 1\n", new_run=False) == ""
        renamed = init_output_dir(tmp_path, tmp_path, tmp_path / "best.pth", "a: 1\n", new_run=True)
        assert renamed.endswith(f" were renamed: log.jsonl.old{number}, best.pth.old{number}")
        assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "best.pth").exists()
        assert (tmp_path / f"log.jsonl.old{number}").read_text().count("\n") == 2
    assert (tmp_path / "best.pth.old1").read_text() == "model 1"


def test_a_config_of_the_user_is_renamed(tmp_path):
    (tmp_path / "config.yaml").write_text("# mine\na: 1\n")
    renamed = init_output_dir(tmp_path, tmp_path, tmp_path / "best.pth", "a: 1\n", new_run=True)
    assert renamed.endswith(" were renamed: config.yaml.old1")
    assert (tmp_path / "config.yaml.old1").read_text() == "# mine\na: 1\n"
    assert init_output_dir(tmp_path, tmp_path, tmp_path / "best.pth", "a: 1\n", new_run=True) == ""
    assert (
        init_output_dir(tmp_path, tmp_path, tmp_path / "best.pth", "b: 1\n", new_run=False) == ""
    )  # a resumed run


def test_bad_images_are_listed(tmp_path, capsys):
    log = Logger(tmp_path, start=0, total=50, active=True)
    log.bad_images(5, [], "x")
    log.bad_images(10, [("b.jpg", "torn"), ("a.jpg", "empty"), ("b.jpg", "torn")], "replaced")
    log.close()
    (event,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert event == {
        "event": "bad_images",
        "step": 10,
        "fate": "replaced",
        "count": 3,
        "images": [["a.jpg", "empty"], ["b.jpg", "torn"]],
    }
    assert "2 bad images were replaced (3 times)" in capsys.readouterr().out


def test_ranks_other_than_0_write_nothing(tmp_path, capsys):
    log = Logger(tmp_path, start=0, total=50, active=False)
    log.print_line("hello")
    log.train(10, 1, 5, VALUES)
    log.eval(10, 1, {"student_top1": 1.0, "student_top5": 1.0, "teacher_top1": 1.0, "teacher_top5": 1.0})
    log.close()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


def test_a_terminal_shows_one_line_that_is_rewritten(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from util.run.log import Logger\n"
        "log = Logger(Path(sys.argv[2]), 0, 50, True)\n"
        f"for step in (10, 20): log.train(step, 1, 5, dict.fromkeys({KEYS}, 1.0))\n"
        "log.print_line('bye')\n"
    )
    main, side = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)],
        stdout=side,
        env={**os.environ, "COLUMNS": "200"},
    )
    os.close(side)
    shown = b""
    while True:
        try:
            chunk = os.read(main, 4096)
        except OSError:  # Linux raises it when the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    assert run.wait() == 0
    assert shown.count(b"\r\033[K") == 3 and shown.count(b"\n") == 1 and b"ETA" in shown
