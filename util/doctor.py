"""The command `python -m util.doctor`; its code is in util/inspect/doctor.py."""

from util.errors import cli_main
from util.inspect.doctor import main

if __name__ == "__main__":
    cli_main(main)
