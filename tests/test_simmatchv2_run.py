"""SimMatchV2 as a user runs it: interrupted and resumed, on several ranks, from and to published files."""

import os
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, one_line, start_python
from published_files import contents, sgd, simmatchv2
from test_ranks_run import finish, killed, start
from test_train import assert_same_run, events, wait_for, weights
from trees import cifar10, imagenet

import train_semi
from dataset import cifar
from models.simmatchv2 import SimMatchV2

V2 = "--config configs/simmatchv2_digits.yaml --device cpu --workers 0 --eval-freq 1 --print-freq 4".split()
# The queue is full after three steps of the first epoch.
SHORT = [*V2, *"--epochs 2 --steps-per-epoch 4 --k 3".split()]
TWO_RANKS = ["--batch-size", "5"]


def train_here(monkeypatch, *flags):
    """Call the main of train_semi.py in this process."""
    monkeypatch.setattr(sys, "argv", ["train_semi.py", *map(str, flags)])
    train_semi.main()


def interrupt_before_save(monkeypatch, number):
    """Let a run in this process end before its `number`-th checkpoint, counted from 0, is written."""
    save, started = train_semi.checkpoint.Writer.save, []

    def call(writer, state):
        if len(started) == number:
            writer.close()
            raise KeyboardInterrupt
        started.append(state["step"])
        save(writer, state)

    monkeypatch.setattr(train_semi.checkpoint.Writer, "save", call)


WAYS = {
    "two views in fp16": ["--strong-views", "2", "--fp16"],
    "virtual ranks, eman, without DA": [*TWO_RANKS, *"--virtual-ranks 2 --eman --DA false".split()],
}


