"""Every rule of the doctor, on the log of a real run, on faulty and nearly faulty copies of that log, and on
real faulty runs.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
from conftest import ROOT

import models
from models import SimMatch
from models.simmatchv2 import SimMatchV2
from util import fields
from util.config import Config, read_yaml, to_yaml
from util.fields import METHODS
from util.inspect import detectors, doctor
from util.inspect.detectors import describe_start_in_teacher
from util.inspect.diagnostics import PSEUDO_LABEL_KEYS, event_keys
from util.inspect.rules import RULES, rules_of
from util.inspect.run_log import RunLog, read_run_log

SIMMATCH_RULES = rules_of("simmatch")
NOTE = METHODS["simmatch"].late_terms["loss_in"][2]  # what it says about the first use of the bank


def load(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def findings(folder, events, **settings):
    """The rules that find something in `events`, with the config in `folder` and these settings instead."""
    config = Config(**{**read_yaml(str(folder / "config.yaml")), **settings})
    return [f["rule"] for f in doctor.examine(RunLog.from_events(folder.name, config, events))]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """(folder, events) of a real run of 3 epochs of 20 steps: 15 train events, 6 diagnostics, 3 evaluations.

    Its speed is replaced by a constant, so that other jobs on the machine do not matter.
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
    """A change of a log: set these values in the last n events of a kind. A list has one value per event; a
    function computes the value from the event.
    """

    def change(events):
        for i, e in enumerate([e for e in events if e["event"] == kind][-n:]):
            for key, value in values.items():
                e[key] = value[i] if isinstance(value, list) else value(e) if callable(value) else value

    return change


def train(n, **values):
    return last(n, "train", **values)


def diagnostics(n, **values):
    return last(n, "diagnostics", **values)


def evaluation(n, **values):
    return last(n, "eval", **values)


def only(n, kind):
    """A change of a log: of this kind of event, keep the last n alone."""

    def change(events):
        kept = [e for e in events if e["event"] == kind][-n:]
        events[:] = [e for e in events if e["event"] != kind or e in kept]

    return change


def both(*changes):
    return lambda events: [change(events) for change in changes]


def stop(events):
    events.append({"event": "stop", "step": 60, "why": "loss_x is nan at step 60; training stops"})


