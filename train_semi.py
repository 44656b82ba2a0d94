"""Train SimMatch, SimMatchV2 or a baseline: python train_semi.py --config configs/digits.yaml
[--field value …]
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from util.config import MAY_CHANGE_ON_RESUME, Config, defaults_of, parse, to_dict, to_yaml
from util.errors import UserError, cli_main, start_program
from util.files import user_path
from util.run import preempt

if __name__ == "__main__":
    # Importing PyTorch takes seconds. A signal meanwhile must not end the run.
    preempt.catch_signals()
    start_program(lambda: parse(sys.argv[1:], __doc__), output_may_be_lost=True)

import torch
from torch import Tensor

from dataset.bank_age import bank_row_ages
from dataset.build import build_data, check_output_dirs
from dataset.eval_loader import EvalLoader
from dataset.findings import start_warnings
from dataset.loader import Data, HostBatch, Stream, to_device
from dataset.workers import PrefetchLoader, check_shared_memory
from eval import OVERRIDES, evaluate_checkpoint
from models import (
    Batch,
    build_method,
    build_optimizer,
    configure_execution,
    diagnose,
    split_virtual_ranks,
    train_step,
)
from util import dist_utils
from util.inspect.diagnostics import diagnostics_event, log_stop_reason
from util.run import checkpoint
from util.run.cadence import Throughput, due_after
from util.run.lock import RunLock
from util.run.log import LEFT_OUT, REPLACED, Logger
from util.run.memory import check_memory, memory_of
from util.run.metrics import Meter, accuracies
from util.run.output_dir import best_checkpoint, init_output_dir, last_checkpoint
from util.run.ranks import RankLayout, plan_ranks, plan_ranks_on_resume
from util.run.resume import (
    check_moco_path,
    is_published,
    load_last,
    resume,
    resume_published,
    start_from_moco,
)
from util.run.schedule import learning_rate
from util.run.train_state import BadImages, RunIdentity, TrainState


class Run(NamedTuple):
    """What stays the same during a run."""

    identity: RunIdentity
    data: Data
    stream: Stream
    device: torch.device
    last: Path  # the checkpoint from which the run resumes
    total: int  # steps

    @property
    def config(self) -> Config:
        return self.identity.config


def main() -> None:
    config = parse(sys.argv[1:], __doc__)
    device = dist_utils.dist_init(config.device, config.timeout_minutes, config.port)
    out, last = user_path(config.output_dir), last_checkpoint(config)
    if config.evaluate:
        preempt.restore_default_handlers()
        evaluate_checkpoint(last, overrides(config))
        return
    check_output_dirs(config, out, last.parent)
    locked = [out / "lock", *([last.with_name(f"{last.name}.lock")] * bool(config.checkpoint))]
    lock = dist_utils.on_rank_0(lambda: RunLock(locked, print))
    with lock or nullcontext():
        train(config, device, out, last, may_write=lock.check if lock else lambda: None)


def train(config: Config, device: torch.device, out: Path, last: Path, may_write: Callable[[], None]) -> None:
    """Train until all epochs are done or a signal asks the run to stop.

    out: the output directory. last: the path of last.pth. may_write: raises UserError if another start has
    taken over the output directory.
    """
    # Where to start. The order matters:
    # 1. The last checkpoint decides how many ranks a step has, and the ranks which images a process loads.
    found, load_warning = load_last(last)
    warnings = [load_warning]
    if found:
        config.moco_path = check_moco_path(last, found, config.moco_path)
    saved = found if found and not is_published(found) else None
    ranks = plan_ranks(config.batch_size, config.virtual_ranks, dist_utils.world_size())
    if saved:
        ranks, warning = plan_ranks_on_resume(ranks, config.virtual_ranks, config.other_ranks, saved)
        warnings.append(warning)
    # 2. The data decide the number of classes, of steps and of bank rows.
    data, stream = open_data(config, ranks, device)
    fingerprint = data.fingerprint()
    identity = RunIdentity(config, ranks, stream.steps_per_epoch, data.split, data.classes, fingerprint)
    run = Run(identity, data, stream, device, last, config.epochs * stream.steps_per_epoch)
    # 3. Every run is built as a new one, so that a resumed run has the same random numbers ...
    state = new_state(run)
    # 4. ... and is then given the state of this run's checkpoint, else of a published one, else of MoCo's.
    if saved:
        resume(last, saved, identity, state)
    elif found:
        warnings += resume_published(last, found, identity, state)
    elif config.moco_path:
        start_from_moco(Path(config.moco_path), state.method.student, state.method.teacher.net)
    elif config.start_epoch:
        raise UserError(
            f"there is no checkpoint {last} to start epoch {config.start_epoch} from: "
            "a new run starts at epoch 0"
        )
    start = state.step
    if start > run.total:
        finished = start // stream.steps_per_epoch
        raise UserError(f"{config.epochs} epochs are fewer than the {finished} that are done: raise --epochs")
    check_same_start(identity, start)

    # The output directory, the log and the checkpoint writer. Before this point no file of an earlier run
    # changes, so that a refused start leaves it intact.
    best = best_checkpoint(config, last)
    if config.checkpoint and found is None:
        warnings.append(f"{last} does not exist: a new run starts and writes it")
    if dist_utils.rank() == 0:
        warnings.append(init_output_dir(out, last.parent, best, to_yaml(config), new_run=found is None))
        warnings += start_warnings(config, data, stream.steps_per_epoch) if start == 0 else []
    log = Logger(out, start, run.total, dist_utils.rank() == 0, config.on_save_error, state.evaluation_due)
    describe_run(run, state, log, warnings)
    writer = checkpoint.Writer(
        last, best, config.on_save_error, log.print_line, not load_warning, saved, may_write
    )

    # The steps.
    stopped = train_steps(run, state, log, writer)
    writer.close()
    if stopped:
        log.print_line(f"asked to stop: saved step {state.step} in {last}; the same command continues")
    elif state.best["step"]:
        top1, step = f"{state.best['student_top1']:.3f} %", state.best["step"]
        log.print_line(
            f"done: best student top-1 {top1} at step {step}, chosen on the test images, in {best}"
        )
    log.close()
    dist_utils.dist_end()
    if stopped:
        sys.exit(preempt.REQUEUE_EXIT_CODE)


def train_steps(run: Run, state: TrainState, log: Logger, writer: checkpoint.Writer) -> bool:
    """Take the steps that are left. Return True if a signal has asked the run to stop before: its state is
    saved then.
    """
    config, ranks, stream, method = run.config, run.identity.ranks, run.stream, state.method
    configure_execution(method, config.precision, config.channels_last, config.compile)
    student = dist_utils.wrap_ddp(method.student)
    workers = config.workers if state.step < run.total or state.evaluation_due else 0
    steps, pin_memory = range(state.step, run.total), run.device.type == "cuda"
    loader = PrefetchLoader(stream, steps, workers, pin_memory, stream.item_bytes())
    eval_loader = EvalLoader(run.data, dist_utils.rank(), ranks.processes, workers, run.device)
    if warning := check_shared_memory():
        log.print_line(warning)
    if state.evaluation_due and not evaluate_state(run, state, eval_loader, log, writer):
        return True
    throughput = Throughput((stream.n_x + stream.n_u) * ranks.processes, state.step)
    last_save = time.monotonic()

    dist_utils.begin_phase(f"step {state.step}: data")
    for step, host_batch in enumerate(loader, state.step):
        # The learning rate, the images, and what is due after this step.
        dist_utils.begin_phase(f"step {step}: forward and backward")
        state.bad_images.add(host_batch.bad)
        lr = learning_rate(config, step, stream.steps_per_epoch)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        batches = split_virtual_ranks(to_batch(host_batch, run), ranks.virtual_ranks_per_process)
        bank_ready = stream.bank_ready(step)
        due = due_after(step + 1, stream.steps_per_epoch, config)

        # Once in a while: examine the step before taking it. Its time does not count in images/s.
        if due.diagnose:
            with throughput.paused():
                diagnostics = diagnose(
                    method, batches, step=step, bank_ready=bank_ready, scale=state.scaler.get_scale()
                )

        # The training step.
        output = train_step(
            method, student, state.optimizer, batches, step=step, bank_ready=bank_ready, scaler=state.scaler
        )
        state.meter.add(step, *output[:3], host_batch.true_labels, output.skipped)
        state.step, state.evaluation_due = step + 1, due.evaluate

        # Once in a while: the log. A loss that is not finite ends the run here, before it is saved.
        if due.diagnose:
            log_diagnostics(run, state, log, diagnostics)
        if due.log:
            log_losses(run, state, log, lr, throughput)
        if due.end_of_epoch and not state.bad_images.stop:
            log.bad_images(state.step, state.bad_images.take(), REPLACED)

        # Once in a while: a checkpoint. Several processes agree on stopping and on the time only with a train
        # event, because they must communicate for that.
        stop = (due.log or ranks.processes == 1) and dist_utils.any_rank(preempt.stop_requested())
        save_seconds = 60 * config.save_minutes
        overdue = (
            due.log and save_seconds and dist_utils.any_rank(time.monotonic() - last_save > save_seconds)
        )
        if due.save or stop or overdue:
            save(run, state, log, writer)
            last_save = time.monotonic()

        # Once in a while: an evaluation. The step is saved before, so that one that fails loses nothing.
        if due.evaluate and not stop:
            stop = not evaluate_state(run, state, eval_loader, log, writer)
            throughput.restart(state.step)
        if stop:
            return True
        dist_utils.begin_phase(f"step {state.step}: data")
    return False


def open_data(config: Config, ranks: RankLayout, device: torch.device) -> tuple[Data, Stream]:
    """Return the data set, and the stream of this process's images. Sets config.cls. Raises UserError if a
    step is impossible.
    """
    data = build_data(config, gpu=device.type == "cuda")
    config.cls = len(data.classes)
    n_x = ranks.batch_size * ranks.virtual_ranks_per_process
    stream = Stream(
        data,
        n_x,
        config.mu,
        config.seed,
        dist_utils.rank(),
        ranks.processes,
        config.steps_per_epoch,
        config.labeled_sampler,
        ranks.virtual_ranks_per_process,
    )
    if stream.steps_per_epoch == 0:
        raise UserError(
            f"one step takes {stream.n_u * ranks.processes} unlabeled images, but there are "
            f"{len(data.unlabeled)}: lower --batch-size or --mu"
        )
    if len(data.strong_views) > 1 and ranks.batch_size * config.mu == 1:
        raise UserError(
            "a further strong view is a batch of its own, of a single image here, for which BN has no "
            "statistics: use a --batch-size or --mu of 2 or more"
        )
    check_memory(data.sides(), data.channels, stream.n_x, stream.n_u, *memory_of(device))
    if dist_utils.rank() == 0:  # here already, because building the networks takes a second
        print(
            f"{config.method} on {data.split}: {len(data.labeled)} labeled, {len(data.unlabeled)} unlabeled, "
            f"{len(data.test_labels)} test images, {len(data.classes)} classes",
            flush=True,
        )
    return data, stream


def new_state(run: Run) -> TrainState:
    """Return the state in which a new run starts: networks, bank and optimizer."""
    config, data, unlabeled_per_step = run.config, run.data, run.stream.n_u * dist_utils.world_size()
    torch.manual_seed(config.seed)
    try:
        labels = torch.from_numpy(data.labels[data.labeled])  # [K]
        method = build_method(config, data.channels, labels, unlabeled_per_step).to(run.device)
        method.check_views(*data.sides())
    except ValueError as error:
        raise UserError(str(error)) from None
    optimizer = build_optimizer(config, method.student)
    scaler = torch.amp.GradScaler(run.device.type, enabled=config.precision == "fp16")
    return TrainState(method, optimizer, scaler, Meter(), BadImages(config.on_bad_image))


def check_same_start(identity: RunIdentity, start: int) -> None:
    """Raise UserError unless all ranks start the same run at the same step."""
    settings = to_dict(identity.config)
    facts = {key: value for key, value in settings.items() if key not in MAY_CHANGE_ON_RESUME}
    facts |= {"step": start, "ranks": identity.ranks, "split": identity.split, "images": identity.fingerprint}
    dist_utils.check_same_on_all_ranks(facts)


def to_batch(host_batch: HostBatch, run: Run) -> Batch:
    """Copy the images of a step to the device, and finish their views there."""
    data, device = run.data, run.device
    return Batch(
        to_device(data.weak_view, host_batch.x, device),
        host_batch.y.to(device, non_blocking=True),
        host_batch.index.to(device, non_blocking=True),
        to_device(data.weak_view, host_batch.u_weak, device),
        tuple(to_device(*view, device) for view in zip(data.strong_views, host_batch.u_strong, strict=True)),
    )


def log_diagnostics(run: Run, state: TrainState, log: Logger, diagnostics: dict[str, Tensor]) -> None:
    """Write the diagnostics event. diagnostics: what `diagnose` returned for the last step."""
    method, data, stream = state.method, run.data, run.stream
    labels_per_step = stream.n_x * dist_utils.world_size()
    ages = method.age_diagnostics(bank_row_ages(stream, state.step), labels_per_step)
    values = diagnostics_event(
        (state.step - 1) // stream.steps_per_epoch + 1,
        stream.steps_per_epoch,
        method.loss_names,
        method.diagnostic_names,
        {**diagnostics, **ages},
        state.meter.take_counts(),
        data.labels[data.labeled],
        data.classes,
    )
    log.write("diagnostics", state.step, values)


def log_losses(run: Run, state: TrainState, log: Logger, lr: float, throughput: Throughput) -> None:
    """Write the train event. Raises UserError if a loss was not finite."""
    steps = len(state.meter.steps)
    with log_stop_reason(log, state.step):
        means = state.meter.take_means()
    if "skipped" in means:  # by the loss scaling of fp16
        means["skipped"] = round(means["skipped"] * steps)
    epoch = (state.step - 1) // run.stream.steps_per_epoch + 1
    values: dict[str, float | None] = {**dict.fromkeys(state.method.loss_names), **means, "lr": lr}
    values["images_per_s"] = throughput.take(state.step)
    log.train(state.step, epoch, run.config.epochs, values)


def save(run: Run, state: TrainState, log: Logger, writer: checkpoint.Writer) -> None:
    """Start to write a checkpoint. Raises UserError if a value of the state is not finite."""
    dist_utils.begin_phase(f"step {state.step - 1}: checkpoint")
    content = {**run.identity.state_dict(), **state.state_dict()}
    with log_stop_reason(log, state.step):
        checkpoint.check_finite(content["method"], state.step)
    if dist_utils.rank() == 0:
        writer.save(content)


def evaluate_state(
    run: Run, state: TrainState, eval_loader: EvalLoader, log: Logger, writer: checkpoint.Writer
) -> bool:
    """Evaluate the state, and add the score to its checkpoint. Return False if the run was asked to stop
    meanwhile: the checkpoint says that the evaluation is due, and the run resumes with it.
    """
    dist_utils.begin_phase(f"step {state.step}: evaluation")
    unreadable = BadImages(run.config.on_bad_image)
    networks = {"student": state.method.student, "teacher": state.method.teacher.net}
    state.method.eval()
    scores = accuracies(networks, eval_loader.batches(unreadable), run.config.cls, run.device)
    state.method.train()
    if scores is None:
        return False
    log.eval(state.step, state.step // run.stream.steps_per_epoch, scores)
    log.bad_images(state.step, unreadable.take(), LEFT_OUT)
    better = scores["student_top1"] > state.best["student_top1"]
    if better:
        state.best = {"step": state.step, **scores}
    state.evaluation_due = False
    if dist_utils.rank() == 0:
        writer.add_score(state.best, better)
    return True


def overrides(config: Config) -> dict[str, Any]:
    """Return the fields OVERRIDES that differ from their defaults: they replace those of the checkpoint."""
    defaults = defaults_of(config.method)
    return {name: value for name in OVERRIDES if (value := getattr(config, name)) != defaults[name]}


def describe_run(run: Run, state: TrainState, log: Logger, warnings: list[str]) -> None:
    """Print what follows from the settings, and write the start event."""
    config, ranks, stream, start = run.config, run.identity.ranks, run.stream, state.step
    millions = sum(p.numel() for p in state.method.student.parameters()) / 1e6
    log.print_line(
        f"{config.backbone}, {millions:.2f} M parameters, on {ranks.processes} x {run.device.type}; {ranks}"
    )
    log.print_line(
        f"{stream.n_x * ranks.processes} + {stream.n_u * ranks.processes} images a step, "
        f"{stream.steps_per_epoch} steps an epoch, {config.epochs} epochs = {run.total} steps; "
        f"lr {config.lr} after {config.warmup_epoch} epochs of warm-up"
    )
    for warning in filter(None, warnings):
        log.print_line(warning)
    if start:
        remaining = "it is finished" if start == run.total else f"{run.total - start} steps to go"
        log.print_line(f"continues from {run.last} at step {start}: {remaining}")
    else:
        best = best_checkpoint(config, run.last)
        log.print_line(f"writes {config.output_dir}: config.yaml, log.jsonl, tb/; {best} and {run.last}")
    log.log_start(start, *run.identity.split)


def describe_interrupt() -> str:
    """Return the last line of a run that Ctrl-C has ended."""
    last = last_checkpoint(parse(sys.argv[1:], __doc__))
    if last.exists():
        return f"interrupted; the same command continues from the last checkpoint, {last}"
    return "interrupted before the first checkpoint: the same command starts the run again"


if __name__ == "__main__":
    cli_main(main, interrupted=describe_interrupt, describe_error=dist_utils.describe_lost_ranks)
