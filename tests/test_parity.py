"""benchmark/parity.py detects wrong steps. The example in docs/PARITY.md runs and computes the numbers of the
reference.
"""

import copy
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmark import parity, parity_steps
from models import SimMatch, build_method
from models.ema import Teacher
from models.memory import DistributionAlignment, EMAPrior, Queue
from models.simmatchv2 import SimMatchV2
from util.formats import published_checkpoints, published_layouts

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"simmatch": SimMatch, "simmatchv2": SimMatchV2}
EXACT, FAST = parity.Mode("float64", precision="fp64"), parity.Mode("float32")


@functools.cache
def reference_steps(method, eman=False):
    """Two steps of the reference; the first is in the first epoch, and SimMatchV2's queue is empty there."""
    return parity_steps.trajectory(parity_steps.settings("small_encoder", method, eman=eman), 1, 2)


def rows(mode, method, eman=False, without=(), **changes):
    """The differences of the production steps, from a state that lacks the modules `without`."""
    config = parity_steps.settings("small_encoder", method, eman=eman, **changes)
    steps = [
        step._replace(before={key: v for key, v in step.before.items() if key.split(".")[0] not in without})
        for step in reference_steps(method, eman)
    ]
    return parity.worst(list(parity.replay(mode, config, steps)))


@pytest.mark.parametrize("eman", [False, True])
@pytest.mark.parametrize("mode", [EXACT, FAST], ids=lambda mode: mode.name)
@pytest.mark.parametrize("method", METHODS)
def test_the_step_holds_the_bounds(method, mode, eman):
    steps, row = reference_steps(method, eman), rows(mode, method, eman)
    assert parity.holds(mode, row), row
    assert row["argmax"] == 1 and row["flips"] == 0
    masks = torch.cat([step.mask for step in steps])
    assert 0 < masks.sum() < len(masks)
    assert steps[1].terms.keys() == set(METHODS[method].loss_names)
    assert all(value > 0 for value in steps[1].terms.values())


@pytest.mark.parametrize(
    "method, changes, column",
    [
        ("simmatch", dict(ema_m=0.99), "teacher"),
        ("simmatch", dict(no_decay_bn=True), "momentum"),
        ("simmatch", dict(nesterov=False), "student"),
        ("simmatch", dict(lambda_in=1.0), "loss_in"),
        ("simmatch", dict(c_smooth=1.0), "pseudo"),
        ("simmatch", dict(DA=False, without=("align",)), "pseudo"),
        ("simmatch", dict(tt=0.2), "loss_in"),
        ("simmatch", dict(threshold=0.9), "momentum"),
        ("simmatch", dict(bank_m=0.7), "bank"),
        ("simmatchv2", dict(ema_m=0.99), "teacher"),
        ("simmatchv2", dict(lambda_nn=1.0), "loss_nn"),
        ("simmatchv2", dict(lambda_ee=1.0), "loss_ee"),
        ("simmatchv2", dict(lambda_ne=1.0), "loss_ne"),
        ("simmatchv2", dict(t=0.11), "loss_ee"),
        ("simmatchv2", dict(alpha=0.101), "pseudo"),
        ("simmatchv2", dict(topn=15), "pseudo"),
        ("simmatchv2", dict(da_m=0.99), "prior"),
        ("simmatchv2", dict(DA=False, without=("prior",)), "pseudo"),
        ("simmatchv2", dict(threshold=0.9), "momentum"),
        ("simmatchv2", dict(bn_from_first_view=True), "student"),
    ],
    ids=str,
)
def test_another_setting_is_caught(method, changes, column):
    row = rows(EXACT, method, **changes)
    assert not parity.holds(EXACT, row) and not row[column] <= EXACT.bound(column), row


def change_output(patch, kind, change):
    """change(method, batch, output) after the losses."""
    right = kind.losses

    def losses(self, batch, *args, **how):
        output = right(self, batch, *args, **how)
        change(self, batch, output)
        return output

    patch.setattr(kind, "losses", losses)