LN_10 = math.log(10)
# rule: a change that it finds, and a change that it nearly finds. After warm-up there are 10 of the 15 train
# events, 4 of the 6 diagnostics events and 2 of the 3 evaluations.
FAULTS = {
    "not finite": (diagnostics(1, not_finite=[["loss_u"]]), diagnostics(1, not_finite=[[]])),
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
    "collapsed classes": (diagnostics(2, starved=1), diagnostics(1, starved=1)),
    "prior far from the labels": (diagnostics(2, prior_kl=0.6), diagnostics(2, prior_kl=0.55)),
    "lr off schedule": (train(1, lr=lambda e: e["lr"] * 1.001), train(1, lr=lambda e: e["lr"] * (1 + 1e-9))),
    "no gradient": (diagnostics(2, grad_in=0.0), diagnostics(1, grad_in=0.0)),
    "exploding gradient": (diagnostics(1, grad_in=2000.0), diagnostics(1, grad_in=99.0)),
    "accuracy at chance": (evaluation(2, student_top1=10.0), evaluation(2, student_top1=13.0)),
    "student and teacher apart": (
        evaluation(2, student_top1=50.0, teacher_top1=71.0),
        evaluation(2, student_top1=50.0, teacher_top1=[71.0, 69.0]),
    ),
    "start in the teacher": (  # 0.95 to the power of 42 steps is 0.12, of 45 steps 0.099
        diagnostics(6, steps_per_epoch=14),
        diagnostics(6, steps_per_epoch=15),
    ),
    "accuracy lost": (
        evaluation(3, student_top1=[80.0, 69.0, 69.0]),
        evaluation(3, student_top1=[80.0, 69.0, 71.0]),
    ),
    "slowed down": (train(5, images_per_s=240.0), train(5, images_per_s=260.0)),
    "q_w too certain": (
        both(diagnostics(3, q_entropy=0.02), train(3, pseudo_acc=0.8)),
        both(diagnostics(3, q_entropy=0.02), train(3, pseudo_acc=0.95)),
    ),
    "q_w flat": (diagnostics(3, q_entropy=0.9995 * LN_10), diagnostics(3, q_entropy=0.998 * LN_10)),
    "stale bank": (diagnostics(1, bank_age_max=3), diagnostics(1, bank_age_max=2)),
}
# Other changes that the same rules find, and settings with which they find nothing.
MORE_FAULTS = [  # rule, change, settings, whether the rule finds it
    ("not finite", stop, {}, True),
    ("not finite", diagnostics(1, not_finite=[["grad_u"]]), {}, True),
    ("not finite", diagnostics(1, not_finite=[["grad_u"]]), {"precision": "fp16"}, False),
    ("dead loss term", train(5, loss_in=0.0), {}, True),
    ("dead loss term", train(5, loss_in=0.0), {"lambda_in": 0.0}, False),
    ("dead loss term", train(5, loss_in=None), {}, False),
    (
        "dead loss term",
        both(train(5, loss_in=0.0), diagnostics(6, q_entropy=None)),
        {},
        False,
    ),  # the bank is not in use yet
    ("mask at 0", train(5, mask=0.0), {"warmup_epoch": 3, "epochs": 4}, False),
    ("mask at 0", train(5, mask=0.0), {"warmup_epoch": 3}, True),  # finished within the warm-up
    ("mask at 0", train(5, mask=0.004), {}, True),
    ("mask at 0", train(5, mask=0.006), {}, False),
    ("mask at 0", both(only(1, "train"), train(1, mask=0.0)), {}, True),
    ("mask at 0", both(only(1, "train"), train(1, mask=0.0)), {"epochs": 4}, False),
    ("dead loss term", both(only(1, "train"), train(1, loss_u=0.0)), {}, True),
    ("not learning", both(only(1, "train"), train(1, loss_x=0.96 * LN_10)), {}, True),
    ("mask falling", train(15, loss_in=[0.0] * 9 + [1.0] * 6, mask=[0.9] * 9 + [0.4] * 6), {}, False),
    ("mask falling", train(15, loss_in=1.0, mask=[0.9] * 9 + [0.4] * 6), {}, True),
    (
        "confirmation bias",
        train(
            15, loss_in=[0.0] * 9 + [1.0] * 6, pseudo_acc=[0.9] * 9 + [0.8] * 6, mask=[0.4] * 9 + [0.6] * 6
        ),
        {},
        False,
    ),
    ("mask at 1", both(train(15, mask=1.0, pseudo_acc=None), evaluation(1, teacher_top1=80.0)), {}, True),
    ("collapsed classes", diagnostics(2, marginal_kl=0.6), {}, True),
    ("collapsed classes", diagnostics(2, marginal_kl=0.6, pseudo_labels=199), {}, False),
    ("lr off schedule", train(0), {"lr": 0.2}, True),
    ("lr off schedule", train(0), {"cos": False, "schedule": [2]}, True),
    ("no gradient", diagnostics(2, grad_u=0.0), {"lambda_u": 0.0}, False),
    ("no gradient", diagnostics(2, grad_x=0.0), {"lambda_u": 0.0}, True),
    ("student and teacher apart", evaluation(2, student_top1=71.0, teacher_top1=50.0), {}, True),
    (
        "student and teacher apart",
        evaluation(2, student_top1=[71.0, 50.0], teacher_top1=[50.0, 71.0]),
        {},
        False,
    ),
    (
        "student and teacher apart",
        both(only(1, "eval"), evaluation(1, student_top1=78.0, teacher_top1=19.0)),
        {},
        True,
    ),
    (
        "student and teacher apart",
        both(only(1, "eval"), evaluation(1, student_top1=78.0, teacher_top1=19.0)),
        {"epochs": 4},
        False,
    ),
    ("start in the teacher", train(0), {"ema_m": 0.97}, True),
    ("start in the teacher", train(0), {"ema_m": 0.96}, False),
    ("start in the teacher", train(0), {"ema_m": 0.97, "epochs": 4}, False),
    ("stale bank", diagnostics(1, bank_age_max=3), {"labeled_sampler": "exact"}, False),
    ("stale bank", diagnostics(1, bank_age_max=4), {"labeled_sampler": "exact"}, True),
    ("stale bank", diagnostics(1, bank_unwritten=1), {}, True),
    ("stale bank", diagnostics(6, bank_unwritten=1, q_entropy=None), {}, False),
    ("stale bank", diagnostics(3, bank_drift=0.6), {}, True),
]


