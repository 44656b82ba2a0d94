"""Train SimMatch, FixMatch or a supervised baseline: python train_semi.py --config configs/digits.yaml
[--field value …]
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from util.config import MAY_CHANGE_ON_RESUME, Config, parse, to_dict, to_yaml
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
from dataset.build import build_data, check_output_dirs, view_sides
from dataset.findings import start_warnings
from dataset.loader import BadImages, Data, EvalLoader, Stream, to_device
from dataset.workers import PrefetchLoader, check_shared_memory
from eval import OVERRIDES, evaluate_checkpoint
from models import (
    Batch,
    Method,
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
from util.run.lock import RunLock
from util.run.log import LEFT_OUT, Logger, init_output_dir
from util.run.memory import check_memory, least_needs, memory_of
from util.run.metrics import Meter, count_hits, join_hits
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


def main() -> None:
    config = parse(sys.argv[1:], __doc__)
    device = dist_utils.dist_init(config.device, config.timeout_minutes, config.port)
    last = last_checkpoint(config)
    if config.evaluate:
        preempt.restore_default_handlers()
        evaluate_checkpoint(last, overrides(config))
        return
    out = user_path(config.output_dir)
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
    # The last checkpoint, if there is one, and the ranks.
    rank = dist_utils.rank()
    found, load_warning = load_last(last)
    if found:
        config.moco_path = check_moco_path(last, found, config.moco_path)
    published_state = found if is_published(found) else None
    saved_state = None if published_state else found
    ranks, ranks_warning = plan_ranks(config.batch_size, config.virtual_ranks, dist_utils.world_size()), ""
    if saved_state:
        ranks, ranks_warning = plan_ranks_on_resume(
            ranks, config.virtual_ranks, config.other_ranks, saved_state
        )

    # The data, and what each step sees of them.
    data = build_data(config, gpu=device.type == "cuda")
    config.cls = len(data.classes)
    stream = Stream(
        data,
        ranks.batch_size * ranks.virtual_ranks_per_process,
        config.mu,
        config.seed,
        rank,
        ranks.processes,
        config.steps_per_epoch,
    )
    n_x, n_u = stream.n_x * ranks.processes, stream.n_u * ranks.processes  # images of a global step
    if stream.steps_per_epoch == 0:
        raise UserError(
            f"one step takes {n_u} unlabeled images, but there are {len(data.unlabeled)}: "
            "lower --batch-size or --mu"
        )
    needs = least_needs(config, view_sides(config), data.channels, stream.n_x, stream.n_u, len(data.labeled))
    check_memory(needs, *memory_of(device))
    total, fingerprint = config.epochs * stream.steps_per_epoch, data.fingerprint()
    if rank == 0:  # here already, because building the optimizer takes a second
        print(describe_data(config, data), flush=True)

    # Networks, bank and optimizer in the state in which a new run starts.
    torch.manual_seed(config.seed)
    try:
        method = build_method(config, data.channels, torch.from_numpy(data.labels[data.labeled])).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    optimizer = build_optimizer(config, method.student)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    meter, bad = Meter(), BadImages(config.on_bad_image)
    start, best, evaluation_due = 0, {"step": 0, "student_top1": -1.0}, False

    # The state to start from instead: this run's checkpoint, else a published one, else a MoCo checkpoint.
    if saved_state:
        resume(last, saved_state, config, data.split, fingerprint, method, optimizer)
        start, best = saved_state["step"], saved_state["best"]
        evaluation_due = saved_state.get("evaluation_due", False)  # older checkpoints were written after it
        bad.seen = saved_state["bad_images"] if rank == 0 else []
        meter.load_state_dict(saved_state["meter"])
        scaler.load_state_dict(saved_state["scaler"])
    elif published_state:
        start = resume_published(last, published_state, stream.steps_per_epoch, method, optimizer)
    elif config.moco_path:
        start_from_moco(Path(config.moco_path), method.student, method.teacher.net)
    elif config.start_epoch:
        raise UserError(
            f"there is no checkpoint {last} to start epoch {config.start_epoch} from: "
            "a new run starts at epoch 0"
        )
    if start > total:
        finished = start // stream.steps_per_epoch
        raise UserError(f"{config.epochs} epochs are fewer than the {finished} that are done: raise --epochs")
    settings = {key: value for key, value in to_dict(config).items() if key not in MAY_CHANGE_ON_RESUME}
    dist_utils.check_same_on_all_ranks(
        {**settings, "step": start, "ranks": ranks, "split": data.split, "images": fingerprint}
    )

    # The output directory, the log and the checkpoint writer. Before this point no file of an earlier run
    # changes, so that a refused start leaves it intact.
    warnings = [load_warning, ranks_warning]
    if config.checkpoint and found is None:
        warnings.append(f"{last} does not exist: a new run starts and writes it")
    if rank == 0:
        archived = init_output_dir(out, last.parent, to_yaml(config), new_run=found is None)
        warnings += (
            [f"an earlier run's files in {out} were renamed: {', '.join(archived)}"] if archived else []
        )
        warnings += start_warnings(config, data, stream.steps_per_epoch) if start == 0 else []
    configure_execution(method, config.precision, config.channels_last, config.compile)
    student = dist_utils.wrap_ddp(method.student)
    log = Logger(
        out,
        start,
        total,
        active=rank == 0,
        buffer_on_error=config.on_save_error == "continue",
        evaluation_due=evaluation_due,
    )
    describe_run(log, config, data, stream, ranks, method, device, start, total, last, warnings)
    writer = checkpoint.Writer(
        last,
        out / "best.pth",
        config.on_save_error,
        log.print_line,
        last_is_whole=not load_warning,
        resumed=saved_state,
        may_write=may_write,
    )

    def evaluate_step(done: int) -> bool:
        """Evaluate after `done` steps, and add the score to their checkpoint. Return False if the run was
        asked to stop meanwhile: the checkpoint says that the evaluation is due, and the run resumes with it.
        """
        nonlocal best
        dist_utils.begin_phase(f"step {done}: evaluation")
        unreadable = BadImages(config.on_bad_image)
        scores = accuracies(method, eval_loader.batches(unreadable), config.cls, device)
        if scores is None:
            return False
        log.eval(done, done // stream.steps_per_epoch, scores)
        log.bad_images(done, dist_utils.concatenate_lists(unreadable.take()), LEFT_OUT)
        better = scores["student_top1"] > best["student_top1"]
        if better:
            best = {"step": done, **scores}
        if rank == 0:
            writer.add_score(best, better)
        return True

    last_save = time.monotonic()
    workers = config.workers if start < total or evaluation_due else 0
    loader = PrefetchLoader(
        stream, range(start, total), workers, pin_memory=device.type == "cuda", item_bytes=stream.item_bytes()
    )
    eval_loader = EvalLoader(data, rank, ranks.processes, workers, device)
    if warning := check_shared_memory():
        log.print_line(warning)
    if evaluation_due and not evaluate_step(start):
        stop_early(writer, log, start, last)
    clock, clock_step = time.monotonic(), start  # images/s are counted from this time and step
    dist_utils.begin_phase(f"step {start}: data")
    for step, host_batch in enumerate(loader, start):
        dist_utils.begin_phase(f"step {step}: forward and backward")
        # The learning rate and the batch of this step.
        bad.add(host_batch.bad)
        lr = learning_rate(config, step, stream.steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = Batch(
            to_device(data.weak_view, host_batch.x, device),
            host_batch.y.to(device, non_blocking=True),
            host_batch.index.to(device, non_blocking=True),
            to_device(data.weak_view, host_batch.u_weak, device),
            to_device(data.strong_view, host_batch.u_strong, device),
        )
        batches = split_virtual_ranks(batch, ranks.virtual_ranks_per_process)
        bank_ready = stream.bank_ready(step)

        # What is due after this step: `done` steps are finished then.
        done, epoch = step + 1, step // stream.steps_per_epoch + 1
        end_of_epoch = done % stream.steps_per_epoch == 0
        evaluate_now = end_of_epoch and (epoch % config.eval_freq == 0 or done == total)
        diagnose_now = done % config.diagnose_freq == 0 if config.diagnose_freq else evaluate_now

        # Once in a while: examine the step before taking it. Its time does not count in images/s.
        if diagnose_now:
            before = time.monotonic()
            diag = diagnose(method, batches, step=step, bank_ready=bank_ready, scale=scaler.get_scale())
            clock += time.monotonic() - before

        # The training step.
        losses, output = train_step(
            method, student, optimizer, batches, step=step, bank_ready=bank_ready, scaler=scaler
        )
        meter.add(step, losses, output.pseudo_label, output.mask, host_batch.true_labels)

        # Once in a while: the log.
        if diagnose_now:
            values = diagnostics_event(
                epoch,
                stream.steps_per_epoch,
                n_x,
                diag,
                meter.take_counts(),
                data.labels[data.labeled],
                data.classes,
                bank_row_ages(stream, done),
            )
            log.write("diagnostics", done, values)
        # Several processes agree on stopping only every print_freq steps, because they must communicate for
        # that.
        may_stop = ranks.processes == 1 or done % config.print_freq == 0 or evaluate_now
        stop = may_stop and dist_utils.any_rank(preempt.stop_requested())
        if done % config.print_freq == 0 or evaluate_now:
            with log_stop_reason(log, done):
                means = meter.take_means()  # raises if a loss was not finite, before anything is saved
            seconds = time.monotonic() - clock
            images_per_s = (done - clock_step) * (n_x + n_u) / seconds
            log.train(done, epoch, config.epochs, {**means, "lr": lr, "images_per_s": round(images_per_s, 1)})
            clock, clock_step = time.monotonic(), done

        if end_of_epoch and not bad.stop:
            log.bad_images(done, dist_utils.concatenate_lists(bad.take()), "replaced by others in this epoch")

        # Once in a while: a checkpoint.
        overdue = (
            config.save_minutes
            and done % config.print_freq == 0
            and dist_utils.from_rank_0(time.monotonic() - last_save > 60 * config.save_minutes)
        )
        if evaluate_now or stop or overdue or (config.save_freq and done % config.save_freq == 0):
            dist_utils.begin_phase(f"step {step}: checkpoint")
            # The meter and the bad images are part of the state, so that a resumed run logs the same values.
            state = {
                "config": to_dict(config),
                "step": done,
                "world": ranks.total,
                "processes": ranks.processes,
                "batch_size": ranks.batch_size,
                "steps_per_epoch": stream.steps_per_epoch,
                "split": tuple(data.split),
                "classes": data.classes,
                "data": fingerprint,
                "method": method.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "best": best,
                "evaluation_due": evaluate_now,
                "meter": meter.state_dict(),
                "bad_images": dist_utils.concatenate_lists(bad.seen),
            }
            with log_stop_reason(log, done):
                checkpoint.check_finite(method.state_dict(), done)
            if rank == 0:
                writer.save(state)
            last_save = time.monotonic()

        # Once in a while: evaluation. The step is saved already, so that an evaluation that fails loses
        # nothing.
        if evaluate_now and not stop:
            stop = not evaluate_step(done)
            clock = time.monotonic()
        if stop:
            stop_early(writer, log, done, last)
        dist_utils.begin_phase(f"step {done}: data")

    writer.close()
    if best["step"]:
        top1, file = f"{best['student_top1']:.3f} %", out / "best.pth"
        log.print_line(f"done: best student top-1 {top1} at step {best['step']}, in {file}")
    log.close()
    dist_utils.dist_end()


def last_checkpoint(config: Config) -> Path:
    """Return the path of the checkpoint that the run resumes from."""
    if config.checkpoint:
        return user_path(Path("checkpoints", config.checkpoint))
    return user_path(config.output_dir) / "last.pth"


def stop_early(writer: checkpoint.Writer, log: Logger, step: int, last: Path) -> NoReturn:
    """End a run that was asked to stop, and whose checkpoint of this step is being written."""
    writer.close()
    log.print_line(f"asked to stop: saved step {step} in {last}; the same command continues")
    log.close()
    dist_utils.dist_end()
    sys.exit(preempt.REQUEUE_EXIT_CODE)


def overrides(config: Config) -> dict[str, Any]:
    """Return the fields OVERRIDES that differ from their defaults: they replace those of the checkpoint."""
    return {name: value for name in OVERRIDES if (value := getattr(config, name)) != getattr(Config(), name)}


def accuracies(
    method: Method, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, device: torch.device
) -> dict[str, float] | None:
    """Return student_top1, student_top5, teacher_top1 and teacher_top5, in percent, or None if a signal has
    asked the run to stop meanwhile.

    All ranks must call it; they first take over rank 0's BN statistics.
    batches: this rank's (x [n, c, h, w], y [n]); the accuracy is that over the batches of all ranks.
    """
    method.eval()
    networks = {"student": method.student, "teacher": method.teacher.net}
    for network in networks.values():
        dist_utils.broadcast_buffers(network)
    until_stop = itertools.takewhile(lambda batch: not preempt.stop_requested(), batches)
    hits = count_hits(list(networks.values()), until_stop, num_classes, device)
    method.train()
    if dist_utils.any_rank(preempt.stop_requested()):
        return None
    scores = {}
    for name, result in zip(networks, join_hits(hits)):
        scores[f"{name}_top1"], scores[f"{name}_top5"] = result.top1, result.top5
    return scores


def describe_data(config: Config, data: Data) -> str:
    """Return the first line of the output: method, split and numbers of images."""
    return (
        f"{config.method} on {data.split}: {len(data.labeled)} labeled, {len(data.unlabeled)} unlabeled, "
        f"{len(data.test_labels)} test images, {len(data.classes)} classes"
    )


def describe_run(
    log: Logger,
    config: Config,
    data: Data,
    stream: Stream,
    ranks: RankLayout,
    method: Method,
    device: torch.device,
    start: int,
    total: int,
    last: Path,
    warnings: list[str],
) -> None:
    """Print what follows from the settings, and write the start event."""
    millions = sum(p.numel() for p in method.student.parameters()) / 1e6
    log.print_line(
        f"{config.backbone}, {millions:.2f} M parameters, on {ranks.processes} x {device.type}; {ranks}"
    )
    log.print_line(
        f"{stream.n_x * ranks.processes} + {stream.n_u * ranks.processes} images a step, "
        f"{stream.steps_per_epoch} steps an epoch, {config.epochs} epochs = {total} steps; "
        f"lr {config.lr} after {config.warmup_epoch} epochs of warm-up"
    )
    for warning in filter(None, warnings):
        log.print_line(warning)
    if start:
        remaining = "it is finished" if start == total else f"{total - start} steps to go"
        log.print_line(f"continues from {last} at step {start}: {remaining}")
    else:
        log.print_line(f"writes {config.output_dir}: config.yaml, log.jsonl, tb/, best.pth; and {last}")
    log.log_start(start, *data.split)


def describe_interrupt() -> str:
    """Return the last line of a run that Ctrl-C has ended."""
    last = last_checkpoint(parse(sys.argv[1:], __doc__))
    if last.exists():
        return f"interrupted; the same command continues from the last checkpoint, {last}"
    return "interrupted before the first checkpoint: the same command starts the run again"


if __name__ == "__main__":
    cli_main(
        main,
        interrupted=describe_interrupt,
        describe_error=dist_utils.describe_lost_ranks,
    )
