"""Training on a real GPU: every precision, a killed run, the step against plain loops, and host waits.

All other tests hide the GPU (tests/conftest.py). These start processes that see it; without one they skip.
They have not been run yet, because they were written on a machine without a GPU.
"""

import functools
import math

import pytest
from conftest import DIGITS, GPUS, start_python
from test_device import METHODS
from test_train import events, wait_for, weights
from trees import imagenet

from benchmark.parity import Mode

pytestmark = [pytest.mark.gpu, pytest.mark.slow(60)]
SHORT = ["--steps-per-epoch", "8", "--print-freq", "1", "--workers", "0"]
# Calls train_semi.py; from the start of a step to the end of its meter, a wait for the GPU raises. The fourth
# step is the last one and has events, which may wait.
NO_WAITS = """
import torch, train_semi
from util.run.metrics import Meter

learning_rate, add = train_semi.learning_rate, Meter.add

def start_of_step(config, step, steps_per_epoch):
    torch.cuda.set_sync_debug_mode("error" if step < 3 else "default")
    return learning_rate(config, step, steps_per_epoch)

def end_of_step(meter, step, *values):
    add(meter, step, *values)
    torch.cuda.set_sync_debug_mode("default")
    print("checked step", step)

train_semi.learning_rate, Meter.add = start_of_step, end_of_step
train_semi.main()
"""
VIEWS = """
from tests.dataset.test_views import BATCHED, test_a_batched_stage_equals_pil

for stage in BATCHED:
    test_a_batched_stage_equals_pil(stage, "cuda")
"""


def start(*args):
    """Start `python *args` in a process that sees the GPU."""
    return start_python(*args, env={"CUDA_VISIBLE_DEVICES": GPUS})


def run(*args):
    """Run `python *args` with the GPU -> its output. It must succeed."""
    process = start(*args)
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


@functools.cache
def has_gpu():
    return run("-c", "import torch; print(torch.cuda.is_available())").strip() == "True"


@pytest.fixture(autouse=True)
def needs_gpu():
    if not has_gpu():
        pytest.skip("no GPU")


def of_kind(folder, kind):
    return [event for event in events(folder) if event["event"] == kind]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_of_each_precision(precision, tmp_path):
    """The first step has the CPU's loss of the labeled images, within the bounds of benchmark/parity.py."""
    flags = [*SHORT, "--precision", precision, "--channels-last"]
    out = run("train_semi.py", *DIGITS, tmp_path / "gpu", "--device", "cuda", *flags)
    run("train_semi.py", *DIGITS, tmp_path / "cpu", "--device", "cpu", *SHORT)
    assert "on 1 x cuda" in out
    gpu, cpu = (of_kind(tmp_path / name, "train") for name in ("gpu", "cpu"))
    assert len(gpu) == len(cpu) == 16 and all(math.isfinite(event["loss"]) for event in gpu)
    bound = Mode("GPU", precision=precision, tf32=True).bound("loss_x")
    assert gpu[0]["loss_x"] == pytest.approx(cpu[0]["loss_x"], rel=bound)
    assert "Acc@1" in run("eval.py", "--checkpoint", tmp_path / "gpu" / "best.pth", "--device", "cuda")


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_continues_to_about_the_same_losses(method, tmp_path):
    """A GPU does not add in the same order twice. Saves come between a resume and the next train event."""
    flags = [*SHORT, "--print-freq", "8", "--save-freq", "3", "--device", "cuda", *METHODS[method]]
    run("train_semi.py", *DIGITS, tmp_path / "whole", *flags)
    killed = start("train_semi.py", *DIGITS, tmp_path / "killed", *flags)
    wait_for(tmp_path / "killed" / "last.pth", killed)
    killed.kill()
    killed.communicate()
    reached = weights(tmp_path / "killed")["step"]
    out = run("train_semi.py", *DIGITS, tmp_path / "killed", *flags)
    assert 0 < reached < 16 and f"at step {reached}" in out
    whole, resumed = (of_kind(tmp_path / name, "train") for name in ("whole", "killed"))
    assert [event["step"] for event in resumed] == [event["step"] for event in whole] == [8, 16]
    for a, b in zip(resumed, whole):
        assert a["loss_x"] == pytest.approx(b["loss_x"], rel=0.05, abs=0.02)


def test_the_step_holds_the_bounds_of_parity():
    rows = ["TF32 off", "TF32 on", "bf16", "fp16", "channels-last, bf16", "2 virtual ranks"]
    out = run("benchmark/parity.py", "--steps", "2", "--only", *(f"GPU, {row}" for row in rows))
    assert "BROKEN" not in out and "Not run" not in out
    for teacher in ("ema", "eman"):
        for row in rows:
            assert f"| {teacher}, GPU, {row} |" in out


# With fp16, GradScaler reads whether gradients have overflowed.
@pytest.mark.parametrize("precision, ranks", [("fp32", 1), ("bf16", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_no_step_without_an_event_waits(method, precision, ranks, tmp_path):
    flags = "--epochs 2 --steps-per-epoch 2 --eval-freq 2 --print-freq 100 --workers 0 --batch-size 5".split()
    flags += ["--device", "cuda", "--precision", precision, "--virtual-ranks", ranks, *METHODS[method]]
    out = run("-c", NO_WAITS, *DIGITS, tmp_path, *flags)
    assert out.count("checked step") == 4


def test_no_step_with_device_views_waits(tmp_path):
    flags = (
        "--config configs/imagenet_1p.yaml --backbone small_encoder --cls 3 --labels-per-class 2 "
        "--image-size 32 --strong multicrop_224 --batch-size 2 --mu 2 --workers 0 --epochs 1 "
        "--steps-per-epoch 4 --warmup-epoch 0 --print-freq 100 --device cuda --device-views on"
    ).split()
    data = imagenet(tmp_path / "data")
    out = run("-c", NO_WAITS, *flags, "--data", data, "--output-dir", tmp_path / "run")
    assert out.count("checked step") == 4


def test_device_views_equal_pil():
    run("-c", VIEWS)
