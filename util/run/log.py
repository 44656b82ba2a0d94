"""The log of a run: log.jsonl for programs, tb/ for TensorBoard, lines for people. Only rank 0 writes and
prints.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from util.errors import UserError, printable
from util.files import special_file, write_atomically
from util.run.output_dir import cannot_write

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

REPLACED = "replaced by others in this epoch"  # the fate of a training image that cannot be read
LEFT_OUT = "left out of testing"  # the fate of a test image that cannot be read


class Logger:
    """Writes the events of one run. Events after the step `start` that it resumes from are dropped from
    log.jsonl.
    """

    def __init__(
        self,
        output_dir: Path,
        start: int,
        total: int,
        active: bool,
        on_error: str = "stop",
        evaluation_due: bool = False,
    ):
        """total: steps of the run. active: whether this is rank 0. evaluation_due: whether the run evaluates
        step `start` again, whose evaluation did not end; its events are dropped, too.

        on_error: if events cannot be written, as on a full disk: `stop` raises UserError, `continue` keeps
        them in memory.
        """
        self.total, self.active, self.buffer_on_error = total, active, on_error == "continue"
        self.pending_lines = b""  # not yet written to log.jsonl
        self.pending_scalars: list[tuple[str, float, int]] = []  # not yet written to tb/
        self.terminal = sys.stdout.isatty()
        self.first_train_event: tuple[float, int] | None = None  # (time, step) of this process, for the ETA
        self.tb: SummaryWriter | None = None
        # TensorBoard drops what an earlier attempt has written to tb/ from this step on.
        self.purge_step: int | None = start + 1
        if not active:
            return
        threading.excepthook = _ignore_disk_errors
        self.path = output_dir / "log.jsonl"
        try:
            kept = []
            for line in _complete_lines(self.path):
                event = json.loads(line)
                of_evaluation = event["event"] == "eval" or event.get("fate") == LEFT_OUT
                repeated = evaluation_due and event["step"] == start and of_evaluation
                if event["step"] <= start and not repeated:
                    kept.append(line)
            self.empty = not kept
            write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
            self.file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise cannot_write(output_dir, error) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.path} is damaged: a line is not one of our events; move the file away"
            ) from None

    def print_line(self, line: str) -> None:
        """Print a line that stays on the terminal."""
        if self.active:
            print(f"\r\033[K{line}" if self.terminal else line, flush=True)

    def log_start(self, step: int, split: str, sha256: str) -> None:
        """Write the start event, unless the log has one. split, sha256: of the labeled images; util.report
        refuses to compare runs on different splits.
        """
        if self.active and self.empty:
            self.write("start", step, {"split": split, "sha256": sha256})

    def bad_images(self, step: int, bad: Sequence[tuple[str, str]], fate: str) -> None:
        """Write and print a bad_images event, if there are any. bad: (name, cause) of unreadable images.
        fate: what was done with them, to complete "images were …".
        """
        if not bad:
            return
        unique = sorted({(name, cause) for name, cause in bad})
        images = [list(pair) for pair in unique]
        self.write("bad_images", step, {"fate": fate, "count": len(bad), "images": images})
        self.print_line(f"{len(unique)} bad images were {fate} ({len(bad)} times):")
        for name, cause in unique[:20]:
            self.print_line(printable(f"  {name}: {cause}"))
        if len(unique) > 20:
            self.print_line(f"  and {len(unique) - 20} more, in {self.path}")

    def train(self, step: int, epoch: int, epochs: int, values: dict[str, float | None]) -> None:
        """Write and print a train event. step: finished steps. epoch: the current one, from 1.

        values: `loss`, `lr`, `images_per_s`, the method's terms `loss_*` in the order of the log, and `mask`
        and `pseudo_acc` if it has them. None is written as null and not printed. In fp16 also `skipped`.
        """
        terms = [key for key in values if key.startswith("loss_")]
        keys = ["loss", *terms, "mask", "pseudo_acc", "lr", "images_per_s", *({"skipped"} & values.keys())]
        self.write("train", step, {"epoch": epoch, **{key: values.get(key) for key in keys}})
        if not self.active:
            return
        means = {key: value for key, value in values.items() if value is not None}
        losses = " ".join(f"{key[5:]} {means[key]:.3f}" for key in terms if key in means)
        line = f"epoch {epoch}/{epochs}  step {step}/{self.total}  loss {means['loss']:.3f} ({losses})"
        line += f"  mask {means['mask']:.2f}" if "mask" in means else ""
        line += f"  pseudo_acc {means['pseudo_acc']:.3f}" if "pseudo_acc" in means else ""
        line += f"  {means['skipped']} steps skipped" if means.get("skipped") else ""
        line += f"  lr {means['lr']:.4f}  {means['images_per_s']:,.0f} images/s  ETA {self._eta(step)}"
        if self.terminal:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def eval(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Write and print an eval event. values: student_top1, student_top5, teacher_top1, teacher_top5, in
        percent.
        """
        self.write("eval", step, values)
        self.print_line(
            f"epoch {epoch}  student {values['student_top1']:.3f} / {values['student_top5']:.3f}  "
            f"teacher {values['teacher_top1']:.3f} / {values['teacher_top5']:.3f}  (top-1 / top-5 %)"
        )

    def close(self) -> None:
        """Write what is pending and close the files. Raises UserError if that is not possible."""
        if not self.active:
            return
        self.buffer_on_error = False
        self._flush()
        self.file.close()
        if self.tb is not None:
            self.tb.close()

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Write an event to log.jsonl, and its numbers to tb/. values: JSON values with finite numbers."""
        if not self.active:
            return
        line = json.dumps({"event": event, "step": step, **values}, allow_nan=False)
        self.pending_lines += line.encode() + b"\n"
        scalars = [(key, value) for key, value in values.items() if isinstance(value, (int, float))]
        self.pending_scalars += [(f"{event}/{key}", value, step) for key, value in scalars]
        self._flush()

    def _flush(self) -> None:
        """Write what is pending to log.jsonl, and then to tb/."""
        path = self.path
        try:
            while self.pending_lines:
                self.pending_lines = self.pending_lines[self.file.write(self.pending_lines) :]
            path = self.path.with_name("tb")
            if self.pending_scalars:
                self._write_scalars(path)
        except OSError as error:
            if not self.buffer_on_error:
                raise UserError(
                    f"cannot write {path}: {error.strerror}; the checkpoints are intact"
                ) from None
            if self.pending_lines:
                waiting = f"{len(self.pending_lines)} bytes wait in memory"
                self.print_line(f"cannot write {path}: {error.strerror}; {waiting}")

    def _write_scalars(self, folder: Path) -> None:
        # Imported here: it takes half a second, and the first lines of a run should not wait for it.
        from torch.utils.tensorboard import SummaryWriter

        # After an error a writer's thread has ended; then the next event makes a new one.
        tb, self.tb = self.tb or SummaryWriter(str(folder), purge_step=self.purge_step), None
        self.purge_step = None
        for scalar in self.pending_scalars:
            tb.add_scalar(*scalar)
        tb.flush()
        self.pending_scalars.clear()
        self.tb = tb

    def _eta(self, step: int) -> str:
        now = time.monotonic()
        if self.first_train_event is None:
            self.first_train_event = now, step
            return "?"
        first_time, first_step = self.first_train_event
        seconds = round((self.total - step) * (now - first_time) / (step - first_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _ignore_disk_errors(args: threading.ExceptHookArgs) -> None:
    """On a full disk TensorBoard's thread prints a traceback; the next flush raises the same error."""
    if not isinstance(args.exc_value, OSError):
        threading.__excepthook__(args)


def _complete_lines(path: Path) -> list[str]:
    """Return the complete lines of a log; a crash may have cut the last one short."""
    if not path.exists():
        return []
    if special := special_file(path):
        raise UserError(f"{path} is {special}, not a log: move it away")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]
