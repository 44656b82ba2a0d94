"""Find what looks wrong in a run: python -m util.doctor RUN_DIR [--json] reads its config.yaml and log.jsonl.

Exit code 0: no rule found anything, though notes may tell of what is unusual but expected; 1: a rule found
something; 2: RUN_DIR cannot be read.
"""

import json
import sys
from typing import Any

from util.errors import Parser, UserError
from util.files import user_path
from util.inspect.detectors import first_use, late_terms
from util.inspect.rules import rules_of
from util.inspect.run_log import RunLog, read_run_log


def examine(run: RunLog) -> list[dict[str, Any]]:
    """Return what the rules find in a run, in their order."""
    return [
        {"rule": rule.name, **found._asdict(), "description": rule.description, "advice": rule.advice}
        for rule in rules_of(run.config.method)
        if (found := rule.find(run))
    ]


def notes_of(run: RunLog) -> list[dict[str, Any]]:
    """Return what looks wrong in a log, but is expected: the first use of each late term."""
    return [
        {"note": late.note, "what": found.what, "step": found.first_step, "description": late.description}
        for term, late in late_terms(run).items()
        if (found := first_use(run, term))
    ]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=user_path, metavar="RUN_DIR", help="output directory of train_semi.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(sys.argv[1:])
    try:
        run = read_run_log(args.run)
        findings, notes = examine(run), notes_of(run)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{args.run / 'log.jsonl'} is damaged or of another version: an event lacks a value ({error})"
        ) from None
    except (ArithmeticError, ValueError) as error:
        raise UserError(f"{args.run}: config.yaml or log.jsonl has an impossible value ({error})") from None
    step, total = max((e["step"] for e in run.events), default=0), run.total_steps
    counts = {"rules": len(rules_of(run.config.method)), "events": len(run.events)}
    if args.json:
        position = {"run": str(args.run), "step": step, "total": total}
        print(json.dumps(position | counts | {"findings": findings, "notes": notes}))
        sys.exit(1 if findings else 0)
    for f in findings:
        steps = f"step {f['first_step']}"
        if f["last_step"] != f["first_step"]:
            steps += f" to {f['last_step']}"
        print(f"{f['rule']}: {f['what']} ({steps})\n  rule: {f['description']}\n  try: {f['advice']}")
    if not findings and run.train_events:
        print("nothing looks wrong ({rules} rules, {events} events)".format(**counts))
    elif not findings:
        print("nothing to judge: the log has no train event yet")
    for note in notes:
        print("note: {note}: {what} (step {step}); {description}".format(**note))
    if total is None or step < total:
        print(f"unfinished at step {step} of {total or 'an unknown number (no evaluation yet)'}")
    if run.events and not run.diagnostic_events:
        print("the log has no diagnostics: classes, gradients and the method's own values were not checked")
    sys.exit(1 if findings else 0)