@pytest.mark.slow(6)
@pytest.mark.parametrize("flags", WAYS.values(), ids=WAYS)
def test_a_run_resumes_from_any_step_to_the_same_bits(flags, command, monkeypatch, tmp_path):
    """From the first step, which alone has no loss_ne, and from one in the second epoch."""
    flags = [*SHORT, *flags]
    done = command("train_semi.py", *flags, "--output-dir", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    for reached in (1, 6):
        folder = tmp_path / str(reached)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_before_save(patch, reached)
            train_here(patch, *flags, "--save-freq", "1", "--output-dir", folder)
        assert weights(folder)["step"] == reached
        done = command("train_semi.py", *flags, "--output-dir", folder)
        assert done.returncode == 0 and "continues from" in done.stdout, done.stderr
        assert_same_run(tmp_path / "whole", folder)
    first = next(event for event in events(tmp_path / "whole") if event["event"] == "train")
    assert ("skipped" in first) == ("--fp16" in flags) and first.get("skipped", 1) > 0


@pytest.mark.slow(8)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_or_signaled_run_goes_on_to_the_same_bits(number, command, tmp_path):
    flags = [*V2, "--epochs", "4", "--strong-views", "2"]
    whole = command("train_semi.py", *flags, "--output-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "ended"
    run = start_python("train_semi.py", *flags, "--save-freq", "7", "--output-dir", folder)
    wait_for(folder / "last.pth", run)
    os.kill(run.pid, number)
    out, err = run.communicate(timeout=120)
    assert run.returncode == (-number if number == signal.SIGKILL else 75), err
    reached = weights(folder)["step"]
    assert 0 < reached < weights(tmp_path / "whole")["step"]
    again = command("train_semi.py", *flags, "--output-dir", folder)
    assert again.returncode == 0 and f"at step {reached}" in again.stdout, again.stderr
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.slow(20)
def test_two_processes_resume_to_the_same_bits_and_are_two_virtual_ranks(tmp_path):
    flags = [*V2, *TWO_RANKS, "--epochs", "2"]
    ends = finish(start(tmp_path / "whole", *flags))
    # DDP does not warn that the first step uses all parameters.
    assert [(code, err) for code, _, err in ends] == [(0, ""), (0, "")]
    reached = killed(tmp_path / "killed", *flags, new_processes=False)
    (code, out, err), _ = finish(start(tmp_path / "killed", *flags, new_processes=False))
    assert code == 0 and f"at step {reached}" in out, err
    assert_same_run(tmp_path / "whole", tmp_path / "killed")

    virtual = start(tmp_path / "virtual", *flags, "--virtual-ranks", "2", processes=1, new_processes=False)
    assert finish(virtual)[0][0] == 0
    first, second = (
        [event for event in events(tmp_path / name) if event["event"] == "train"]
        for name in ("whole", "virtual")
    )
    assert [event["step"] for event in first] == [event["step"] for event in second]
    for a, b in zip(first[:2], second):  # rounding in float32 grows from step to step
        for name in ("loss_x", "loss_nn", "loss_ee", "loss_ne"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6)


SMALL = [
    *"--norm_feat --topn 6 --k 4 --DA --fp16 --nesterov --lr 0.001 --cos --epochs 2".split(),
    *"--labels-per-class 2 --cls 3 --backbone resnet18_encoder --batch-size 2 --mu 2 --image-size 32".split(),
    *"--device cpu --workers 0 --steps-per-epoch 3 --wd 0.001 --diagnose-freq 9".split(),
]
SCALER = {"scale": 64.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return imagenet(tmp_path_factory.mktemp("photos") / "in", classes=3, train=8, val=4)


@pytest.fixture
def file(root, tmp_path):
    """A published file of one epoch, of a run of another number of ranks."""
    torch.manual_seed(0)
    model = simmatchv2(labeled=6, dim=128)
    more = {"best_acc1": 71.9, "best_acc5": 90.0, "scaler": {**SCALER, "_growth_tracker": 7}}
    (tmp_path / "files").mkdir()
    torch.save(contents(model, "SimMatchV2", 1, sgd(model), **more), tmp_path / "files" / "v2.pth")
    return tmp_path / "files" / "v2.pth"


@pytest.mark.slow(8)
def test_a_published_file_is_resumed_exported_and_evaluated(file, root, command, tmp_path):
    cache = {"SIMMATCH_CACHE": str(tmp_path / "cache")}
    (file.parent / "v2_best.pth").write_bytes(b"of the published program")
    (file.parent / "v2.published.pth").write_bytes(b"the copy of another file")
    train = ["train_semi.py", "--checkpoint", file, "--method", "simmatchv2", "--data", root, *SMALL]
    done = command(*train, "--output-dir", tmp_path / "run", env=cache)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    queue = "the checkpoint's queue has 20 rows, but this run's has 16: it starts empty"
    assert queue in lines and f"continues from {file} at step 3: 3 steps to go" in lines
    assert lines[-1].endswith(f"at step 6, chosen on the test images, in {file.parent / 'v2_best.pth'}")
    copies = {"v2.pth": "v2.published1.pth", "v2_best.pth": "v2_best.published.pth"}
    for name, copy in copies.items():
        assert f"a copy of {file.parent / name} is kept in {file.parent / copy}" in lines
    assert sorted(os.listdir(file.parent)) == sorted([*copies, *copies.values(), "v2.published.pth"])
    assert (file.parent / copies["v2_best.pth"]).read_bytes() == b"of the published program"
    assert (file.parent / "v2.published.pth").read_bytes() == b"the copy of another file"
    assert "the best score counts from this start; that of v2.pth is 71.900 %" in lines
    state = weights(file.parent, "v2.pth")
    assert state["scaler"] == {**SCALER, "_growth_tracker": 10} and state["step"] == 6
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.001]
    assert state["method"]["queue.p"][:12].sum(dim=1).allclose(torch.ones(12))

    export = ["--export", tmp_path / "out.pth", "--format", "published"]
    done = command("eval.py", "--checkpoint", file, *export, env=cache)
    assert done.returncode == 0 and "2 whole epochs" in done.stdout, done.stderr
    exported = torch.load(tmp_path / "out.pth", weights_only=True)
    model = simmatchv2(labeled=6, dim=128)
    for name, rows in (("u_bank", torch.zeros(16, 128)), ("u_labels", torch.zeros(16, 3))):
        model.register_buffer(name, rows)
    torch.nn.DataParallel(model).load_state_dict(exported["state_dict"])  # strict
    torch.optim.SGD(model.parameters(), 1.0).load_state_dict(exported["optimizer"])
    assert exported["scaler"] == state["scaler"]
    flags = ["--device", "cpu", "--workers", "0"]
    native = command("eval.py", "--checkpoint", file, *flags, env=cache)
    flags += ["--data", root, "--image-size", "32"]
    published = command("eval.py", "--checkpoint", tmp_path / "out.pth", *flags, env=cache)
    assert native.returncode == published.returncode == 0, native.stderr + published.stderr
    assert native.stdout.splitlines()[1:] == published.stdout.splitlines()[1:]
    best = state["best"]
    assert native.stdout.endswith(f"* Acc@1 {best['student_top1']:.3f} Acc@5 {best['student_top5']:.3f}\n")


@pytest.mark.slow(8)
def test_a_published_file_is_resumed_as_the_command_line_says(file, root, command, tmp_path):
    """Its scaler must be one that a GradScaler can have, and the options of SGD are those of the settings. A
    name without a slash is a file in checkpoints/.
    """
    cache, state = {"SIMMATCH_CACHE": str(tmp_path / "cache")}, torch.load(file, weights_only=True)
    for name in ("train_semi.py", "models", "dataset", "util", "eval.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    flags = ["train_semi.py", "--method", "simmatchv2", "--data", root, *SMALL]
    for wrong in ({"scale": 0.0}, {"_growth_tracker": 2**40}, {"growth_interval": 0}, {"growth_factor": 0.5}):
        torch.save({**state, "scaler": {**state["scaler"], **wrong}}, file)
        before = file.read_bytes()
        done = command(*flags, "--checkpoint", file, "--output-dir", tmp_path / "run", env=cache)
        one_line(done.returncode, done.stderr, f"{file} cannot be resumed: it has no valid 'scaler'")
        assert os.listdir(file.parent) == ["v2.pth"] and file.read_bytes() == before
    (tmp_path / "checkpoints").mkdir()
    torch.save({**state, "scaler": {}}, tmp_path / "checkpoints" / "v2.pth")
    done = command(*flags, "--no-decay-bn", "--checkpoint", "v2.pth", cwd=tmp_path, env=cache)
    assert done.returncode == 0 and "continues from checkpoints/v2.pth at step 3" in done.stdout, done.stderr
    assert done.stdout.endswith("chosen on the test images, in checkpoints/v2/best.pth\n")
    saved = weights(tmp_path / "checkpoints", "v2.pth")["optimizer"]
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.001, 0.0]
    parameters = [*simmatchv2(labeled=6, dim=128).main.parameters()]
    order = [p for p in parameters if p.ndim > 1] + [p for p in parameters if p.ndim == 1]
    assert [saved["state"][k]["momentum_buffer"].shape for k in range(len(order))] == [p.shape for p in order]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--method", "simmatch"], "v2.pth is a checkpoint of SimMatchV2: train with --method simmatchv2"),
        (["--method", "simmatchv2", "--norm-feat", "false"], "a LayerNorm on its feature: add --norm-feat"),
    ],
)
def test_the_flags_that_a_published_file_needs_are_named(file, root, command, flags, words, tmp_path):
    cache = {"SIMMATCH_CACHE": str(tmp_path / "cache")}
    small = [flag for flag in SMALL if "simmatchv2" in flags or flag not in ("--topn", "6", "--k", "4")]
    run = ["train_semi.py", "--checkpoint", file, "--data", root, *small, *flags]
    done = command(*run, "--output-dir", tmp_path / "run", env=cache)
    one_line(done.returncode, done.stderr, words)
    assert os.listdir(file.parent) == ["v2.pth"]


