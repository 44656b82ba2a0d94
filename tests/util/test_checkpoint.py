"""Complete, incomplete and foreign checkpoint files."""

import os
import pickle
import re

import numpy as np
import pytest
import torch

from models.network import Network
from util import checkpoint
from util.errors import UserError


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.fixture
def state():
    return {
        "config": {"seed": 1},
        "step": 3,
        "world": 1,
        "processes": 1,
        "batch_size": 8,
        "steps_per_epoch": 2,
        "best": {"student_top1": 1.5},
        "split": ("s", "0"),
        "data": "d",
        "classes": ["a"],
        "method": {"w": torch.arange(1000.0)},
        "optimizer": {},
        "scaler": {},
        "meter": {},
        "bad_images": [],
    }


def test_load_returns_what_save_wrote(state, tmp_path):
    checkpoint.save(tmp_path / "a.pth", state)
    loaded = checkpoint.load(tmp_path / "a.pth")
    assert torch.equal(loaded.pop("method")["w"], torch.arange(1000.0))
    assert loaded == {
        "format": checkpoint.FORMAT,
        **{key: value for key, value in state.items() if key != "method"},
    }
    assert os.listdir(tmp_path) == ["a.pth"]


def test_every_truncated_file_is_a_user_error(state, tmp_path):
    checkpoint.save(tmp_path / "a.pth", state)
    whole = (tmp_path / "a.pth").read_bytes()
    for size in [0, 1, 2, 10, 100, *range(200, len(whole), 97), len(whole) - 1]:
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.pth") as error:
            checkpoint.load(tmp_path / "cut.pth")
        assert "\n" not in str(error.value)


def test_a_changed_bit_of_the_content_is_noticed(state, tmp_path):
    """PyTorch itself loads a file with a changed value without an error."""
    checkpoint.save(tmp_path / "a.pth", state)
    whole = (tmp_path / "a.pth").read_bytes()
    start = whole.index(torch.arange(1000.0).numpy().tobytes())
    for byte in (start, start + 1999, start + 3999):
        (tmp_path / "b.pth").write_bytes(whole[:byte] + bytes([whole[byte] ^ 4]) + whole[byte + 1 :])
        with pytest.raises(UserError, match="b.pth is damaged"):
            checkpoint.load(tmp_path / "b.pth")


def test_the_previous_checkpoint_is_kept_and_loaded_if_the_newest_is_damaged(state, tmp_path):
    path = tmp_path / "last.pth"
    assert checkpoint.load_newest(path) == (None, "")
    for step in (1, 2, 3):
        checkpoint.save(path, {**state, "step": step}, keep_previous=True)
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pth", "last.pth"]
    loaded, warning = checkpoint.load_newest(path)
    assert loaded["step"] == 3 and warning == ""
    path.write_bytes(path.read_bytes()[:900])
    loaded, warning = checkpoint.load_newest(path)
    assert (
        loaded["step"] == 2
        and "damaged" in warning
        and "last.previous.pth" in warning
        and "\n" not in warning
    )
    path.unlink()
    assert checkpoint.load_newest(path)[0]["step"] == 2
    (tmp_path / "last.previous.pth").write_bytes(b"")
    with pytest.raises(UserError):
        checkpoint.load_newest(path)


