"""Check a data set: python -m dataset.check CONFIG [--field value ...] [--sample N] [--report FILE]

It builds the data set that train_semi.py would train on, reads every image, and prints what is in order (ok),
what is worth knowing (note) and what has to be fixed (BAD). CONFIG and the fields are those of train_semi.py,
whose --help describes them. Exit code 0: nothing is BAD; 1: something is BAD; 2: it cannot be built.
"""

import os
import sys
from pathlib import Path

from util.config import parse
from util.errors import Parser, UserError, cli_main
from util.files import check_output, starts_with


def main() -> None:
    parser = Parser(__doc__)
    parser.usage = "python -m dataset.check CONFIG [--field value ...] [--sample N] [--report FILE]"
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="read only N images, drawn by the seed; 0: all"
    )
    parser.add_argument("--report", metavar="FILE", help="write all cases as CSV: path, problem, detail")
    args, rest = parser.parse_known_args()
    config = parse(["--config", *rest] if rest and not rest[0].startswith("-") else rest, "")
    if args.sample < 0:
        raise UserError(f"--sample must be 1 or more, or 0 for all images, got {args.sample}")

    # These import torch, which takes seconds: --help and mistakes in the command line do not wait for it.
    from dataset.build import build_data
    from dataset.findings import COLUMNS, Findings
    from dataset.inspection import check_data

    file, replaces = Path(os.devnull), ""
    if args.report:
        is_report = starts_with(",".join(COLUMNS).encode())
        file, replaces = check_output(args.report, "--report", "a report of this program", is_report)
    data = build_data(config, gpu=False)  # before the report is opened: an older one is kept if this fails
    try:
        report = open(file, "w", newline="", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot write report {file}: {error.strerror}; choose another --report") from None
    if replaces:
        print(replaces, file=sys.stderr)
    with report:
        findings = Findings(report)
        check_data(data, config, args.sample, findings)
    sys.exit(1 if findings.print_summary() else 0)


if __name__ == "__main__":
    cli_main(main, interrupted=lambda: "interrupted: some images were not read")
