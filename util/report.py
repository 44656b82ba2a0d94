"""The command `python -m util.report`; its code is in util/inspect/report.py."""

from util.errors import cli_main
from util.inspect.report import main

if __name__ == "__main__":
    cli_main(main)
