"""Complete, incomplete and foreign checkpoint files."""

import os
import pickle
import re
from random import Random

import numpy as np
import pytest
import torch

from models.network import Network
from util.errors import UserError
from util.files import write_atomically
from util.formats import torch_files
from util.run import checkpoint
from util.run.resume import load_last


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


@pytest.mark.parametrize("zip_format", [True, False])
def test_every_truncated_file_is_called_damaged(state, tmp_path, zip_format):
    state["method"]["w"] = torch.arange(10_000.0)
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zip_format)
    whole = (tmp_path / "a.pth").read_bytes()
    for size in [*range(12), 100, *range(200, len(whole), 997), 5000, len(whole) - 22, len(whole) - 1]:
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut.pth is damaged or incomplete[^\n]*$"):
            checkpoint.load(tmp_path / "cut.pth")


@pytest.mark.parametrize("zip_format", [True, False])
def test_damage_at_any_byte_is_a_user_error(state, tmp_path, zip_format):
    torch.save(
        {**state, "sha256": checkpoint.digest(state)},
        tmp_path / "a.pth",
        _use_new_zipfile_serialization=zip_format,
    )
    whole, random = (tmp_path / "a.pth").read_bytes(), Random(0)
    for _ in range(150):
        spoilt, at = bytearray(whole), random.randrange(len(whole))
        size = random.choice((1, 1, 16, 512))
        spoilt[at : at + size] = bytes(b ^ 1 << random.randrange(8) for b in spoilt[at : at + size])
        if random.random() < 0.3:
            spoilt[at : at + 512] = bytes(len(spoilt[at : at + 512]))
        (tmp_path / "b.pth").write_bytes(spoilt)
        try:
            checkpoint.load(tmp_path / "b.pth")  # some bytes have no meaning, such as padding
        except UserError as error:
            assert "b.pth" in str(error) and "\n" not in str(error)
            assert not zip_format or "could run code" not in str(error)


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
    assert load_last(path) == (None, "")
    for step in (1, 2, 3):
        checkpoint.save(path, {**state, "step": step}, keep_previous=True)
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pth", "last.pth"]
    loaded, warning = load_last(path)
    assert loaded["step"] == 3 and warning == ""
    path.write_bytes(path.read_bytes()[:900])
    loaded, warning = load_last(path)
    assert (
        loaded["step"] == 2
        and "damaged" in warning
        and "last.previous.pth" in warning
        and "\n" not in warning
    )
    path.unlink()
    assert load_last(path)[0]["step"] == 2
    (tmp_path / "last.previous.pth").write_bytes(b"")
    with pytest.raises(UserError):
        load_last(path)


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
    assert torch_files.load(tmp_path / "a.pth") == {"best_acc1": 60.5}
    write(np.zeros(2))
    with pytest.raises(UserError, match="refused"):
        torch_files.load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content", [b"hello\n", b"\x80\x04garbage", os.urandom(1000), b"PK\x03\x04" + bytes(100)]
)
def test_a_file_that_is_no_checkpoint_is_a_user_error(content, tmp_path):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "key, value",
    [
        ("config", 3),
        ("config", {1: 2}),
        ("config", {"lr": torch.zeros(2)}),
        ("step", "3"),
        ("step", -1),
        ("step", True),
        ("step", 10**30),
        ("world", 0),
        ("steps_per_epoch", 0),
        ("batch_size", 1.0),
        ("best", None),
        ("best", {"student_top1": "high"}),
        ("best", {"student_top1": float("nan")}),
        ("best", {1: 2.0}),
        ("split", ("s",)),
        ("split", ("s", 3)),
        ("split", "ab"),
        ("data", b"d"),
        ("classes", []),
        ("classes", ["a", None]),
        ("method", [1]),
        ("method", {3: torch.zeros(1)}),
        ("method", {"w": 3.0}),
        ("optimizer", {1: 2}),
        ("scaler", {"scale": float("inf")}),
        ("meter", []),
        ("bad_images", ["ab"]),
        ("bad_images", [("a", 1)]),
    ],
)
def test_a_value_of_the_wrong_type_is_named(state, key, value, tmp_path):
    state[key] = value
    checkpoint.save(tmp_path / "a.pth", state)
    with pytest.raises(UserError, match=f"no valid '{key}'"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"world": 3, "processes": 2}, "a step of 3 ranks in 2 processes with 8 labeled images each"),
        ({"world": 2**20, "batch_size": 2**20}, "a step of 1048576 ranks"),
        ({1: 2}, "a key is not a string"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(state, change, words, tmp_path):
    checkpoint.save(tmp_path / "a.pth", {**state, **change})
    with pytest.raises(UserError, match=words):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("version", [99, torch.zeros(3), "3", None])
def test_another_format_is_a_user_error(state, version, tmp_path):
    torch.save({**state, "format": version}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth has format .*, but this version reads format 3") as error:
        checkpoint.load(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


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


def test_the_writer_adds_the_score_to_the_state_as_it_was_at_save_or_resume(state, tmp_path):
    paths = tmp_path / "last.pth", tmp_path / "best.pth"
    state |= {"evaluation_due": True, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(10**6)}}}}
    for resumed in (None, state):
        writer = checkpoint.Writer(*paths, "stop", print, resumed=resumed)
        if resumed is None:
            writer.save(state)
        state["optimizer"]["state"][0]["momentum_buffer"].fill_(-1)  # an optimizer may share loaded tensors
        writer.add_score({"step": 3}, best=True)
        writer.close()
        for path in paths:
            saved = checkpoint.load(path)
            assert (saved["optimizer"]["state"][0]["momentum_buffer"] == 1).all()
            assert saved["best"] == {"step": 3} and not saved["evaluation_due"]
            path.unlink()
        state["optimizer"]["state"][0]["momentum_buffer"].fill_(1)


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


