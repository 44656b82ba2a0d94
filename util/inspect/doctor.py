"""Find what looks wrong in a run: python -m util.doctor RUN_DIR [--json] reads its config.yaml and log.jsonl.

Exit code 0: no rule found anything, though notes may tell of what is unusual but expected; 1: a rule found
something; 2: RUN_DIR cannot be read.
"""

import json
import sys
from typing import Any

from util.errors import Parser, UserError
from util.files import user_path
from util.inspect.rules import NOTES, RULES
from util.inspect.run_log import RunLog, read_run_log


def examine(run: RunLog) -> list[dict[str, Any]]:
    """Return what the rules find in a run, in the order of RULES."""
    found = [(rule, rule.find(run)) for rule in RULES]
    return [
        {
            "rule": rule.name,
            "what": finding.what,
            "first_step": finding.first_step,
            "last_step": finding.last_step,
            "description": rule.description,
            "advice": rule.advice,
        }
        for rule, finding in found
        if finding
    ]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=user_path, metavar="RUN_DIR", help="output directory of train_semi.py")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(sys.argv[1:])
    try:
        run = read_run_log(args.run)
        findings = examine(run)
        notes = [(note, finding) for note in NOTES if (finding := note.find(run))]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{args.run / 'log.jsonl'} is damaged or of another version: an event lacks a value ({error})"
        ) from None
    step = max((e["step"] for e in run.events), default=0)
    total = run.total_steps
    if args.json:
        print(
            json.dumps(
                {
                    "run": str(args.run),
                    "step": step,
                    "total": total,
                    "rules": len(RULES),
                    "events": len(run.events),
                    "findings": findings,
                    "notes": [
                        {
                            "note": note.name,
                            "what": what,
                            "step": first_step,
                            "description": note.description,
                        }
                        for note, (what, first_step, _) in notes
                    ],
                }
            )
        )
        sys.exit(1 if findings else 0)
    for f in findings:
        steps = f"step {f['first_step']}"
        if f["last_step"] != f["first_step"]:
            steps += f" to {f['last_step']}"
        print(f"{f['rule']}: {f['what']} ({steps})\n  rule: {f['description']}\n  try: {f['advice']}")
    if not findings and run.train_events:
        print(f"nothing looks wrong ({len(RULES)} rules, {len(run.events)} events)")
    elif not findings:
        print("nothing to judge: the log has no train event yet")
    for note, (what, first_step, _) in notes:
        print(f"note: {note.name}: {what} (step {first_step}); {note.description}")
    if total is None or step < total:
        print(f"unfinished at step {step} of {total or 'an unknown number (no evaluation yet)'}")
    if run.events and not run.diagnostic_events:
        print("the log has no diagnostics: classes, gradients and the method's own values were not checked")
    sys.exit(1 if findings else 0)
