"""Train SimMatch, FixMatch or a supervised baseline: python train_semi.py --config configs/digits.yaml [--field value …]"""
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dataset.build import build_data
from dataset.loader import BadImages, Data, SplitId, Stream, batches, evaluation_batches, to_device
from models import Batch, Method, build_method, parameter_groups, split, train_step
from util import checkpoint, dist_utils
from util.config import FREE, Config, parse, to_dict, to_yaml
from util.errors import UserError, run
from util.log import Log, prepare
from util.metrics import Meter, evaluate
from util.preempt import CODE, Preempt
from util.ranks import Ranks, continue_with, ranks_of
from util.schedule import learning_rate


def main() -> None:
    config = parse(sys.argv[1:], __doc__)
    device = dist_utils.dist_init(config.device, config.timeout_minutes)
    rank, out = dist_utils.rank(), Path(config.output_dir)
    state, damage = checkpoint.load_newest(out / "last.pth")
    ranks, remark = ranks_of(config.batch_size, config.virtual_ranks, dist_utils.world_size()), ""
    if state is not None:
        ranks, remark = continue_with(ranks, config.virtual_ranks, config.other_ranks, state)

    data = build_data(config, gpu=device.type == "cuda")
    config.cls = len(data.classes)
    stream = Stream(data, ranks.batch_size * ranks.here, config.mu, config.seed, rank, ranks.processes, config.steps_per_epoch)
    images = (stream.n_x + stream.n_u) * ranks.processes
    if stream.steps_per_epoch == 0:
        raise UserError(f"one step takes {stream.n_u * ranks.processes} unlabelled images, but there are {len(data.unlabelled)}: "
                        "lower --batch-size or --mu")
    total, fingerprint = config.epochs * stream.steps_per_epoch, data.fingerprint()

    torch.manual_seed(config.seed)
    try:
        method = build_method(config, data.channels, torch.from_numpy(data.labels[data.labelled])).to(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    optimizer = torch.optim.SGD(parameter_groups(method.student, config.wd, config.no_decay_bn), lr=config.lr,
                                momentum=config.momentum, nesterov=config.nesterov)

    meter, bad = Meter(), BadImages(config.on_bad_image)
    start, best = 0, {"step": 0, "student_top1": -1.0}
    if state is not None:
        start, best = resume(out / "last.pth", state, config, data, fingerprint, method, optimizer, meter, bad)
    if rank == 0:
        prepare(out, to_yaml(config))
    student = dist_utils.parallel(method.student)
    log = Log(out, start, total, active=rank == 0, patient=config.on_save_error == "continue")
    describe(log, config, data, stream, ranks, method, device, start, total, [damage, remark])
    writer = checkpoint.Writer(out, config.on_save_error, log.say, last_is_whole=not damage)

    preempt, saved = Preempt(), time.monotonic()
    clock, clock_step = saved, start
    loader = batches(stream, range(start, total), config.workers, pin_memory=device.type == "cuda")
    for step, item in enumerate(loader, start):
        bad.add(item.bad)
        lr = learning_rate(step, lr=config.lr, steps_per_epoch=stream.steps_per_epoch, epochs=config.epochs,
                           warmup_epoch=config.warmup_epoch, cos=config.cos, schedule=config.schedule,
                           cos_7_16=config.cos_7_16)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = Batch(to_device(data.weak, item.x, device), item.y.to(device, non_blocking=True),
                      item.index.to(device, non_blocking=True), to_device(data.weak, item.u_weak, device),
                      to_device(data.strong, item.u_strong, device))

        terms, fresh = train_step(method, student, optimizer, split(batch, ranks.here), step=step,
                                  bank_ready=stream.bank_ready(step))
        meter.add(step, terms, fresh.pseudo, fresh.mask, item.hidden)

        done, epoch = step + 1, step // stream.steps_per_epoch + 1
        stop = preempt.asked(done, config.print_freq) and done < total
        at_end_of_epoch = done % stream.steps_per_epoch == 0
        evaluate_now = at_end_of_epoch and (epoch % config.eval_freq == 0 or done == total)
        if done % config.print_freq == 0 or evaluate_now:
            values = meter.read()       # stops here if a loss was not finite, before anything is saved
            seconds = time.monotonic() - clock
            speed = (done - clock_step) * images / seconds
            log.train(done, epoch, config.epochs, {**values, "lr": lr, "images_per_s": round(speed, 1)})
            clock, clock_step = time.monotonic(), done
        if evaluate_now:
            left_out = BadImages(config.on_bad_image)
            scores = accuracies(method, data, config.workers, device, left_out)
            log.eval(done, epoch, scores)
            log.bad_images(done, sum(dist_utils.all_gather_object(left_out.take()), []), "left out of testing")
            better = scores["student_top1"] > best["student_top1"]
            if better:
                best = {"step": done, **scores}
            clock = time.monotonic()
        if at_end_of_epoch and not bad.stop:
            log.bad_images(done, sum(dist_utils.all_gather_object(bad.take()), []), "replaced by others in this epoch")

        late = config.save_minutes and done % config.print_freq == 0 and dist_utils.from_rank_0(
            time.monotonic() - saved > 60 * config.save_minutes)
        if evaluate_now or stop or late or (config.save_freq and done % config.save_freq == 0):
            # A mean since the last train event and a list of bad images in an unfinished epoch are part of the state.
            state = {"config": to_dict(config), "step": done, "world": ranks.total, "processes": ranks.processes,
                     "batch_size": ranks.batch_size, "steps_per_epoch": stream.steps_per_epoch, "split": tuple(data.split),
                     "classes": data.classes, "data": fingerprint,
                     "method": method.state_dict(), "optimizer": optimizer.state_dict(), "best": best,
                     "meter": meter.state_dict(), "bad_images": sum(dist_utils.all_gather_object(bad.seen), [])}
            checkpoint.must_be_finite(state["method"], done)
            if rank == 0:
                writer.save(state, best=evaluate_now and better)
            saved = time.monotonic()
        if stop:
            writer.close()
            log.say(f"asked to stop: saved step {done} in {out / 'last.pth'}; the same command continues")
            log.close()
            dist_utils.dist_end()
            sys.exit(CODE)

    writer.close()
    log.say(f"done: best student top-1 {best['student_top1']:.3f} % at step {best['step']}, in {out / 'best.pth'}")
    log.close()
    dist_utils.dist_end()


def resume(path: Path, state: dict[str, Any], config: Config, data: Data, fingerprint: str, method: Method,
           optimizer: torch.optim.Optimizer, meter: Meter, bad: BadImages) -> tuple[int, dict]:
    """Continue from `state`, the checkpoint at `path`: (steps done, best scores so far).

    1. The same command continues; nothing has to be said.
    2. What the run computes must be the same: every field but FREE, the labelled split and the names of all images. Anything
       else is refused. The number of ranks, which decides what a step is, is util/ranks.py's business.
    3. Everything is restored from the one file: weights, bank, prior, teacher, optimizer, best score, and what the log has
       yet to tell. The order of the data and all views follow from the step.
    4. Where the last checkpoint is damaged or gone, the one before it serves, and the run says so.
    """
    now = to_dict(config)
    changed = [f"{key} was {state['config'].get(key)!r} and is now {now[key]!r}" for key in now
               if key not in FREE and state["config"].get(key) != now[key]]
    if SplitId(*state["split"]) != data.split:
        changed.append(f"the split was {str(SplitId(*state['split']))!r} and is now {str(data.split)!r}")
    if not changed and state["data"] != fingerprint:
        changed.append("training or test images were added, removed or renamed")
    if changed:
        raise UserError(f"{path} belongs to another run ({'; '.join(changed[:3])}): choose another --output-dir, "
                        "or move that file away to start anew")
    checkpoint.load_module(method, state["method"], path)
    optimizer.load_state_dict(state["optimizer"])
    meter.load_state_dict(state["meter"])
    if dist_utils.rank() == 0:
        bad.seen = state["bad_images"]
    return state["step"], state["best"]


def accuracies(method: Method, data: Data, workers: int, device: torch.device, bad: BadImages) -> dict[str, float]:
    """student_top1, student_top5, teacher_top1, teacher_top5 on the test images, in percent."""
    method.eval()
    networks = {"student": method.student, "teacher": method.teacher.net}
    for network in networks.values():
        dist_utils.broadcast_buffers(network)
    x_and_y = evaluation_batches(data, dist_utils.rank(), dist_utils.world_size(), workers, device, bad)
    scores = {}
    for name, result in zip(networks, evaluate(list(networks.values()), x_and_y, len(data.classes), device)):
        scores[f"{name}_top1"], scores[f"{name}_top5"] = result.top1, result.top5
    method.train()
    return scores


def describe(log: Log, config: Config, data: Data, stream: Stream, ranks: Ranks, method: Method, device: torch.device,
             start: int, total: int, remarks: list[str]) -> None:
    """Say once what follows from the settings."""
    millions = sum(p.numel() for p in method.student.parameters()) / 1e6
    log.begin(start, *data.split)
    log.say(f"{config.method} on {data.split}: {len(data.labelled)} labelled, {len(data.unlabelled)} unlabelled, "
            f"{len(data.test_labels)} test images, {len(data.classes)} classes")
    log.say(f"{config.backbone}, {millions:.2f} M parameters, on {ranks.processes} x {device.type}; {ranks}")
    log.say(f"{stream.n_x * ranks.processes} + {stream.n_u * ranks.processes} images a step, {stream.steps_per_epoch} steps an epoch, "
            f"{config.epochs} epochs = {total} steps; lr {config.lr} after {config.warmup_epoch} epochs of warm-up")
    for remark in filter(None, remarks):
        log.say(remark)
    if start:
        finished = "it is finished" if start == total else f"{total - start} steps to go"
        log.say(f"continues from {Path(config.output_dir) / 'last.pth'} at step {start}: {finished}")
    else:
        log.say(f"writes {config.output_dir}: config.yaml, log.jsonl, tb/, last.pth, best.pth")


if __name__ == "__main__":
    run(main, interrupted="interrupted; the same command continues from the last checkpoint", explain=dist_utils.explain)