def test_what_is_not_a_file_is_a_user_error(tmp_path):
    """A FIFO would be waited for, and a device read without end."""
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "none.pth")
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path, "a directory"), (tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(UserError, match=f"cannot be read: it is {kind}"):
            checkpoint.load(path)


def test_files_of_which_pytorch_warns_are_named_in_one_line(tmp_path, recwarn):
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    scripted.save(tmp_path / "script.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"a": 1}))
    np.savez(tmp_path / "zip.pth", a=np.zeros(3))
    (tmp_path / "zip.pth.npz").rename(tmp_path / "zip.pth")
    torch.save({"sparse": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pth")
    recwarn.clear()
    for name, words in (
        ("script", "is a TorchScript program"),
        ("raw", "is refused: it is a pickle that torch.save did not write"),
        ("zip", "is a zip file, not a PyTorch checkpoint"),
        ("sparse", "is sparse, quantized, or without its data"),
    ):
        with pytest.raises(UserError, match=f"{name}.pth .*{words}"):
            checkpoint.load(tmp_path / f"{name}.pth")
    assert not recwarn.list


def nested(depth):
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**13),
        torch.zeros(3, device="meta"),
        nested(60),
    ],
    ids=["expanded", "meta", "nested"],
)
def test_values_that_could_exhaust_the_memory_are_refused(value, tmp_path):
    torch.save({"x": [value]}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="a.pth is damaged"):
        torch_files.load(tmp_path / "a.pth")


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


def test_a_full_disk_in_torch_save_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write") as error:
        write_atomically(
            tmp_path / "a.pth",
            lambda file: torch_files.write(torch.zeros(9), open("/dev/full", "wb", 0)),
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


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.mul(float("nan")), "fc.weight is not finite"),
        (lambda w: w.div(0), "fc.weight is not finite"),
        (lambda w: w.long(), "fc.weight is int64, not float32"),
        (lambda w: w.to(torch.complex64), "fc.weight is complex64, not float32"),
        (lambda w: w.bool(), "fc.weight is bool, not float32"),
        (lambda w: w.to(torch.float8_e5m2), "fc.weight is float8_e5m2, not float32"),
    ],
)
def test_load_module_refuses_weights_that_are_not_finite_numbers(change, words, tmp_path):
    net = Network("small_encoder", 1, 10, 8)
    values = net.state_dict()
    values["fc.weight"] = change(values["fc.weight"])
    with pytest.raises(UserError, match=f"a.pth is damaged: {words}"):
        checkpoint.load_module(net, values, tmp_path / "a.pth")
    values["fc.weight"] = torch.ones(10, 128, dtype=torch.float16)  # another type of floats is converted
    checkpoint.load_module(net, values, tmp_path / "a.pth")
    values["backbone.1.num_batches_tracked"] = torch.tensor(1.0)
    with pytest.raises(UserError, match="num_batches_tracked is float32, not int64"):
        checkpoint.load_module(net, values, tmp_path / "a.pth")
