"""Runs the mistakes of docs/MISTAKES.md. `python tests/mistakes.py` writes into it what each prints."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:0] = [str(ROOT), str(ROOT / "tests")]

import fork_server  # noqa: E402
import torch  # noqa: E402
from trees import imagenet  # noqa: E402

from util.run import checkpoint  # noqa: E402

TABLE = ROOT / "docs" / "MISTAKES.md"
ROW = re.compile(r"^\| `(?P<command>[^`]*)` \| (?P<printed>.*) \|$", re.M)
FINISHED = "--config configs/digits.yaml --epochs 1 --steps-per-epoch 2 --workers 0 --output-dir run".split()

OWN = {"data": "photos", "labels_per_class": 2, "workers": 0}
OWN |= {"backbone": "small_encoder", "batch_size": 6, "mu": 2}


def rows() -> list[tuple[str, str]]:
    """The rows of the table: (shell command, what it prints)."""
    table = [match.group("command", "printed") for match in ROW.finditer(TABLE.read_text(encoding="utf-8"))]
    return [(command.replace("\\|", "|"), printed.replace("\\|", "|")) for command, printed in table]


def prepare(folder: Path) -> None:
    """Make a folder in which the commands run: the programs, and the files that the table's head names."""
    for name in ("train_semi.py", "eval.py", "models", "dataset", "util", "configs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    imagenet(folder / "photos", train=12, val=10)
    imagenet(folder / "flat", classes=1, train=2)
    (folder / "empty").mkdir()
    text = (ROOT / "configs" / "folder.yaml").read_text(encoding="utf-8")
    for name, value in OWN.items():
        text = re.sub(rf"(?m)^{name}:.*$\n", "", text) + f"{name}: {value}\n"
    (folder / "own.yaml").write_text(text, encoding="utf-8")
    done = fork_server.run(["train_semi.py", *FINISHED], cwd=folder, env=environment(folder))
    assert done.returncode == 0, done.stderr
    spoil(folder / "run" / "last.pth", folder)


def spoil(path: Path, folder: Path) -> None:
    """Write the spoiled checkpoints that the table names, made from the one at `path`."""

    def save(name: str, **changed: object) -> None:
        state = {**torch.load(path, weights_only=True), **changed}
        state.pop("sha256")
        state["sha256"] = checkpoint.digest({k: v for k, v in state.items() if k != "format"})
        torch.save(state, folder / name)

    state = torch.load(path, weights_only=True)
    (folder / "cut.pth").write_bytes(path.read_bytes()[:5000])
    save(
        "nan.pth",
        method={**state["method"], "student.fc.bias": state["method"]["student.fc.bias"] * torch.nan},
    )
    save("integers.pth", method={key: value.long() for key, value in state["method"].items()})
    save("split.pth", split=("digits",))
    save("huge.pth", config={**state["config"], "dim": 10**13})
    save("keys.pth", config={**state["config"], 5: 5})
    torch.save({"format": 99}, folder / "format.pth")
    torch.save(
        {"state_dict": {"encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}, "arch": "resnet50"},
        folder / "moco.pth",
    )
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), folder / "script.pth")
    (folder / "pickle.pth").write_bytes(
        b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."
    )
    with zipfile.ZipFile(folder / "zip.pth", "w") as file:
        file.writestr("a.txt", "not a checkpoint")


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "SIMMATCH_CACHE": str(folder / "cache"), "COLUMNS": "100"}


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run a row's command in `folder`. Returns its exit code and what it prints on stderr, in one string.

    The words before the program prepare files (up to &&) and set environment variables.
    """
    setup, _, last = command.rpartition("&& ")
    if setup:
        subprocess.run(["bash", "-ec", setup.strip().removesuffix("&&")], cwd=folder, check=True)
    words = shlex.split(last)
    env = environment(folder)
    while words[0] != "python":
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    process = fork_server.popen(
        words[1:], cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    _, err = process.communicate(timeout=60)
    return process.returncode, err.strip("\n").replace(str(folder), "…")


def main() -> None:
    text = TABLE.read_text(encoding="utf-8")
    for command, printed in rows():
        with tempfile.TemporaryDirectory() as top:
            folder = Path(shutil.copytree(template(), Path(top, "w"), symlinks=True))
            code, err = run(command, folder)
        flat = err.replace("|", "\\|")
        if code != 2 or not err.startswith("error: ") or "\n" in err:
            print(f"{command}\n  exit code {code}: {err[-800:]}\n", flush=True)
            flat = flat.splitlines()[-1] if flat else ""
        line = command.replace("|", "\\|")
        old = f"| `{line}` | {printed.replace('|', chr(92) + '|')} |"
        assert old in text, old
        text = text.replace(old, f"| `{line}` | {flat.removeprefix('error: ')} |")
    TABLE.write_text(text, encoding="utf-8")


_template: list[tempfile.TemporaryDirectory] = []


def template() -> Path:
    """A folder as `prepare` makes it, for copies."""
    if not _template:
        _template.append(tempfile.TemporaryDirectory())
        prepare(Path(_template[0].name))
    return Path(_template[0].name)


if __name__ == "__main__":
    main()
