"""benchmark/parity.py detects wrong steps. The example in docs/PARITY.md runs and computes the numbers of the
reference.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark import parity, parity_steps
from models import SimMatch
from models.ema import Teacher
from models.memory import DistributionAlignment
from tests.reference import SimMatchReference
from util.formats import published_checkpoints, published_layouts

ROOT = Path(__file__).resolve().parent.parent
EXACT, FAST = parity.Mode("float64", precision="fp64"), parity.Mode("float32")


@pytest.fixture(scope="module")
def steps():
    """Steps of the reference, in the first epoch and after it."""
    return {
        eman: parity_steps.trajectory(parity_steps.settings("small_encoder", eman=eman), 1, 2)
        for eman in (False, True)
    }


def rows(mode, steps, eman=False, **changes):
    config = parity_steps.settings("small_encoder", eman=eman, **changes)
    return parity.worst(list(parity.replay(mode, config, steps[eman])))


@pytest.mark.parametrize("eman", [False, True])
@pytest.mark.parametrize("mode", [EXACT, FAST], ids=lambda mode: mode.name)
def test_the_step_holds_the_bounds(mode, eman, steps):
    row = rows(mode, steps, eman)
    assert parity.holds(mode, row), row
    assert row["argmax"] == 1 and row["flips"] == 0
    masks = torch.cat([step.mask for step in steps[eman]])
    assert 0 < masks.sum() < len(masks) and all(value > 0 for value in steps[eman][1].terms.values())


@pytest.mark.parametrize(
    "changes, column",
    [
        (dict(ema_m=0.99), "teacher"),
        (dict(no_decay_bn=True), "momentum"),
        (dict(nesterov=False), "student"),
        (dict(lambda_in=1.0), "loss_in"),
        (dict(c_smooth=1.0), "pseudo"),
        (dict(DA=False), "pseudo"),
        (dict(tt=0.2), "loss_in"),
        (dict(threshold=0.9), "momentum"),
        (dict(bank_m=0.7), "bank"),
    ],
    ids=str,
)
def test_another_setting_is_caught(changes, column, steps):
    if changes.get("DA") is False:
        steps = {False: [step._replace(before=without_ring(step.before)) for step in steps[False]]}
    row = rows(EXACT, steps, **changes)
    assert not parity.holds(EXACT, row) and not row[column] <= EXACT.bound(column), row


def without_ring(state):
    return {key: value for key, value in state.items() if not key.startswith("align.")}


def sum_for_mean(patch):
    right = SimMatch.losses

    def losses(self, batch, *args, **how):
        output = right(self, batch, *args, **how)
        output.losses["loss_u"] = output.losses["loss_u"] * len(batch.u_weak)
        return output

    patch.setattr(SimMatch, "losses", losses)


def bank_before_the_losses(patch):
    right = SimMatch.targets

    def targets(self, batches, *args, **how):
        out = right(self, batches, *args, **how)
        self.bank.write(batches[0].index, out[0].z_x, batches[0].y)
        return out

    patch.setattr(SimMatch, "targets", targets)


def prior_without_this_step(patch):
    patch.setattr(
        DistributionAlignment,
        "forward",
        lambda self, log_p, mean: torch.log_softmax(
            log_p - self.ring.mean(dim=0).clamp_min(1e-30).log(), dim=1
        ),
    )


def teacher_before_the_optimizer(patch):
    """The teacher averages the student of before the step instead of after it."""
    right, update = SimMatch.targets, Teacher.update

    def targets(self, *args, **how):
        out = right(self, *args, **how)
        update(self.teacher, self.student)
        return out

    patch.setattr(SimMatch, "targets", targets)
    patch.setattr(Teacher, "update", lambda self, student: None)


def teacher_in_the_other_mode(patch):
    patch.setattr(Teacher, "train", lambda self, mode=True: torch.nn.Module.train(self, False))


@pytest.mark.parametrize(
    "mistake, column",
    [
        (sum_for_mean, "loss_u"),
        (bank_before_the_losses, "loss_in"),
        (prior_without_this_step, "pseudo"),
        (teacher_before_the_optimizer, "teacher"),
        (teacher_in_the_other_mode, "pseudo"),
    ],
)
def test_a_wrong_step_is_caught(mistake, column, steps, monkeypatch):
    mistake(monkeypatch)
    row = rows(EXACT, steps)
    assert not row[column] <= EXACT.bound(column) and not parity.holds(EXACT, row), row


@pytest.mark.parametrize("mistake", [sum_for_mean, bank_before_the_losses])
def test_float32_too_catches_wrong_losses(mistake, steps, monkeypatch):
    mistake(monkeypatch)
    assert not parity.holds(FAST, rows(FAST, steps))


def test_a_head_with_a_gradient_of_zero_in_the_first_epoch_is_caught(steps, monkeypatch):
    """Weight decay would then apply to the head; in the published program it does not."""
    right = SimMatch.losses

    def losses(self, *args, **how):
        output = right(self, *args, **how)
        output.losses["loss_in"] += 0 * sum(p.sum() for p in self.student.head.parameters())
        return output

    monkeypatch.setattr(SimMatch, "losses", losses)
    assert rows(EXACT, steps)["momentum"] == float("inf")


@pytest.mark.slow(20)
@pytest.mark.skipif(
    parity.missing(parity.Mode("compiled", compiled=True)) is not None, reason="no C++ compiler"
)
def test_a_compiled_step_holds_the_bounds(steps):
    mode = parity.Mode("compiled", compiled=True)
    row = rows(mode, steps)
    assert parity.holds(mode, row), row


# The example of docs/PARITY.md


def examples():
    """The program, the lines that go before its last line, and the program that writes a published state."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PARITY.md").read_text(encoding="utf-8"), re.S)


