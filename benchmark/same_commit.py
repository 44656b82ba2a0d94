"""Whether another checkout computes the same bits: python benchmark/same_commit.py DIR [--only WORD]

It trains every method for a few steps from this checkout and from DIR (`git worktree add DIR COMMIT`), on the
digits, on made-up files in CIFAR's format and on a tree of JPEG files, with one and with two virtual ranks,
on a CPU with one thread, and compares logs and checkpoints bit by bit (benchmark/same_run.py). It also loads
DIR's checkpoints of SimMatch here. A method that DIR does not have is left out. Exit code 0: all runs are the
same; 1: a run differs.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.same_run import difference  # noqa: E402
from tests import trees  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

# Runs train_semi.py on made-up files in CIFAR's format; torchvision's checksums are those of the real files.
START_CIFAR = """
import runpy, sys
from torchvision.datasets import CIFAR10
CIFAR10._check_integrity = lambda self: True
CIFAR10.meta = {**CIFAR10.meta, "md5": None}
sys.path.insert(0, "")
sys.argv = ["train_semi.py", *sys.argv[1:]]
runpy.run_path("train_semi.py", run_name="__main__")
"""
COMMON = "--device cpu --workers 0 --epochs 3 --warmup-epoch 1 --eval-freq 1 --print-freq 3 --seed 1"
DATA = {
    "digits": "--config configs/digits.yaml --batch-size 20 --mu 8",
    "cifar": "--config configs/cifar10_40.yaml --backbone small_encoder --batch-size 4 --mu 4 "
    "--steps-per-epoch 10",
    "jpeg": "--config configs/imagenet_1p.yaml --backbone resnet18_encoder --labels-per-class 2 --cls 3 "
    "--image-size 32 --batch-size 2 --mu 2",
}
METHODS = (
    "--method simmatch",
    "--method simmatch --eman true",
    "--method simmatchv2 --k 4 --topn 6",
    "--method simmatch_single",
    "--method fixmatch",
    "--method fixmatch --eman true",
    "--method supervised",
)


class Case(NamedTuple):
    name: str
    flags: list[str]


def cases(folder: Path, checkout: Path) -> list[Case]:
    """folder: with the made-up files of CIFAR and the tree of JPEG files. checkout: of the methods to run."""
    found = []
    known = (checkout / "models" / "__init__.py").read_text(encoding="utf-8")
    methods = [flags for flags in METHODS if f'"{flags.split()[1]}"' in known]
    for data, more in DATA.items():
        for method in methods:
            for ranks in ("", "--virtual-ranks 2"):
                flags = f"{more} {COMMON} {method} {ranks}".split()
                if data != "digits":
                    flags += ["--data", str(folder / data)]
                found.append(Case(f"{data} {method} {ranks}".strip(), flags))
    return found


def train(checkout: Path, out: Path, flags: Sequence[str]) -> None:
    """Raises UserError if the training fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SIMMATCH_CACHE": str(out.parent / "cache")}
    start = ["-c", START_CIFAR] if any("cifar" in flag for flag in flags) else ["train_semi.py"]
    command = [sys.executable, *start, *flags, "--output-dir", str(out)]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout}: {' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("checkout", type=Path, metavar="DIR", help="another checkout of this repository")
    parser.add_argument("--only", default="", metavar="WORD", help="only the cases whose name has this word")
    args = parser.parse_args()
    if not (args.checkout / "train_semi.py").is_file():
        raise UserError(f"{args.checkout} is not a checkout of this repository: it has no train_semi.py")
    differs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees.cifar10(folder / "cifar")
        trees.imagenet(folder / "jpeg")
        for number, case in enumerate(c for c in cases(folder, args.checkout) if args.only in c.name):
            other, own = folder / f"{number}-other", folder / f"{number}-own"
            train(args.checkout, other, case.flags)
            train(ROOT, own, case.flags)
            found = difference(other, own)
            differs += bool(found)
            print(f"{case.name}: {found or 'the same'}", flush=True)
            if "simmatch" in case.name and not found:
                train(ROOT, other, case.flags)  # its finished run loads here without an error
    print(f"{differs} cases differ" if differs else "all cases are the same, bit by bit")
    sys.exit(1 if differs else 0)


if __name__ == "__main__":
    cli_main(main)