def test_a_copy_of_a_published_file_that_is_interrupted_is_made_again(file, root, monkeypatch, tmp_path):
    monkeypatch.setenv("SIMMATCH_CACHE", str(tmp_path / "cache"))
    flags = ["--checkpoint", file, "--method", "simmatchv2", "--data", root, *SMALL, "--output-dir"]

    def half(source, target):
        target.write(source.read(1000))
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", half)
    with pytest.raises(KeyboardInterrupt):
        train_here(monkeypatch, *flags, tmp_path / "run")
    assert os.listdir(file.parent) == ["v2.pth"]


def test_cifar_with_two_views(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cifar.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar.CIFAR10, "meta", {**cifar.CIFAR10.meta, "md5": None})
    flags = ["--config", ROOT / "configs" / "cifar10_40.yaml", "--data", cifar10(tmp_path / "cifar")]
    flags += "--method simmatchv2 --device cpu --workers 0 --batch-size 10 --mu 2 --k 3 --topn 20".split()
    flags += "--backbone small_encoder --strong cifar_strong,cifar_strong --steps-per-epoch 4".split()
    flags += ["--epochs", "2", "--print-freq", "2", "--output-dir", tmp_path / "run"]
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        interrupt_before_save(patch, 1)
        train_here(patch, *flags)
    train_here(monkeypatch, *flags)
    assert "continues from" in capsys.readouterr().out
    check_log_and_reports(tmp_path / "run", command)