def change_targets(patch, kind, change):
    """change(method, batches, targets) after the targets."""
    right = kind.targets

    def targets(self, batches, *args, **how):
        out = right(self, batches, *args, **how)
        change(self, batches, out)
        return out

    patch.setattr(kind, "targets", targets)


def sum_for_mean(patch, kind):
    name = "loss_u" if kind is SimMatch else "loss_nn"

    def change(method, batch, output):
        output.losses[name] = output.losses[name] * len(batch.u_weak)

    change_output(patch, kind, change)


def bank_before_the_losses(patch, kind):
    def change(method, batches, targets):
        method.bank.write(batches[0].index, targets[0].z_x, batches[0].y)

    change_targets(patch, kind, change)


def queue_before_the_losses(patch, kind):
    change_targets(patch, kind, lambda method, batches, targets: method.queue.write(*targets[0][1:3]))


def queue_in_the_opposite_order(patch, kind):
    right = Queue.write
    patch.setattr(Queue, "write", lambda self, z, p: right(self, z.flip(0), p.flip(0)))


def pseudo_labels_in_the_queue(patch, kind):
    change_output(patch, kind, lambda method, batch, output: output.for_update.update(p=output.pseudo_label))


def a_term_of_zero_in_the_first_step(patch, kind):
    def change(method, batch, output):
        output.losses.setdefault("loss_ne", 0 * output.losses["loss_x"])

    change_output(patch, kind, change)


def first_view_alone(patch, kind):
    right = kind.losses

    def losses(self, batch, *args, **how):
        return right(self, batch._replace(u_strong=batch.u_strong[:1]), *args, **how)

    patch.setattr(kind, "losses", losses)


def aligned_mean_in_the_prior(patch, kind):
    def change(method, batch, output):
        output.for_update["mean_p"] = output.for_update["p"].mean(dim=0, keepdim=True)

    change_output(patch, kind, change)


def prior_without_this_step(patch, kind):
    def forward(self, log_p, mean):
        return torch.log_softmax(log_p - self.ring.mean(dim=0).clamp_min(1e-30).log(), dim=1)

    patch.setattr(DistributionAlignment, "forward", forward)


def prior_with_this_step(patch, kind):
    def forward(self, log_p):
        return torch.log_softmax(log_p - self.da.lerp(log_p.exp().mean(dim=0), 1 - self.m).log(), dim=1)

    patch.setattr(EMAPrior, "forward", forward)


def teacher_before_the_optimizer(patch, kind):
    """The teacher averages the student of before the step instead of after it."""
    update = Teacher.update
    change_targets(patch, kind, lambda method, batches, targets: update(method.teacher, method.student))
    patch.setattr(Teacher, "update", lambda self, student: None)


def teacher_in_the_other_mode(patch, kind):
    patch.setattr(Teacher, "train", lambda self, mode=True: torch.nn.Module.train(self, False))


@pytest.mark.parametrize(
    "method, mistake, column",
    [
        ("simmatch", sum_for_mean, "loss_u"),
        ("simmatch", bank_before_the_losses, "loss_in"),
        ("simmatch", prior_without_this_step, "pseudo"),
        ("simmatch", teacher_before_the_optimizer, "teacher"),
        ("simmatch", teacher_in_the_other_mode, "pseudo"),
        ("simmatchv2", sum_for_mean, "loss_nn"),
        ("simmatchv2", bank_before_the_losses, "pseudo"),
        ("simmatchv2", queue_before_the_losses, "loss_ee"),
        ("simmatchv2", queue_in_the_opposite_order, "queue_z"),
        ("simmatchv2", pseudo_labels_in_the_queue, "queue_p"),
        ("simmatchv2", a_term_of_zero_in_the_first_step, "loss_ne"),
        ("simmatchv2", first_view_alone, "loss_ee"),
        ("simmatchv2", aligned_mean_in_the_prior, "prior"),
        ("simmatchv2", prior_with_this_step, "pseudo"),
        ("simmatchv2", teacher_before_the_optimizer, "teacher"),
        ("simmatchv2", teacher_in_the_other_mode, "pseudo"),
    ],
)
def test_a_wrong_step_is_caught(method, mistake, column, monkeypatch):
    mistake(monkeypatch, METHODS[method])
    row = rows(EXACT, method)
    assert not row[column] <= EXACT.bound(column) and not parity.holds(EXACT, row), row