def test_code_in_a_pickle_is_not_run(state, tmp_path):
    for name, write in (("raw", lambda o, p: p.write_bytes(pickle.dumps(o))), ("torch", torch.save)):
        path = tmp_path / f"{name}.pth"
        write({**state, "x": Bomb(tmp_path / "boom")}, path)
        with pytest.raises(UserError, match="refused") as error:
            checkpoint.load(path)
        assert "\n" not in str(error.value) and not (tmp_path / "boom").exists()


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_a_numpy_scalar_is_loaded_but_no_other_numpy_object(core, tmp_path):
    """As in EMAN's MoCo files; NumPy 2 renamed the module."""

    def write(value):
        torch.save({"best_acc1": value}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        raw = (tmp_path / "a.pth").read_bytes()
        (tmp_path / "a.pth").write_bytes(re.sub(rb"numpy\._?core\.", b"numpy." + core + b".", raw))

    write(np.float64(60.5))
    assert checkpoint.load_file(tmp_path / "a.pth") == {"best_acc1": 60.5}
    write(np.zeros(2))
    with pytest.raises(UserError, match="refused"):
        checkpoint.load_file(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content", [b"hello\n", b"\x80\x04garbage", os.urandom(1000), b"PK\x03\x04" + bytes(100)]
)
def test_a_file_that_is_no_checkpoint_is_a_user_error(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("key, value", [("config", 3), ("method", [1]), ("step", "3"), ("best", None)])
def test_a_value_of_the_wrong_type_is_named(state, key, value, tmp_path):
    torch.save({"format": checkpoint.FORMAT, **state, key: value}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"no valid '{key}'"):
        checkpoint.load(tmp_path / "a.pth")


def test_the_writer_writes_the_state_as_it_was_at_save(state, tmp_path):
    momentum = torch.zeros(10**6)
    writer = checkpoint.Writer(tmp_path / "last.pth", tmp_path / "best.pth", "stop", print)
    for step in range(1, 6):
        state["step"] = step
        state["optimizer"] = {"state": {0: {"momentum_buffer": momentum}}}
        state["method"]["w"].fill_(step)
        momentum.fill_(step)
        writer.save(state, best=step == 3)
        state["method"]["w"].fill_(-1)  # the next step changes it during the write
        momentum.fill_(-1)
    writer.close()
    for name, step in (("best", 3), ("last.previous", 4), ("last", 5)):
        saved = checkpoint.load(tmp_path / f"{name}.pth")
        assert saved["step"] == step
        assert (saved["method"]["w"] == step).all() and (
            saved["optimizer"]["state"][0]["momentum_buffer"] == step
        ).all()


def test_a_tensor_that_is_not_finite_is_named():
    checkpoint.check_finite({"a": torch.ones(2), "n": torch.tensor(3)}, step=7)
    with pytest.raises(UserError, match="b is not finite after step 7"):
        checkpoint.check_finite({"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])}, step=7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_at_any_index(bad, dtype):
    whole = {
        "x": torch.ones(3, dtype=torch.float64),
        "empty": torch.empty(0),
        "count": torch.tensor(3),
        "big": torch.tensor(torch.finfo(dtype).max, dtype=dtype),
    }
    for i in (0, 1, 500, 999, 1000):
        value = torch.linspace(-2, 2, 1001).to(dtype).view(7, 143).T  # not contiguous
        checkpoint.check_finite({**whole, "y": value}, step=1)
        value[i % 143, i // 143] = bad
        with pytest.raises(UserError, match="^y is not finite"):
            checkpoint.check_finite({**whole, "y": value, "z": value}, step=1)
    checkpoint.check_finite({}, step=1)


@pytest.mark.parametrize("value", [{"state_dict": {}}, [1, 2], torch.zeros(3), {}])
def test_a_foreign_file_is_a_user_error(value, tmp_path):
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(UserError, match="was not written by train_semi.py"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_missing_file_and_a_directory_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_another_format_is_a_user_error(state, tmp_path):
    torch.save({**state, "format": 99}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="format 99"):
        checkpoint.load(tmp_path / "a.pth")


def test_a_failed_write_leaves_the_old_file_unchanged(state, tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    checkpoint.save(path, state)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, state)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("stopped", [UserError("a bad image"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_only_the_old_file(stopped, tmp_path):
    def write(file):
        file.write(b"half")
        raise stopped

    (tmp_path / "a.csv").write_bytes(b"before")
    with pytest.raises(type(stopped)):
        checkpoint.write_atomically(tmp_path / "a.csv", write)
    assert (tmp_path / "a.csv").read_bytes() == b"before" and os.listdir(tmp_path) == ["a.csv"]
    checkpoint.write_atomically(tmp_path / "a.csv", lambda file: file.write(b"after"))
    assert (tmp_path / "a.csv").read_bytes() == b"after" and os.listdir(tmp_path) == ["a.csv"]
    with pytest.raises(UserError, match="cannot write .*a.csv/b"):
        checkpoint.write_atomically(tmp_path / "a.csv" / "b", lambda file: None)


def test_a_full_disk_in_torch_save_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write") as error:
        checkpoint.write_atomically(
            tmp_path / "a.pth",
            lambda file: checkpoint.write_torch(torch.zeros(9), open("/dev/full", "wb", 0)),
        )
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


def test_load_module_names_the_keys_that_differ(tmp_path):
    net = Network("small_encoder", 1, 10, 8)
    values = net.state_dict()
    del values["head.2.bias"]
    values["odd"] = torch.zeros(1)
    values["fc.weight"] = torch.zeros(7, 128)
    with pytest.raises(UserError) as error:
        checkpoint.load_module(net, values, tmp_path / "a.pth")
    for part in ("head.2.bias is missing", "odd is unknown", "fc.weight is [7, 128], not [10, 128]"):
        assert part in str(error.value)


def test_load_module_with_a_prefix_names_complete_keys(tmp_path):
    net = Network("small_encoder", 1, 10, 8)
    values = {f"a.{key}": value for key, value in Network("small_encoder", 1, 10, 8).state_dict().items()}
    checkpoint.load_module(net, {**values, "b.other": torch.zeros(1)}, tmp_path / "a.pth", prefix="a.")
    assert all(torch.equal(value, values[f"a.{key}"]) for key, value in net.state_dict().items())
    del values["a.fc.bias"]
    with pytest.raises(UserError, match="a.fc.bias is missing; a.odd is unknown"):
        checkpoint.load_module(net, {**values, "a.odd": torch.zeros(1)}, tmp_path / "a.pth", prefix="a.")
