"""What looks wrong in a run, and by which rule: python -m util.doctor RUN_DIR [--json]. Reads log.jsonl and
config.yaml alone.

Exit code 0: nothing looks wrong; 1: something does; 2: RUN_DIR cannot be read.
"""

import json
import sys
from pathlib import Path
from typing import Any

from util.config import Config, read_yaml
from util.detectors import Event, Run
from util.errors import Parser, UserError, cli_main
from util.report import read_events
from util.rules import RULES


def read(folder: Path) -> tuple[Run, list[Event]]:
    """The run and all its events. Raises UserError if it is none."""
    events = read_events(folder)
    trains, evals, diagnostic_events, stops = (
        [e for e in events if e["event"] == kind] for kind in ("train", "eval", "diagnostics", "stop")
    )
    config = Config(**read_yaml(str(folder / "config.yaml")))
    return Run(
        config, trains, evals, diagnostic_events, stops, steps_per_epoch(trains, evals, diagnostic_events)
    ), events


def steps_per_epoch(trains: list[Event], evals: list[Event], diagnostic_events: list[Event]) -> int | None:
    """The diagnostics say it; otherwise an evaluation does, being at the end of an epoch that a train event
    names.
    """
    if diagnostic_events:
        return diagnostic_events[0]["steps_per_epoch"]
    epochs = {e["step"]: e["epoch"] for e in trains}
    return next((e["step"] // epochs[e["step"]] for e in evals if e["step"] in epochs), None)


def examine(r: Run) -> list[dict[str, Any]]:
    """What the rules find, in their order."""
    found = [(rule, rule.find(r)) for rule in RULES]
    return [
        {
            "rule": rule.name,
            "what": finding.what,
            "first_step": finding.first,
            "last_step": finding.last,
            "description": rule.description,
            "advice": rule.advice,
        }
        for rule, finding in found
        if finding
    ]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output directory of train_semi.py")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of words")
    args = parser.parse_args(sys.argv[1:])
    try:
        r, events = read(args.run)
        findings = examine(r)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{args.run / 'log.jsonl'} is damaged: an event is not one of ours ({error})"
        ) from None
    step, total = (
        max((e["step"] for e in events), default=0),
        r.steps_per_epoch and r.steps_per_epoch * r.config.epochs,
    )
    if args.json:
        print(
            json.dumps(
                {
                    "run": str(args.run),
                    "step": step,
                    "total": total,
                    "rules": len(RULES),
                    "events": len(events),
                    "findings": findings,
                }
            )
        )
        sys.exit(1 if findings else 0)
    for f in findings:
        where = f"step {f['first_step']}" + (
            f" to {f['last_step']}" if f["last_step"] != f["first_step"] else ""
        )
        print(f"{f['rule']}: {f['what']} ({where})\n  rule: {f['description']}\n  try: {f['advice']}")
    if not findings:
        print(
            f"nothing looks wrong ({len(RULES)} rules, {len(events)} events)"
            if r.trains
            else "nothing to judge: no step is in the log yet"
        )
    if total is None or step < total:
        print(
            f"unfinished at step {step} of {total or 'a number that is not known before the first evaluation'}"
        )
    if events and not r.diagnostic_events:
        print("the log has no diagnostics: rules on classes, gradients, prior, bank and q_w saw nothing")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    cli_main(main)