@pytest.mark.parametrize("mistake", [sum_for_mean, bank_before_the_losses])
@pytest.mark.parametrize("method", METHODS)
def test_float32_too_catches_wrong_losses(method, mistake, monkeypatch):
    mistake(monkeypatch, METHODS[method])
    assert not parity.holds(FAST, rows(FAST, method))


def test_a_head_with_a_gradient_of_zero_in_the_first_epoch_is_caught(monkeypatch):
    """Weight decay would then apply to the head; in the published program it does not."""

    def change(method, batch, output):
        output.losses["loss_in"] += 0 * sum(p.sum() for p in method.student.head.parameters())

    change_output(monkeypatch, SimMatch, change)
    assert rows(EXACT, "simmatch")["momentum"] == float("inf")


@pytest.mark.slow(20)
@pytest.mark.skipif(
    parity.missing(parity.Mode("compiled", compiled=True)) is not None, reason="no C++ compiler"
)
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_holds_the_bounds(method):
    mode = parity.Mode("compiled", compiled=True)
    row = rows(mode, method)
    assert parity.holds(mode, row), row


# The programs of docs/PARITY.md


def examples():
    """The program, the lines that go before its last line, and the program that writes published states."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PARITY.md").read_text(encoding="utf-8"), re.S)


def example(method, *, eman=False, ranks=2, steps=2, dtype="float64", state=None):
    """The program with `steps` steps of `method`, and with a threshold that some images pass.

    state: a file in the published layout.
    """
    program, more, _ = examples()
    end = "dist_utils.dist_end()\n"
    assert program.endswith(end)
    text = program.removesuffix(end) + more + end
    changes = {
        'method_name = "simmatchv2"': f'method_name = "{method}"',
        "= False, 2, 8, torch.float64": f"= {eman}, {ranks}, {steps}, torch.{dtype}",
        "K, B, mu = 40, 4, 5": "K, B, mu = 40, 4, 2",
        "topn=16, k=2": "topn=6, k=2",
        "shared = dict(": "shared = dict(threshold=0.11, ",
    }
    if state is not None:
        line = next(line for line in text.splitlines() if line.startswith("published = "))
        changes[line] = f"published = torch.load({str(state)!r}, weights_only=True)"
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def run_example(*args, **settings):
    """The names that the program defines."""
    space = {}
    exec(compile(example(*args, **settings), "docs/PARITY.md", "exec"), space)
    return space


@pytest.mark.slow(10)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("eman", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_example_gives_the_references_numbers(method, eman, ranks, tmp_path):
    """All ranks are in one process. The first state is that of a published file after a step."""
    first = run_example(method, eman=eman, ranks=ranks, steps=1, dtype="float32")
    saved = published_checkpoints.from_method_state(first["after"], first["optimizer"].state_dict(), 1)
    torch.save(saved, tmp_path / "published.pth")
    space = run_example(method, eman=eman, ranks=ranks, state=tmp_path / "published.pth")
    slow, step = reference_from(space), space["first_step"]
    everything = [[space["tensors"](step + k, rank) for rank in range(ranks)] for k in range(2)]
    slow.step(everything[0], step, first_epoch=False)
    before = copy.deepcopy(slow)
    terms, pseudo, mask = slow.step(everything[1], step + 1, first_epoch=False)
    assert 0 < sum(map(sum, mask)) and terms.keys() == space["losses"].keys()
    for name, value in terms.items():
        assert value > 0 and space["losses"][name] == pytest.approx(value, rel=1e-9)
        weight = getattr(space["config"], f"lambda_{name.removeprefix('loss_')}", 1)
        assert space["terms"][name] == pytest.approx(value / weight, rel=1e-9)
    equal(space["pseudo_label"], torch.tensor(pseudo, dtype=torch.float64).flatten(0, 1))
    assert space["mask"].tolist() == [m for own in mask for m in own]
    expected = parity_steps.state_of(slow)
    momentum = {
        f"momentum.{name}": space["optimizer"].state[p]["momentum_buffer"]
        for name, p in space["method"].student.named_parameters()
    }
    got = space["after"] | momentum
    assert set(got) == set(expected)
    for key, value in expected.items():
        equal(got[key], value, key)
    check_more_of_the_step(space, slow, before, everything[1])


def equal(got, expected, name=""):
    assert parity.relative(got, expected) <= 1e-9, name


def reference_from(space):
    """The reference in the state from which the program starts, with its momentum."""
    config, state = space["config"], space["state"]
    method = build_method(config, 3, state["bank.labels"], len(state.get("queue.z", ())) // config.k)
    method.double().load_state_dict(state)
    slow = parity_steps.reference_of(config, method)
    saved = published_checkpoints.to_optimizer_state(space["published"]["optimizer"], state)["state"]
    for k, (name, _) in enumerate(method.student.named_parameters()):
        slow.velocity[name] = saved[k]["momentum_buffer"].double()
    return slow


def check_more_of_the_step(space, after, before, batches):
    """after, before: references in these states."""
    for network, logits, z in (
        (after.student, "logits", "z"),
        (after.teacher, "teacher_logits", "teacher_z"),
    ):
        network.eval()
        for name, expected in zip((logits, z), network(space["images"])):
            equal(space[name], expected.detach())
    for name, mean in space["losses"].items():
        own = [terms[name].item() for terms in space["own_terms"]]
        assert len(set(own)) == len(batches) and sum(own) / len(own) == pytest.approx(mean, rel=1e-9)
    before.student.train()
    expected = before._forwards(batches, space["step"])
    n_x = space["B"]
    for rank, (logits_x, logits_s, z_s, z_x, logits_uw, z_uw) in enumerate(zip(*expected)):
        logits, z = space["in_teacher"][rank]
        got = (*space["in_student"][rank], z[:n_x], logits[n_x:], z[n_x:])
        for one, other in zip(got, (logits_x, logits_s, z_s, z_x, logits_uw, z_uw), strict=True):
            equal(one, other.detach())
    state = space["method"].state_dict()
    assert all(torch.equal(state[key], value) for key, value in space["before"].items())


def test_the_example_writes_states_in_the_published_layouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(compile(examples()[2], "docs/PARITY.md", "exec"), space)
    for name in METHODS:
        saved = torch.load(f"random-{name}.pth", weights_only=True)
        assert published_layouts.detect_kind(saved) == name and saved["epoch"] == 0
        assert all(key.startswith("module.") for key in saved["state_dict"])
        state, optimizer, epoch, step = published_checkpoints.to_training_state(saved, steps_per_epoch=7)
        assert (epoch, step, optimizer["state"]) == (0, 0, {})
        config = parity_steps.Config(method=name, **space["shared"], **space["own"][name])
        method = build_method(config, 3, space["labels"], space["unlabeled_per_step"])
        method.load_state_dict(state)
        assert method.fit_state(dict(state)) == ""
    assert torch.load("random-simmatch.pth", weights_only=True)["state_dict"]["module.bank"].shape == (16, 40)
    assert saved["state_dict"]["module.u_bank"].shape == (80, 16)
    expected = space["method"].state_dict()  # of the last one
    assert set(state) == set(expected) and all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.slow(12)
@pytest.mark.parametrize("method", METHODS)
def test_the_example_with_a_process_for_each_rank_prints_the_same(method, tmp_path):
    (tmp_path / "check.py").write_text(example(method), encoding="utf-8")
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
    assert len(out[0]) > 30 and out[0] == pytest.approx(out[1], rel=1e-7, abs=1e-9)