def test_every_rule_has_a_fault():
    assert list(FAULTS) == [rule.name for rule in SIMMATCH_RULES]


def test_no_rule_finds_anything_in_a_healthy_log(healthy):
    folder, events = healthy
    assert [sum(e["event"] == kind for e in events) for kind in ("train", "diagnostics", "eval")] == [
        15,
        6,
        3,
    ]
    assert findings(folder, events) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_finds_its_fault_but_not_a_near_miss(name, healthy):
    folder, events = healthy
    for change, expected in zip(FAULTS[name], (True, False)):
        changed = copy.deepcopy(events)
        change(changed)
        assert (name in findings(folder, changed)) is expected, (name, expected)


@pytest.mark.parametrize("name, change, settings, expected", MORE_FAULTS)
def test_a_rule_finds_its_other_faults(name, change, settings, expected, healthy):
    folder, events = healthy
    changed = copy.deepcopy(events)
    change(changed)
    assert (name in findings(folder, changed, **settings)) is expected


@pytest.mark.parametrize(
    "kept",
    [{"start"}, {"start", "train"}, {"start", "train", "eval"}, {"start", "diagnostics"}, {"start", "eval"}],
)
def test_no_rule_finds_anything_in_an_incomplete_log(kept, healthy):
    """As of a run that has just begun, or of an older version, which wrote no diagnostics."""
    folder, events = healthy
    for length in range(len(events) + 1):
        assert findings(folder, [e for e in events[:length] if e["event"] in kept]) == []


@pytest.mark.parametrize("ema_m", [0.98, 0.999, 0.9999, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 60, 200, 10**6])
def test_the_suggested_ema_m_leaves_a_hundredth_of_the_start(ema_m, steps):
    warning = describe_start_in_teacher(ema_m, steps)
    assert bool(warning) is (ema_m**steps > 0.1)
    if warning:
        assert f"with --ema-m {ema_m:g} the teacher still holds {100 * ema_m**steps:.3g} %" in warning
        better = float(re.search(r"; --ema-m (\S+) leaves", warning)[1])
        assert 0.00009 < better**steps < 0.010001 or (steps, better) == (1, 0)


def notes(folder, events):
    run = RunLog.from_events(folder.name, Config(**read_yaml(str(folder / "config.yaml"))), events)
    return doctor.notes_of(run)


def test_the_jump_of_loss_in_is_noted(healthy):
    folder, events = healthy
    (note,) = notes(folder, events)
    assert (note["note"], note["step"], note["description"]) == ("bank in use", 24, NOTE)
    before, first = [e for e in events if e["event"] == "train"][4:6]
    assert before["loss_in"] == 0 and first["loss_in"] > 5
    assert note["what"].startswith(
        f"loss_in rose from 0 to {first['loss_in']:.3g}, and loss from {before['loss']:.3g} to "
    )
    for values in ({"loss_in": None}, {"loss_in": 0.0}, {"loss_in": 1.0}):
        train(15, **values)(changed := copy.deepcopy(events))
        assert notes(folder, changed) == []


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "util.doctor", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_prints_its_findings(healthy, tmp_path):
    folder, events = healthy
    done = command(folder)
    (note,) = notes(folder, events)
    assert (done.returncode, done.stdout) == (
        0,
        f"nothing looks wrong (22 rules, {len(events)} events)\n"
        f"note: {note['note']}: {note['what']} (step {note['step']}); {NOTE}\n",
    ), done.stderr
    shutil.copytree(folder, tmp_path / "faulty")
    train(5, mask=0.0)(events := copy.deepcopy(events[:-3]))
    (tmp_path / "faulty" / "log.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in events) + '{"event": "tra'
    )
    done = command(tmp_path / "faulty")
    rule = RULES[[r.name for r in RULES].index("mask at 0")]
    assert done.returncode == 1 and done.stderr == ""
    assert (
        "mask at 0: mask is 0 in 5 train events (step 40 to 56)\n"
        f"  rule: {rule.description}\n  try: {rule.advice}\n" in done.stdout
    )
    assert "unfinished at step 56 of 60" in done.stdout
    done = command(tmp_path / "faulty", "--json")
    output = json.loads(done.stdout)
    assert done.returncode == 1 and (output["step"], output["total"], output["rules"]) == (56, 60, 22)
    assert {
        "rule": "mask at 0",
        "what": "mask is 0 in 5 train events",
        "first_step": 40,
        "last_step": 56,
        "description": rule.description,
        "advice": rule.advice,
    } in output["findings"]
    assert output["notes"] == [note]


