"""What a run tells: log.jsonl for programs, tb/ for TensorBoard, lines for people. Ranks other than 0 stay
silent.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional, Sequence

from torch.utils.tensorboard import SummaryWriter

from util.errors import UserError

TRAIN_KEYS = ("loss", "loss_x", "loss_u", "loss_in", "mask", "pseudo_acc", "lr", "images_per_s")


def init_output_dir(output_dir: Path, checkpoint_dir: Path, config_yaml: str, new_run: bool) -> list[str]:
    """Make the directories and write config.yaml into the first. Raises UserError if that is not possible.

    anew: nothing is continued; then the log and best.pth of an earlier run that stand there are kept under
    the names that are returned.
    """
    archived = []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        for path in (output_dir / "log.jsonl", output_dir / "best.pth"):
            if new_run and path.exists() and path.stat().st_size:
                aside = next(
                    aside
                    for n in range(1, 10**6)
                    if not (aside := path.with_name(f"{path.name}.old{n}")).exists()
                )
                os.replace(path, aside)
                archived.append(aside.name)
        (output_dir / "config.yaml").write_text(config_yaml, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(output_dir, error) from None
    return archived


def _cannot_write(output_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to output directory {output_dir}: {error.strerror}; choose another one with --output-dir"
    )


class Logger:
    """Events of one run. `start` is the step it continues from: later events of an earlier attempt are
    dropped.
    """

    def __init__(self, output_dir: Path, start: int, total: int, active: bool, buffer_on_error: bool = False):
        """patient: events that cannot be written, as on a full disk, wait in memory, and the run goes on;
        otherwise it stops.
        """
        self.start, self.total, self.active, self.buffer_on_error = start, total, active, buffer_on_error
        self.pending_lines = b""  # what is to be written still: lines of the log
        self.pending_scalars: list[tuple[str, float, int]] = []  # and scalars for TensorBoard
        self.terminal = sys.stdout.isatty()
        self.started: Optional[float] = None  # when the first step of this process was done
        if not active:
            return
        threading.excepthook = _thread_hook
        self.path = output_dir / "log.jsonl"
        try:
            archived = [line for line in _lines(self.path) if json.loads(line)["step"] <= start]
            self.empty = not archived
            temporary = self.path.with_name("log.jsonl.tmp")
            temporary.write_text("".join(archived), encoding="utf-8")
            os.replace(temporary, self.path)
            self.file = open(self.path, "ab", buffering=0)
            self.tb: Optional[SummaryWriter] = SummaryWriter(str(output_dir / "tb"), purge_step=start + 1)
        except OSError as error:
            raise _cannot_write(output_dir, error) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path} is damaged: a line is not one of our events; move the file away"
            ) from None

    def print_line(self, line: str) -> None:
        """A line for people that stays."""
        if self.active:
            print(f"\r\033[K{line}" if self.terminal else line, flush=True)

    def log_start(self, step: int, split: str, sha256: str) -> None:
        """split, sha256: of the labeled images; util.report refuses to compare runs on different ones."""
        if self.active and self.empty:
            self.write("start", step, {"split": split, "sha256": sha256})

    def bad_images(self, step: int, bad: Sequence[tuple[str, str]], fate: str) -> None:
        """bad: (name, cause) of images that could not be used; fate: what became of them."""
        if not bad:
            return
        unique = sorted({(name, cause) for name, cause in bad})
        self.write(
            "bad_images", step, {"fate": fate, "count": len(bad), "images": [list(pair) for pair in unique]}
        )
        self.print_line(f"{len(unique)} bad images were {fate} ({len(bad)} times):")
        for name, cause in unique[:20]:
            self.print_line(f"  {name}: {cause}")
        if len(unique) > 20:
            self.print_line(f"  and {len(unique) - 20} more, in {self.path}")

    def train(self, step: int, epoch: int, epochs: int, values: dict[str, float]) -> None:
        """step: steps done; epoch: the one in progress, from 1; values: TRAIN_KEYS, as far as the method has
        them.
        """
        values = {key: values.get(key) for key in TRAIN_KEYS}
        self.write("train", step, {"epoch": epoch, **values})
        if not self.active:
            return
        terms = " ".join(f"{key[5:]} {values[key]:.3f}" for key in TRAIN_KEYS[1:4] if values[key] is not None)
        line = f"epoch {epoch}/{epochs}  step {step}/{self.total}  loss {values['loss']:.3f} ({terms})"
        if values["mask"] is not None:
            line += f"  mask {values['mask']:.2f}"
        if values["pseudo_acc"] is not None:
            line += f"  pseudo_acc {values['pseudo_acc']:.3f}"
        line += f"  lr {values['lr']:.4f}  {values['images_per_s']:,.0f} images/s  ETA {self._eta(step)}"
        if self.terminal:
            print(f"\r\033[K{line[: os.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def eval(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """values: student_top1, student_top5, teacher_top1, teacher_top5, in percent."""
        self.write("eval", step, values)
        self.print_line(
            f"epoch {epoch}  student {values['student_top1']:.3f} / {values['student_top5']:.3f}  "
            f"teacher {values['teacher_top1']:.3f} / {values['teacher_top5']:.3f}  (top-1 / top-5 %)"
        )

    def close(self) -> None:
        """Raises UserError if there are events that could not be written."""
        if not self.active:
            return
        self.buffer_on_error = False
        self._flush()
        self.file.close()
        if self.tb is not None:
            self.tb.close()

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """values: of JSON, and finite."""
        if not self.active:
            return
        self.pending_lines += (
            json.dumps({"event": event, "step": step, **values}, allow_nan=False).encode() + b"\n"
        )
        self.pending_scalars += [
            (f"{event}/{key}", value, step)
            for key, value in values.items()
            if isinstance(value, (int, float))
        ]
        if not self._flush():
            return
        try:
            self.tb = self.tb or SummaryWriter(str(self.path.parent / "tb"))
            for scalar in self.pending_scalars:
                self.tb.add_scalar(*scalar)
            self.tb.flush()
            self.pending_scalars.clear()
        except OSError as error:  # the writer's thread is gone with it; the next event tries a new one
            self.tb = None
            if not self.buffer_on_error:
                raise UserError(
                    f"cannot write {self.path.parent / 'tb'}: {error.strerror}; the checkpoints are intact"
                ) from None

    def _flush(self) -> bool:
        """Whether all events are written."""
        try:
            while self.pending_lines:
                self.pending_lines = self.pending_lines[self.file.write(self.pending_lines) :]
            return True
        except OSError as error:
            if not self.buffer_on_error:
                raise UserError(
                    f"cannot write {self.path}: {error.strerror}; the checkpoints are intact"
                ) from None
            self.print_line(
                f"cannot write {self.path}: {error.strerror}; {len(self.pending_lines)} bytes wait in memory"
            )
            return False

    def _eta(self, step: int) -> str:
        now = time.monotonic()
        if self.started is None:
            self.started, self.start = now, step
            return "?"
        seconds = round((self.total - step) * (now - self.started) / (step - self.start))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _thread_hook(args: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread that dies of a full disk, loudly; the same error comes out of the next
    flush.
    """
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _lines(path: Path) -> list[str]:
    """Complete lines of a log; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    return [
        line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
