"""Every rule of the doctor: on the log of a real run, on copies of it that are made sick or nearly so, and on
real sick runs.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from util import doctor
from util.config import Config, read_yaml, to_yaml
from util.diagnostics import KEYS
from util.rules import RULES


def load(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def findings(folder, events, **settings):
    """Names of the rules that find something in `events`, with the config of the run at `folder`, changed."""
    config = Config(**{**read_yaml(str(folder / "config.yaml")), **settings})
    trains, evals, diagnostic_events, stops = (
        [e for e in events if e["event"] == kind] for kind in ("train", "eval", "diagnostics", "stop")
    )
    return [
        f["rule"]
        for f in doctor.examine(
            doctor.Run(
                config,
                trains,
                evals,
                diagnostic_events,
                stops,
                doctor.steps_per_epoch(trains, evals, diagnostic_events),
            )
        )
    ]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """(folder, events) of a real run of 3 epochs of 20 steps: 15 train events, 6 diagnostics, 3 evaluations.

    Its speed is set to one number: other jobs on the machine are not what is tested.
    """
    folder = tmp_path_factory.mktemp("healthy") / "run"
    done = subprocess.run(
        [
            sys.executable,
            "train_semi.py",
            "--config",
            "configs/digits.yaml",
            "--epochs",
            "3",
            "--eval-freq",
            "1",
            "--print-freq",
            "4",
            "--diagnose-freq",
            "10",
            "--output-dir",
            str(folder),
        ],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    events = [{**e, "images_per_s": 1000.0} if e["event"] == "train" else e for e in load(folder)]
    (folder / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder, events


def last(n, kind, **values):
    """Sets these values in the last n events of a kind. A list gives each of them its own; a function makes
    it from the event.
    """

    def sick(events):
        for i, e in enumerate([e for e in events if e["event"] == kind][-n:]):
            for key, value in values.items():
                e[key] = value[i] if isinstance(value, list) else value(e) if callable(value) else value

    return sick


def train(n, **values):
    return last(n, "train", **values)


def look(n, **values):
    return last(n, "diagnostics", **values)


def score(n, **values):
    return last(n, "eval", **values)


def both(*sick):
    return lambda events: [each(events) for each in sick]


def stop(events):
    events.append({"event": "stop", "step": 60, "why": "loss_x is nan at step 59; training stops"})


LN_10 = math.log(10)
# rule: a log that shows it, and one that nearly does. Of 15 train events the last 10 are settled, of 6
# diagnostics 4, of 3 evaluations 2.
SICK = {
    "not finite": (look(1, not_finite=[["loss_u"]]), look(1, not_finite=[[]])),
    "exploding loss": (train(1, loss_x=3.01 * LN_10), train(9, loss_x=2.99 * LN_10)),
    "not learning": (train(5, loss_x=0.96 * LN_10), train(4, loss_x=0.96 * LN_10)),
    "dead loss term": (train(5, loss_u=0.0), train(5, loss_u=lambda e: 2e-6 * e["loss"])),
    "mask at 0": (train(5, mask=0.0), train(4, mask=0.0)),
    "mask at 1": (
        both(train(5, mask=1.0), train(3, pseudo_acc=0.89)),
        both(train(5, mask=1.0), train(3, pseudo_acc=0.91)),
    ),
    "mask falling": (
        train(6, mask=[0.9, 0.9, 0.9, 0.44, 0.44, 0.44]),
        train(6, mask=[0.9, 0.9, 0.9, 0.46, 0.46, 0.46]),
    ),
    "pseudo-labels at chance": (train(5, pseudo_acc=0.11), train(5, pseudo_acc=0.13)),
    "confirmation bias": (
        train(6, pseudo_acc=[0.9] * 3 + [0.84] * 3, mask=[0.5] * 3 + [0.6] * 3),
        train(6, pseudo_acc=[0.9] * 3 + [0.84] * 3, mask=[0.5] * 6),
    ),
    "collapsed classes": (look(2, starved=1), look(1, starved=1)),
    "prior far from the labels": (look(2, prior_kl=0.6), look(2, prior_kl=0.55)),
    "q_w too certain": (
        both(look(3, q_entropy=0.02), train(3, pseudo_acc=0.8)),
        both(look(3, q_entropy=0.02), train(3, pseudo_acc=0.95)),
    ),
    "q_w flat": (look(3, q_entropy=0.9995 * LN_10), look(3, q_entropy=0.998 * LN_10)),
    "lr off schedule": (train(1, lr=lambda e: e["lr"] * 1.001), train(1, lr=lambda e: e["lr"] * (1 + 1e-9))),
    "no gradient": (look(2, grad_in=0.0), look(1, grad_in=0.0)),
    "exploding gradient": (look(1, grad_in=2000.0), look(1, grad_in=99.0)),
    "accuracy at chance": (score(2, student_top1=10.0), score(2, student_top1=13.0)),
    "student and teacher apart": (
        score(2, student_top1=50.0, teacher_top1=71.0),
        score(2, student_top1=50.0, teacher_top1=[71.0, 69.0]),
    ),
    "accuracy lost": (score(3, student_top1=[80.0, 69.0, 69.0]), score(3, student_top1=[80.0, 69.0, 71.0])),
    "stale bank": (look(1, bank_age_max=3), look(1, bank_age_max=2)),
    "slowed down": (train(5, images_per_s=240.0), train(5, images_per_s=260.0)),
}
# Second roads to the same rules, and settings that take a rule's ground away.
MORE = [
    ("not finite", stop, {}, True),
    ("not finite", look(1, not_finite=[["grad_u"]]), {}, True),
    ("not finite", look(1, not_finite=[["grad_u"]]), {"precision": "fp16"}, False),
    ("dead loss term", train(5, loss_in=0.0), {}, True),
    ("dead loss term", train(5, loss_in=0.0), {"lambda_in": 0.0}, False),
    ("dead loss term", train(5, loss_in=None), {}, False),
    (
        "dead loss term",
        both(train(5, loss_in=0.0), look(6, q_entropy=None)),
        {},
        False,
    ),  # the bank is not in use yet
    ("mask at 0", train(5, mask=0.0), {"warmup_epoch": 3}, False),
    ("mask at 1", both(train(15, mask=1.0, pseudo_acc=None), score(1, teacher_top1=80.0)), {}, True),
    ("collapsed classes", look(2, marginal_kl=0.6), {}, True),
    ("collapsed classes", look(2, marginal_kl=0.6, pseudo_labels=199), {}, False),
    ("lr off schedule", train(0), {"lr": 0.2}, True),
    ("lr off schedule", train(0), {"cos": False, "schedule": [2]}, True),
    ("no gradient", look(2, grad_u=0.0), {"lambda_u": 0.0}, False),
    ("no gradient", look(2, grad_x=0.0), {"lambda_u": 0.0}, True),
    ("student and teacher apart", score(2, student_top1=71.0, teacher_top1=50.0), {}, True),
    ("student and teacher apart", score(2, student_top1=[71.0, 50.0], teacher_top1=[50.0, 71.0]), {}, False),
    ("stale bank", look(1, bank_unwritten=1), {}, True),
    ("stale bank", look(6, bank_unwritten=1, q_entropy=None), {}, False),
    ("stale bank", look(3, bank_drift=0.6), {}, True),
]


def test_every_rule_is_tried():
    assert list(SICK) == [rule.name for rule in RULES]


def test_a_healthy_log(healthy):
    folder, events = healthy
    assert [sum(e["event"] == kind for e in events) for kind in ("train", "diagnostics", "eval")] == [
        15,
        6,
        3,
    ]
    assert findings(folder, events) == []


@pytest.mark.parametrize("name", SICK)
def test_a_rule_finds_its_fault_and_no_near_miss(name, healthy):
    folder, events = healthy
    for sick, expected in zip(SICK[name], (True, False)):
        changed = copy.deepcopy(events)
        sick(changed)
        assert (name in findings(folder, changed)) is expected, (name, expected)


@pytest.mark.parametrize("name, sick, settings, expected", MORE)
def test_other_roads(name, sick, settings, expected, healthy):
    folder, events = healthy
    changed = copy.deepcopy(events)
    sick(changed)
    assert (name in findings(folder, changed, **settings)) is expected


@pytest.mark.parametrize(
    "kept",
    [{"start"}, {"start", "train"}, {"start", "train", "eval"}, {"start", "diagnostics"}, {"start", "eval"}],
)
def test_a_log_with_little_in_it(kept, healthy):
    """As of a run that has just begun, or of one from before there were diagnostics."""
    folder, events = healthy
    for length in range(len(events) + 1):
        assert findings(folder, [e for e in events[:length] if e["event"] in kept]) == []


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "util.doctor", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command(healthy, tmp_path):
    folder, events = healthy
    done = command(folder)
    assert (done.returncode, done.stdout) == (
        0,
        f"nothing looks wrong ({len(RULES)} rules, {len(events)} events)\n",
    ), done.stderr
    shutil.copytree(folder, tmp_path / "sick")
    train(5, mask=0.0)(events := copy.deepcopy(events[:-3]))
    (tmp_path / "sick" / "log.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in events) + '{"event": "tra'
    )
    done = command(tmp_path / "sick")
    rule = RULES[[r.name for r in RULES].index("mask at 0")]
    assert done.returncode == 1 and done.stderr == ""
    assert (
        f"mask at 0: mask is 0 in 5 train events (step 40 to 56)\n  rule: {rule.description}\n  try: {rule.advice}\n"
        in done.stdout
    )
    assert "unfinished at step 56 of 60" in done.stdout
    done = command(tmp_path / "sick", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 1 and (told["step"], told["total"], told["rules"]) == (56, 60, len(RULES))
    assert {
        "rule": "mask at 0",
        "what": "mask is 0 in 5 train events",
        "first_step": 40,
        "last_step": 56,
        "description": rule.description,
        "advice": rule.advice,
    } in told["findings"]


def test_mistakes(healthy, mistake, tmp_path):
    folder, events = healthy
    mistake(doctor.main, [tmp_path], "not the output directory of a run", "log.jsonl")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    mistake(doctor.main, [tmp_path], "config.yaml", "No such file")
    shutil.copy(folder / "config.yaml", tmp_path)
    for line, words in (
        ("{\n", "not JSON"),
        ('{"step": 1}\n', "not one of ours"),
        ('{"event": "train", "step": 61}\n', "not one of ours"),
        ("3\n", "not one of ours"),
    ):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + line)
        mistake(doctor.main, [tmp_path], "damaged", words)


def test_a_run_that_has_not_written_an_event(mistake, tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    monkeypatch.setattr("sys.argv", ["doctor", str(tmp_path)])
    with pytest.raises(SystemExit) as stop_:
        doctor.main()
    said = capsys.readouterr().out
    assert (
        stop_.value.code == 0
        and "nothing to judge: no step is in the log yet" in said
        and "unfinished at step 0" in said
    )


def test_the_docs_have_every_rule_and_key():
    text = (ROOT / "docs" / "DOCTOR.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+) \| (.+) \|$", text.partition("## The rules")[2], re.M)[1:]
    assert rows == [(rule.name, rule.description, rule.advice) for rule in RULES]
    keys = text.partition("## The event")[2].partition("## The rules")[0]
    assert re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.+?) \|", keys, re.M))) == list(KEYS)


SICK_RUNS = [
    (["--threshold", "1.0", "--epochs", "4"], 0, {"mask at 0", "dead loss term", "no gradient"}),
    (["--lr", "50", "--epochs", "3"], 2, {"not finite", "exploding loss"}),
    (["--tt", "0.0001", "--epochs", "8"], 0, {"q_w too certain"}),
    (["--lr", "0.000001", "--epochs", "4"], 0, {"not learning", "accuracy at chance"}),
]


@pytest.mark.slow(4)
@pytest.mark.parametrize("flags, code, expected", SICK_RUNS)
def test_real_sick_runs(flags, code, expected, train, tmp_path):
    done = train(tmp_path, "--print-freq", "5", *flags)
    assert done.returncode == code, done.stderr
    assert expected <= set(findings(tmp_path, load(tmp_path)))


@pytest.mark.slow(13)
@pytest.mark.parametrize("method", ["simmatch", "simmatch_single", "supervised"])
def test_real_healthy_runs(method, train, tmp_path):
    assert train(tmp_path, "--method", method, "--epochs", "20", "--print-freq", "10").returncode == 0
    events = [{**e, "images_per_s": 1000.0} if e["event"] == "train" else e for e in load(tmp_path)]
    assert findings(tmp_path, events) == []


@pytest.mark.slow(12)
def test_a_real_run_that_loses_a_class(train, tmp_path):
    """FixMatch on one label a class, without alignment: hardly any image is labeled a 3."""
    assert train(tmp_path, "--method", "fixmatch", "--epochs", "20").returncode == 0
    run, _ = doctor.read(tmp_path)
    (finding,) = [f for f in doctor.examine(run) if f["rule"] == "collapsed classes"]
    assert "1 of 10 classes are starved: least 3" in finding["what"]
