"""Training on a fake GPU (tests/fake_gpu.py): operations mix no devices, and a step waits only for events."""

import os
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from fake_gpu import GPU, fake_gpu
from test_train import weights
from trees import imagenet, picture

import train_semi
from dataset.loader import to_device
from dataset.views import IMAGENET_NORM, PIPELINES, photo_view, pipeline
from util.run import preempt

# Four steps: the bank is used from the third on, and all events come after the last one.
DIGITS = (
    "--config configs/digits.yaml --batch-size 5 --epochs 2 --steps-per-epoch 2 --eval-freq 2 "
    "--print-freq 100 --workers 0 --output-dir"
).split()
METHODS = {
    "simmatch": [],
    "simmatch, eman": ["--method", "simmatch", "--eman"],
    "simmatchv2": ["--method", "simmatchv2", "--topn", "10", "--strong-views", "2", "--k", "2"],
    "single": ["--method", "simmatch_single"],
    "fixmatch": ["--method", "fixmatch"],
    "fixmatch, eman": ["--method", "fixmatch", "--eman"],
    "supervised": ["--method", "supervised"],
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = {"1 rank": (1, []), "virtual ranks": (1, ["--virtual-ranks", "2"]), "processes": (2, [])}
# Every pair of a method, a precision and a kind of ranks is in one of these.
CASES = [
    (method, precision, list(RANKS)[(i + k) % 3])
    for i, method in enumerate(METHODS)
    for k, precision in enumerate(PRECISIONS)
]


@pytest.fixture
def waits(monkeypatch):
    """Call train_semi.main with a fake GPU; return the waits before the first step and those of each step,
    and the dtypes of convolutions.
    """

    def train(*flags, processes=1):
        monkeypatch.setattr(sys, "argv", ["train_semi.py", *map(str, flags)])
        starts = []

        def learning_rate(config, step, steps_per_epoch):  # the first that a step calls
            starts.append(len(gpu.waits))
            return 0.1

        with fake_gpu(processes) as gpu, mock.patch("train_semi.learning_rate", learning_rate):
            train_semi.main()
        bounds = [0, *starts, len(gpu.waits)]
        return [gpu.waits[start:end] for start, end in zip(bounds, bounds[1:])], gpu.dtypes

    return train


def test_ordinary_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0


@pytest.mark.parametrize("method, precision, ranks", CASES)
def test_no_step_without_an_event_waits(method, precision, ranks, waits, tmp_path):
    processes, flags = RANKS[ranks]
    flags = [*flags, *METHODS[method], "--precision", precision]
    (_, *steps, last), dtypes = waits(*DIGITS, tmp_path, *flags, processes=processes)
    assert PRECISIONS[precision] in dtypes
    # GradScaler reads whether gradients have overflowed, unless the optimizer is fused.
    scaler = [("models/step.py:train_step", "it reads the result of aten._local_scalar_dense")]
    assert steps == [scaler if precision == "fp16" else []] * 3
    # Evaluation, diagnostics, the log and the checkpoint read values; the steps for them do not.
    assert not [wait for wait in last if wait[0].startswith(("models/", "dataset/")) and wait not in scaler]


@pytest.mark.parametrize("name", PIPELINES)
def test_no_view_waits(name):
    view = photo_view(pipeline(name, 32), IMAGENET_NORM, on_device=True)
    u = np.random.default_rng(0).random((16, view.num_uniforms))
    images = [picture(seed, (32, 32)) for seed in range(16)]
    with fake_gpu() as gpu:
        tensors = [x.pin_memory() for x in view.cpu_transform(images, u)]  # DataLoader does so
        assert to_device(view, tensors, GPU).shape == (16, 3, *tensors[0].shape[1:3]) and gpu.waits == []


def test_no_step_on_photographs_waits(waits, tmp_path):
    flags = (
        "--config configs/imagenet_1p.yaml --backbone small_encoder --cls 3 --labels-per-class 2 "
        "--image-size 32 --strong multicrop_224,multicrop_96 --batch-size 2 --mu 2 --workers 0 --epochs 1 "
        "--steps-per-epoch 3 --warmup-epoch 0"
    )
    data = imagenet(tmp_path / "data")
    (_, *steps, last), _ = waits(*flags.split(), "--data", data, "--output-dir", tmp_path / "run")
    assert steps == [[], []] and not [wait for wait in last if wait[0].startswith("dataset/")]


def test_a_save_right_after_a_resume_mixes_no_devices(waits, tmp_path):
    """The rows of the meter that the checkpoint has are on the CPU, and new ones on the GPU."""
    more = "--epochs 1 --steps-per-epoch 3 --eval-freq 1 --save-freq 1"
    flags = [*DIGITS, tmp_path, *more.split()]
    with mock.patch.object(preempt, "stop_requested", lambda: True), pytest.raises(SystemExit):
        waits(*flags)
    assert weights(tmp_path)["step"] == 1 and len(weights(tmp_path)["meter"]["rows"]) == 1
    waits(*flags)
    saved = weights(tmp_path, "last.previous.pth")
    assert saved["step"] == 2 and saved["meter"]["rows"].shape == (2, 6)
    assert saved["meter"]["counts"].sum() > 0