@pytest.mark.slow(7)
def test_own_images_with_multicrop(root, command, tmp_path):
    cache = {"SIMMATCH_CACHE": str(tmp_path / "cache")}
    flags = ["--config", "configs/simmatchv2_folder.yaml", "--data", root, "--labels-per-class", "2"]
    flags += "--image-size 64 --backbone small_encoder --batch-size 3 --mu 2 --topn 6 --k 2".split()
    flags += "--epochs 2 --warmup-epoch 1 --print-freq 1 --workers 1 --device cpu".split()
    done = command("train_semi.py", *flags, "--multicrop", "--output-dir", tmp_path / "run", env=cache)
    assert done.returncode == 0, done.stderr
    assert "6 labeled, 18 unlabeled, 12 test images, 3 classes" in done.stdout
    check_log_and_reports(tmp_path / "run", command)
    for name in ("last.pth", "best.pth"):
        done = command("eval.py", "--checkpoint", tmp_path / "run" / name, "--workers", "0", env=cache)
        assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("* Acc@1 "), done.stderr


def check_log_and_reports(folder, command):
    """Every loss is finite (JSON has no other numbers in a log) and in use after the first step."""
    for event in events(folder):
        if event["event"] == "train" and event["step"] > 1:
            assert all(isinstance(event[name], float) for name in SimMatchV2.loss_names), event
    done = command("-m", "util.doctor", folder)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    done = command("-m", "util.report", folder, "--curves", folder / "curves.png")
    assert done.returncode == 0 and "| simmatchv2 | " in done.stdout, done.stderr


@pytest.mark.parametrize("name, value", [("loss_ne", 3e38), ("loss_x", 1000.0)])
def test_a_loss_in_fp16_that_is_not_finite_stops_the_run_in_one_line(name, value, mistake, tmp_path):
    flag = ["--lr", value] if name == "loss_x" else ["--lambda-ne", value]
    flags = [*SHORT, "--fp16", "--print-freq", "1", *flag, "--output-dir", tmp_path]
    mistake(train_semi.main, flags, f"error: {name} is ", "training stops and keeps the last checkpoint")


def test_a_step_that_overflows_in_fp16_is_skipped_and_counted_but_the_teacher_is_averaged(
    monkeypatch, tmp_path
):
    """The scale is so large that the gradients of the last three of four steps overflow."""
    take, states = train_semi.train_step, []

    def step(method, student, optimizer, batches, *, step, scaler, **how):
        if step == 1:
            scaler.update(2.0**120)
        states.append({key: value.clone() for key, value in method.state_dict().items()})
        return take(method, student, optimizer, batches, step=step, scaler=scaler, **how)

    monkeypatch.setattr(train_semi, "train_step", step)
    monkeypatch.setattr(train_semi.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=16.0))
    flags = ["--fp16", "--epochs", "1", "--steps-per-epoch", "4", "--ema-m", "0.5", "--output-dir", tmp_path]
    train_here(monkeypatch, *SHORT, *flags)
    (event,) = (event for event in events(tmp_path) if event["event"] == "train")
    assert event["skipped"] == 3
    (_, before, after, _), weight = states, "fc.weight"
    student, teacher = f"student.{weight}", f"teacher.net.{weight}"
    assert torch.equal(before[student], after[student])
    assert not torch.equal(states[0][student], before[student])
    expected = (before[teacher] + before[student]) / 2
    torch.testing.assert_close(after[teacher], expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(before[teacher], after[teacher])
    assert torch.equal(after["queue.ptr"], before["queue.ptr"] + 70)


def test_a_queue_that_cannot_be_allocated_is_one_line(mistake, tmp_path):
    """It would need 367 TB, more than a process can address."""
    flags = "--k 1000000 --batch-size 100 --mu 14 --dim 65536 --output-dir".split()
    mistake(train_semi.main, [*V2, *flags, tmp_path], "error: out of memory", "with simmatchv2, --k")
