"""Random bad input for every program: python tests/random_input.py [--minutes 20] [--seed 0]

Each case takes a command that works and spoils it: a flag, the text of a config file, or the bytes or the
content of a file that the command reads. The command may work all the same. Otherwise it must end in one line
that begins with "error: ", with exit code 2, and in time. Case N of a seed is always the same one.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[0:0] = [str(ROOT), str(ROOT / "tests")]

import fork_server  # noqa: E402
import torch  # noqa: E402
from trees import imagenet  # noqa: E402

from util.config import FIELDS  # noqa: E402
from util.run import checkpoint  # noqa: E402

SECONDS = 60  # after which a case that says nothing hangs
MEMORY = 8 << 30  # bytes of address space of a case
FOUND = {"util.doctor": 1, "dataset.check": 1}  # exit codes that mean a result and not an error
VALUES = [
    *[
        "",
        " ",
        "-1",
        "0",
        "1",
        "2",
        "3.5",
        "-0.0",
        "1e400",
        "nan",
        "inf",
        "-inf",
        "1e-320",
        "0x10",
        "0123",
        "1:30",
    ],
    *[
        "1_000",
        "99999999999999999999",
        "9" * 400,
        "true",
        "null",
        "[]",
        "[1]",
        "{}",
        "~",
        "~nobody",
        "..",
        "/",
    ],
    *[
        "a" * 5000,
        "é",
        "\udcff",
        "\n",
        "a\nb",
        "=cmd",
        "-",
        "--",
        "%s",
        "{0}",
        "$HOME",
        "/dev/null",
        "/dev/zero",
    ],
    *[
        "/proc/self/mem",
        "README.md",
        "configs",
        "auto",
        "cpu",
        "cuda",
        "bf16",
        "simmatch",
        "small_encoder",
        "digits",
    ],
    *[
        "folder",
        "imagenet",
        "cifar10",
        "fixmatch",
        "supervised",
        "stop",
        "skip",
        "continue",
        "1e9",
        "65536",
        "1e5",
    ],
]
YAML = [
    *[
        "key: &a [*a]",
        "seed: *x",
        "seed: 1\nseed: 2",
        "seed: !!python/object:os.system x",
        "? [1]\n: 2",
        "\t- x",
    ],
    *[
        "[" * 3000,
        "{a: " * 3000,
        "seed: 0123",
        "lr: 1:30",
        "seed: 2024-01-01",
        "lr: .inf",
        "lr: 1e-4",
        "\x00",
        "\ufeff",
    ],
    *[
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c]",
        "- 1",
        "5",
    ],
    *[
        "DA: yes",
        "method: [simmatch]",
        "schedule: 1",
        "schedule: [a]",
        "1: 2",
        "null: 3",
        "<<: {seed: 1}",
        "%YAML 9.9",
    ],
]


class Case(NamedTuple):
    args: list[str]
    what: str  # what was spoiled


class Inputs:
    """Files that every program can read, and the commands that read them."""

    def __init__(self, folder: Path):
        self.folder, self.run, self.photos = folder, folder / "run", imagenet(folder / "photos")
        start = [
            "train_semi.py",
            "--config",
            ROOT / "configs" / "digits.yaml",
            "--workers",
            "0",
            "--print-freq",
            "1",
        ]
        self.short = [
            "--steps-per-epoch",
            "2",
            "--epochs",
            "1",
            "--eval-freq",
            "1",
            "--batch-size",
            "2",
            "--mu",
            "2",
        ]
        done = fork_server.run([*start, *self.short, "--output-dir", self.run], cwd=ROOT)
        assert done.returncode == 0, done.stderr
        self.train = [*start, *self.short]
        self.list = folder / "list.txt"
        self.list.write_text(
            "".join(f"n0000000{c}/n0000000{c}_{k}.JPEG\n" for c in range(3) for k in range(2))
        )
        small = [
            "--config",
            ROOT / "configs" / "folder.yaml",
            "--backbone",
            "small_encoder",
            "--image-size",
            "32",
        ]
        self.train_photos = [
            *["train_semi.py", *small, "--workers", "0", "--print-freq", "1", "--data", self.photos],
            *[
                "--labels-per-class",
                "2",
                "--epochs",
                "1",
                "--warmup-epoch",
                "0",
                "--batch-size",
                "2",
                "--mu",
                "2",
            ],
        ]


def spoil_flag(rng: random.Random, inputs: Inputs, folder: Path) -> Case:
    """A command line with one to three random flags."""
    program = rng.choice(["digits", "digits", "photos", "eval", "check", "splits", "doctor", "report"])
    if program in ("digits", "photos", "check"):
        names = [rng.choice(sorted(FIELDS)) for _ in range(rng.randint(1, 3))]
        flags = [word for name in names for word in (f"--{name.replace('_', '-')}", rng.choice(VALUES))]
        if rng.random() < 0.1:
            flags.append(
                rng.choice(["--lernrate", "--", "-x", "--config", "--debug=1", "extra", "--da-len=", "-b"])
            )
        if program == "check":
            config = [
                "-m",
                "dataset.check",
                str(ROOT / "configs" / "folder.yaml"),
                "--data",
                str(inputs.photos),
            ]
            return Case([*config, *flags], str(flags))
        base = inputs.train if program == "digits" else inputs.train_photos
        return Case([*map(str, base), "--output-dir", str(folder / "out"), *flags], str(flags))
    value, last = rng.choice(VALUES), str(inputs.run / "last.pth")
    args = {
        "eval": ["eval.py", "--checkpoint", last, rng.choice(EVAL_FLAGS), value],
        "splits": [
            "-m",
            "dataset.splits",
            rng.choice(["list", "make", "describe", "x"]),
            value,
            "--per-class",
            value,
        ],
        "doctor": ["-m", "util.doctor", value],
        "report": ["-m", "util.report", str(inputs.run), "--curves", value],
    }[program]
    if program == "eval" and "--predict" in args:
        args += ["--output", str(folder / "predictions.csv")]
    if program == "eval" and rng.random() < 0.2:
        args[2] = value
    return Case(args, str(args[1:]))


EVAL_FLAGS = [
    f"--{name}" for name in "predict export format device data val workers image-size output".split()
]


def spoil_yaml(rng: random.Random, inputs: Inputs, folder: Path) -> Case:
    """A config file with a line that was changed, or one more line."""
    lines = (ROOT / "configs" / rng.choice(["digits.yaml", "folder.yaml"])).read_text().splitlines()
    where = rng.randrange(len(lines))
    kind = rng.choice(["insert", "value", "cut", "bytes"])
    if kind == "insert":
        lines.insert(where, rng.choice(YAML))
    elif kind == "value":
        lines[where] = f"{rng.choice(sorted(FIELDS))}: {rng.choice(VALUES)}"
    text = "\n".join(lines).encode(errors="surrogateescape")
    if kind == "cut":
        text = text[: rng.randrange(len(text))]
    elif kind == "bytes":
        text = flip(rng, text)
    (folder / "c.yaml").write_bytes(text)
    config = [str(folder / "c.yaml"), "--data", str(inputs.photos)]
    if rng.random() < 0.3:
        return Case(["-m", "dataset.check", *config], f"{kind}: {lines[where]!r}")
    flags = [*inputs.short, "--warmup-epoch", "0", "--workers", "0", "--backbone", "small_encoder"]
    flags += [
        "--output-dir",
        str(folder / "out"),
        *(["--image-size", "32"] * ("folder" in text.decode("latin1"))),
    ]
    return Case(["train_semi.py", "--config", *config, *flags], f"{kind}: {lines[where]!r}")


def spoil_file(rng: random.Random, inputs: Inputs, folder: Path) -> Case:
    """A file whose bytes were changed, or that is no file at all."""
    run = Path(shutil.copytree(inputs.run, folder / "run"))
    shutil.copy(inputs.list, folder / "list.txt")
    path, args = rng.choice(
        [
            (run / "last.pth", ["eval.py", "--checkpoint", run / "last.pth"]),
            (run / "last.pth", [*inputs.train, "--output-dir", run]),
            (run / "config.yaml", ["-m", "util.doctor", run]),
            (run / "log.jsonl", ["-m", "util.doctor", run]),
            (run / "log.jsonl", ["-m", "util.report", run]),
            (run / "log.jsonl", [*inputs.train, "--output-dir", run]),
            (
                folder / "list.txt",
                [*inputs.train_photos, "--output-dir", folder / "out", "--split", folder / "list.txt"],
            ),
        ]
    )
    if "--split" in args:
        args = [word for word in args if word not in ("--labels-per-class",)]
        args.remove("2")
    content = path.read_bytes()
    kind = rng.choice(["flip", "cut", "zeros", "double", "fifo", "folder", "gone", "empty"])
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        at = rng.randrange(len(content))
        spoiled = {
            "flip": flip(rng, content),
            "cut": content[:at],
            "zeros": content[:at] + bytes(len(content[at : at + 4096])) + content[at + 4096 :],
            "double": content + content,
            "empty": b"",
        }[kind]
        path.write_bytes(spoiled)
    return Case([str(word) for word in args], f"{kind} {path.name}")


def flip(rng: random.Random, content: bytes) -> bytes:
    spoiled = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 30])):
        spoiled[rng.randrange(len(spoiled))] = rng.randrange(256)
    return bytes(spoiled)


def spoil_content(rng: random.Random, inputs: Inputs, folder: Path) -> Case:
    """A checkpoint or a log with one value of another kind; the checksum of the checkpoint is right."""
    run = Path(shutil.copytree(inputs.run, folder / "run"))
    if rng.random() < 0.4:
        lines = (run / "log.jsonl").read_text().splitlines()
        at = rng.randrange(len(lines))
        event = json.loads(lines[at])
        where = change(rng, event, "event")
        lines[at] = json.dumps(event)
        (run / "log.jsonl").write_text("\n".join(lines) + "\n")
        program = rng.choice(
            [["-m", "util.doctor", run], ["-m", "util.report", run], [*inputs.train, "--output-dir", run]]
        )
    else:
        state = torch.load(run / "last.pth", weights_only=True)
        where = change(rng, state, "state")
        state.pop("sha256", None)
        format = state.pop("format", checkpoint.FORMAT)
        try:
            sha256 = checkpoint.digest(state)
        except RuntimeError:  # a sparse tensor
            sha256 = ""
        torch.save({**state, "format": format, "sha256": sha256}, run / "last.pth")
        evaluate = ["eval.py", "--checkpoint", run / "last.pth"]
        export = [
            *evaluate,
            "--export",
            folder / "new.pth",
            "--format",
            rng.choice(["published", "torchvision", "timm"]),
        ]
        predict = [
            *evaluate,
            "--predict",
            inputs.photos / "val",
            "--output",
            folder / "p.csv",
            "--workers",
            "0",
        ]
        program = rng.choice([evaluate, export, predict, [*inputs.train, "--output-dir", run]])
    return Case([str(word) for word in program], where)


def change(rng: random.Random, value: Any, where: str) -> str:
    """Change a random part of a nested value in place. Returns its name."""
    while True:
        key = rng.choice(sorted(value, key=str)) if isinstance(value, dict) else rng.randrange(len(value))
        where += f"[{key!r}]"
        part = value[key]
        if isinstance(part, (dict, list)) and part and rng.random() < 0.8:
            value = part
            continue
        new = replacements(part)
        number = rng.randrange(len(new) + 1)
        if number == len(new) and isinstance(value, dict):
            del value[key]
            return f"{where} is deleted"
        value[key] = new[number % len(new)]
        return f"{where} = {str(value[key])[:60]!r}"


def replacements(part: Any) -> list[Any]:
    new = [None, -1, 10**13, "x", [], {}, math.nan, True, [part], {1: part}, "a\nb", 2**70]
    if isinstance(part, torch.Tensor):
        new += [part * math.nan, part.long(), part.flatten(), part.double(), part[None]]
        new += [part[:0], part.to_sparse()] if part.ndim else []
    return new


KINDS = (spoil_flag, spoil_yaml, spoil_file, spoil_content)


def make(seed: int, number: int, inputs: Inputs, folder: Path) -> Case:
    """Return a case, which runs in `folder`, because it may write a file of any name there."""
    for name in ("train_semi.py", "eval.py", "models", "dataset", "util", "configs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    rng = random.Random(f"{seed} {number}")
    return rng.choice(KINDS)(rng, inputs, folder)


def run(case: Case, folder: Path) -> str:
    """Run a case. Returns what is wrong with its end, or ""."""
    try:
        process = fork_server.popen(
            case.args,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SIMMATCH_CACHE": str(folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    except ValueError:  # no command line can have it, such as one with a NUL
        return ""
    resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return "it hangs"
    return verdict(case.args, process.returncode, err)


def verdict(args: list[str], code: int, err: str) -> str:
    program = args[1] if args[0] == "-m" else args[0]
    if "Traceback" in err or "this is a bug" in err:
        return f"traceback: {err}"
    if code == 2:
        return "" if err.startswith("error: ") and err.count("\n") == 1 else f"more than an error line: {err}"
    if code in (0, FOUND.get(program, 0)):
        quiet = err == "" or program == "dataset.check"  # which shows its progress there
        return "" if quiet else f"works, but says: {err}"
    return f"exit code {code}: {err}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    end, number, bad = time.monotonic() + 60 * args.minutes, args.first, 0
    with tempfile.TemporaryDirectory() as top:
        inputs = Inputs(Path(top))
        while time.monotonic() < end:
            folder = Path(tempfile.mkdtemp(dir=top))
            case = make(args.seed, number, inputs, folder)
            wrong = run(case, folder)
            if wrong:
                bad += 1
                print(
                    f"case {number}: {case.what[:300]}\n  {' '.join(case.args)[:1000]!r}\n  {wrong[-1500:]}",
                    flush=True,
                )
            shutil.rmtree(folder)
            number += 1
    print(f"{number - args.first} cases, {bad} of them bad")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