def test_a_folder_that_is_no_run_is_a_user_error(healthy, mistake, tmp_path):
    folder, events = healthy
    mistake(doctor.main, [tmp_path], "not the output directory of a run", "log.jsonl")
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    mistake(doctor.main, [tmp_path], "config.yaml", "No such file")
    shutil.copy(folder / "config.yaml", tmp_path)
    for line, words in (
        ("{\n", "not JSON"),
        ('{"step": 1}\n', "unexpected event"),
        ('{"event": "train", "step": 61}\n', "unexpected event"),
        ("3\n", "unexpected event"),
    ):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + line)
        mistake(doctor.main, [tmp_path], "damaged", words)


def test_an_impossible_value_is_a_user_error(healthy, mistake, tmp_path):
    shutil.copytree(healthy[0], tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("cls: 10\n", "cls: 0\n"))
    mistake(doctor.main, [tmp_path / "run"], "config.yaml or log.jsonl", "impossible value")


def test_a_run_without_events_is_not_judged(mistake, tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    monkeypatch.setattr("sys.argv", ["doctor", str(tmp_path)])
    with pytest.raises(SystemExit) as stop_:
        doctor.main()
    out = capsys.readouterr().out
    assert (
        stop_.value.code == 0
        and "nothing to judge: the log has no train event yet" in out
        and "unfinished at step 0" in out
    )


def test_the_docs_have_every_rule_and_key():
    text = (ROOT / "docs" / "DOCTOR.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+) \| (.+) \|$", text.partition("## The rules")[2], re.M)
    both = SIMMATCH_RULES + rules_of("simmatchv2")[len(RULES) :]
    rules = [(rule.name, rule.description, rule.advice) for rule in both]
    assert [row for row in rows if row[0] != "rule"] == rules
    assert f"bank in use: {NOTE}" in " ".join(text.split())
    keys = text.partition("## The event")[2].partition("## The rules")[0]
    keys, _, keys_v2 = keys.partition("| key of SimMatchV2")
    own = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.+?) \|", keys_v2, re.M)))
    assert own == [name for name in SimMatchV2.diagnostic_names if name != "prior_kl"]
    assert re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.+?) \|", keys, re.M))) == event_keys(
        SimMatch.loss_names, SimMatch.diagnostic_names
    )


def test_the_shared_rules_name_no_value_of_a_method():
    own = {*SimMatch.diagnostic_names, *METHODS["simmatch"].late_terms} - {"prior_kl"}
    for file in (ROOT / "util" / "inspect").glob("*.py"):
        assert not own & {*re.findall(r"\w+", file.read_text())}, file


@pytest.mark.parametrize("method", METHODS)
def test_the_rules_of_a_method_name_values_of_its_log(method):
    module, _, kind = models.METHODS[method].partition(":")
    own = set(getattr(import_module(module), kind).diagnostic_names)
    known = own | {*PSEUDO_LABEL_KEYS, "value", "accuracy", "C", "n", "s", "ln", "exact"}
    for _, _, _, *checks in METHODS[method].rules:
        for _, key, bad, what in checks:
            names = {*compile(bad, "", "eval").co_names, *compile(f"f{what!r}", "", "eval").co_names}
            assert key in own and names <= known, (key, names - known)
    assert {diagnostic for _, diagnostic, _ in METHODS[method].late_terms.values()} <= own