def example():
    program, more, _ = examples()
    end = "dist_utils.dist_end()\n"
    assert program.endswith(end)
    return program.removesuffix(end) + more + end


@pytest.mark.slow(5)
@pytest.mark.parametrize("eman", [False, True])
def test_the_example_gives_the_references_numbers(eman):
    """Two ranks in one process. The text is changed in the kind of teacher, in the threshold, so that some
    images pass it, and to float64.
    """
    text, space = example(), {}
    for old, new in (
        ("eman=False", f"eman={eman}, threshold=0.15"),
        ("side, side)", "side, side, dtype=torch.float64)"),
        ("# 2. The tensors", "method.double()\n# 2. The tensors"),
        ("# 4. The results.\n", "after = copy.deepcopy(method.state_dict())\n# 4. The results.\n"),
    ):
        assert old in text
        text = text.replace(old, new)
    exec(compile(text, "docs/PARITY.md", "exec"), space)
    config, before, batches = space["config"], space["before"], space["batches"]
    slow = reference_from(before, space["build_method"](config, 3, before["bank.labels"]).double(), config)
    terms, pseudo, _ = slow.step(batches, space["step"], first_epoch=space["epoch"] == 0)
    for name, value in terms.items():
        assert value > 0 and space["losses"][name].item() == pytest.approx(value, rel=1e-9)
    assert space["L_u"] == pytest.approx(terms["loss_u"] / config.lambda_u, rel=1e-9)
    check_more_of_the_step(space, slow, reference_from(before, space["method"], config))
    expected = {
        key: value for key, value in parity_steps.state_of(slow).items() if not key.startswith("momentum.")
    }
    got = space["after"]
    assert set(got) == set(expected)
    assert (
        parity.relative(space["output"].pseudo_label, torch.tensor(pseudo, dtype=torch.float64).flatten(0, 1))
        <= 1e-9
    )
    for key, value in expected.items():
        assert parity.relative(got[key], value) <= 1e-9, key


def check_more_of_the_step(space, after, before):
    """after, before: references in these states."""

    def equal(got, expected):
        assert parity.relative(got, expected) <= 1e-9

    for network, logits, z in (
        (after.student, "logits", "z"),
        (after.teacher, "teacher_logits", "teacher_z"),
    ):
        network.eval()
        for name, expected in zip((logits, z), network(space["images"])):
            equal(space[name], expected.detach())
    for name, mean in space["losses"].items():
        own = [terms[name].item() for terms in space["own_terms"]]
        assert len(set(own)) == 2 and sum(own) / 2 == pytest.approx(mean.item(), rel=1e-9)
    names = ("logits_x", "logits_us", "z_us", "z_x", "logits_uw", "z_uw")
    before.student.train()
    for name, ranks in zip(names, before._forwards(space["batches"], space["step"]), strict=True):
        outputs = space["in_teacher" if name in ("z_x", "logits_uw", "z_uw") else "in_student"]
        for output, expected in zip(outputs, ranks, strict=True):
            equal(getattr(output, name), expected.detach())
    for key, value in space["before"].items():
        assert torch.equal(
            space["method"].state_dict()[key], value.to(space["method"].state_dict()[key].dtype)
        )


def reference_from(state, method, config):
    """The reference, with the state_dict of a SimMatch method as its state."""
    method.load_state_dict(state)
    slow = SimMatchReference(
        method.student,
        method.bank.z,
        method.bank.labels,
        config.cls,
        lambda_u=config.lambda_u,
        lambda_in=config.lambda_in,
        threshold=config.threshold,
        st=config.st,
        tt=config.tt,
        c_smooth=config.c_smooth,
        DA=config.DA,
        da_len=config.da_len,
        bank_m=config.bank_m,
        ema_m=config.ema_m,
        lr=config.lr,
        momentum=config.momentum,
        wd=config.wd,
        nesterov=config.nesterov,
        bn_mode="average" if config.eman else "shuffle",
    )
    slow.teacher.load_state_dict(method.teacher.net.state_dict())
    slow.ring, slow.ptr = method.align.ring.tolist(), int(method.align.ptr)
    return slow


def test_the_example_writes_a_state_in_the_published_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(examples()[2], "docs/PARITY.md", "exec"), space)
    saved = torch.load("random.pth", weights_only=True)
    assert published_layouts.detect_kind(saved) == "simmatch" and saved["epoch"] == 0
    assert all(key.startswith("module.") for key in saved["state_dict"])
    assert saved["state_dict"]["module.bank"].shape == (16, 40)
    method, optimizer, epoch, step = published_checkpoints.to_training_state(saved, steps_per_epoch=7)
    expected = space["method"].state_dict()
    assert set(method) == set(expected) and (epoch, step, optimizer["state"]) == (0, 0, {})
    assert all(torch.equal(method[key], value) for key, value in expected.items())


@pytest.mark.slow(10)
def test_the_example_with_a_process_for_each_rank_prints_the_same(tmp_path):
    (tmp_path / "check.py").write_text(example(), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = []
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        done = subprocess.run(
            [sys.executable, *start, "check.py"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        out.append([float(number) for number in re.findall(r"-?\d+\.\d+", done.stdout)])
    assert out[0] and out[0] == pytest.approx(out[1], rel=1e-4)