def test_a_method_declares_rules_and_late_terms(healthy, monkeypatch, tmp_path):
    folder, events = healthy
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "toy.py").write_text(
        "import no_such_module\n"
        "RULES = (('small norm', 'toy_norm is below 0.1', 'a larger norm', (2, 'toy_norm', 'value < 1 / C', "
        "'toy_norm is {value:.2f} in {n} diagnostics'), (0, 'toy_norm', 'value > 9', 'large')),)\n"
        "LATE_TERMS = {'loss_toy': ('toy in use', 'toy_norm', 'this is expected')}\n"
    )
    (tmp_path / "models" / "toy2.py").write_text("RULES = 'toy'\n")
    (tmp_path / "models" / "__init__.py").write_text(
        "METHODS = {'toy': 'models.toy:T', 'toy2': 'models.toy2:T'}"
    )
    with monkeypatch.context() as patch:
        patch.setattr(fields, "ROOT", tmp_path)
        declared = fields._read("models/__init__.py", "METHODS")
    config = read_yaml(str(folder / "config.yaml"))
    for method in ("toy", "toy2"):
        monkeypatch.setitem(METHODS, method, declared[method])
        for norms, dead, expected in (
            ([0.5, 0.5, 0.09, 0.08], False, ["small norm"]),
            ([0.5, 0.5, 0.5, 0.08], False, []),
            ([9.5, 0.5, 0.5, 0.08], False, ["small norm"]),
            ([None, None, None, 0.5], True, []),  # not in use yet
            ([0.5, 0.5, 0.5, 0.5], True, ["dead loss term"]),
        ):
            changed = copy.deepcopy(events)
            both(diagnostics(4, toy_norm=norms), train(15, loss_toy=[0.0] * 5 + [0.0 if dead else 1.0] * 10))(
                changed
            )
            run = RunLog.from_events("run", Config(**{**config, "method": method}), changed)
            found = doctor.examine(run)
            assert [f["rule"] for f in found] == expected
            assert [note["note"] for note in doctor.notes_of(run)] == ["toy in use"] * (not dead)
            if norms[2] == 0.09:
                assert found[0]["what"] == "toy_norm is 0.08 in 2 diagnostics"
                assert (found[0]["description"], found[0]["advice"]) == (
                    "toy_norm is below 0.1",
                    "a larger norm",
                )
        assert findings(folder, changed, method="supervised") == ["dead loss term"]


def test_a_check_without_its_values_finds_nothing(healthy):
    folder, events = healthy
    config = Config(**read_yaml(str(folder / "config.yaml")))
    run = RunLog.from_events("run", config, events)

    def find(bad, what, last=2, keys="mask", where=""):
        return detectors.Check("diagnostics", last, keys, bad, what, where)(run)

    steps = [e["step"] for e in run.diagnostic_events]
    assert find("value >= 0", "{key} {n}{s} {C}") == ("mask 4s 10", steps[2], steps[-1])
    assert find("value >= 0", "{key} {n}{s}", last=0) == ("mask 1", steps[0], steps[0])
    assert find("value >= 0", "{key}", where="ln(grad_x) > 99") is None
    assert find("value >= 0 and absent >= 0", "found") is None
    assert find("value >= 0", "found {absent}") is None
    assert find("value >= 0", "found", keys="toy_*") is None


SICK_RUNS = [
    (["--threshold", "1.0", "--epochs", "4"], 0, {"mask at 0", "dead loss term", "no gradient"}),
    (["--lr", "50", "--epochs", "3"], 2, {"not finite", "exploding loss"}),
    (["--tt", "0.0001", "--epochs", "8"], 0, {"q_w too certain"}),
    (["--lr", "0.000001", "--epochs", "4"], 0, {"not learning", "accuracy at chance"}),
    (
        ["--ema-m", "0.9999", "--warmup-epoch", "5", "--epochs", "6", "--print-freq", "50"],
        0,
        {"mask at 0", "student and teacher apart", "start in the teacher"},
    ),
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
    (finding,) = [f for f in doctor.examine(read_run_log(tmp_path)) if f["rule"] == "collapsed classes"]
    assert "1 of 10 classes are starved: least 3" in finding["what"]
