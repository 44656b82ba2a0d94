"""Kills training at random moments: python benchmark/kill_campaign.py [--kills 40] [--seed 0] [--jobs 2]

Each method trains once without interruption. Then it trains again and is killed (SIGKILL) during steps, while
a checkpoint is written, during an evaluation, and while its workers start, at moments drawn by --seed; after
every kill, the same command resumes the run. Both runs must end bit-equal. Digits on the CPU, with one rank
and with two; needs Linux (/proc).
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark.digits import machine  # noqa: E402
from benchmark.ranks import environment, free_port  # noqa: E402
from benchmark.same_run import difference, events  # noqa: E402
from util.errors import Parser, UserError, cli_main  # noqa: E402

FLAGS = "--device cpu --epochs 4 --eval-freq 1 --print-freq 4 --timeout-minutes 2".split()
# Of the runs that are killed. With print_freq 4, a checkpoint every 3 steps holds means in progress.
KILLED_FLAGS = ["--workers", "2", "--save-freq", "3"]
KINDS = {
    "step": "during steps",
    "save": "while a checkpoint is written",
    "evaluation": "during an evaluation",
    "worker start": "while the workers start",
}
TIMEOUT = 300  # s after which a process that has not ended counts as hanging


class Case(NamedTuple):
    method: str
    eman: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.method}{' --eman' * self.eman}, {self.ranks} rank{'s' * (self.ranks > 1)}"


CASES = [
    Case("simmatch"),
    Case("simmatch", eman=True),
    Case("simmatchv2"),
    Case("simmatch_single"),
    Case("fixmatch"),
    Case("fixmatch", eman=True),
    Case("supervised"),
    Case("simmatch", ranks=2),
    Case("simmatchv2", ranks=2),
    Case("simmatch_single", ranks=2),
    Case("fixmatch", eman=True, ranks=2),
]


class Kill(NamedTuple):
    kind: str
    victims: list[int]  # ranks that were killed
    met: bool  # whether the run's files show that it was killed at such a moment, not before or after it
    survived: bool = True  # whether the other ranks ended as they should, and the same command resumed it


class Rank(NamedTuple):
    process: subprocess.Popen
    out: Path
    err: Path

    def ended(self) -> bool:
        return self.process.poll() is not None


def start(case: Case, folder: Path, number: int, *flags: str) -> list[Rank]:
    """Start the ranks, each with its workers in a process group of its own. Their output goes to files beside
    `folder`.
    """
    env, ranks, port = {**os.environ, "OMP_NUM_THREADS": "1"}, [], free_port()
    config = f"configs/{'simmatchv2_' * (case.method == 'simmatchv2')}digits.yaml"
    method = ["--config", config, "--method", case.method, *["--eman"] * case.eman]
    method += ["--batch-size", str(10 // case.ranks)]
    command = [sys.executable, "train_semi.py", *FLAGS, *method, *flags, "--output-dir", str(folder)]
    for rank in range(case.ranks):
        if case.ranks > 1:
            env |= environment(rank, case.ranks, port)
        out, err = (folder.with_name(f"{folder.name}-{number}-{rank}.{kind}") for kind in ("out", "err"))
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=stdout, stderr=stderr, start_new_session=True
            )
        ranks.append(Rank(process, out, err))
    return ranks


def end(ranks: list[Rank], victims: Sequence[int] = ()) -> tuple[bool, str]:
    """Wait for all ranks -> (whether `victims` were killed before they ended, what went wrong or "")."""
    try:
        codes = [rank.process.wait(TIMEOUT) for rank in ranks]
    except subprocess.TimeoutExpired:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        return True, f"still running after {TIMEOUT} s:\n{tails(ranks)}"
    killed = [r for r in victims if codes[r] == -signal.SIGKILL]
    for r, (code, rank) in enumerate(zip(codes, ranks)):
        named = code == 1 and any(f"waiting for rank {k} on " in rank.err.read_text() for k in killed)
        if r not in killed and code != 0 and not named:
            return bool(killed), f"rank {r} ended with exit code {code}:\n{tails(ranks)}"
    return bool(killed), ""


def tails(ranks: list[Rank]) -> str:
    """The last lines of each rank's stderr."""
    return "\n".join(
        f"  rank {r}: {line}"
        for r, rank in enumerate(ranks)
        for line in rank.err.read_text().splitlines()[-8:]
    )


def steps(rank: Rank) -> set[int]:
    """The steps of the train events that this process has printed. (log.jsonl has those of earlier processes
    too.)
    """
    found = re.findall(r"^epoch \d+/\d+  step (\d+)/.*\n", rank.out.read_text(), re.MULTILINE)
    return set(map(int, found))


def unfinished_checkpoints(folder: Path) -> set[tuple[str, int, int]]:
    """Name, inode and time of the temporary files of checkpoints. A file that an earlier kill has left thus
    differs from a new one.
    """
    found = set()
    for path in folder.glob("*.pth.*.tmp"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found.add((path.name, stat.st_ino, stat.st_mtime_ns))
    return found


def has_workers(pid: int) -> bool:
    """Whether the process has grandchildren: workers are children of its helper (dataset/workers.py)."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parents[path.parent.name] = path.read_text().rpartition(")")[2].split()[1]
    return any(parents.get(parent) == str(pid) for parent in parents.values())


def strike(
    case: Case, ranks: list[Rank], folder: Path, kind: str, step: float, evaluations: set[int], random: Random
) -> Kill | None:
    """Kill one or all of the ranks at the first moment of this kind after `step`; None if there was none.

    evaluations: the steps after which the run is evaluated.
    """
    victims = list(range(case.ranks)) if random.random() < 0.5 else [random.randrange(case.ranks)]
    delay, first, deadline = random.uniform(0, 1), ranks[0], time.monotonic() + TIMEOUT

    def wait_until(condition: Callable[[], object]) -> bool:
        while not condition():
            if any(rank.ended() for rank in ranks) or time.monotonic() >= deadline:
                return False
            time.sleep(0.0005)
        return True

    before = unfinished_checkpoints(folder)
    if kind == "worker start":
        came = wait_until(
            lambda: re.search(r"^(writes|continues from) ", first.out.read_text(), re.MULTILINE)
        ) and wait_until(lambda: has_workers(first.process.pid))
        time.sleep(0.05 * delay)
    else:
        came = wait_until(lambda: max(steps(first), default=0) >= step)
        before = unfinished_checkpoints(folder)
        if kind == "save":
            came = came and wait_until(lambda: unfinished_checkpoints(folder) - before)
        elif kind == "evaluation":
            came = came and wait_until(lambda: max(steps(first)) in evaluations)
        time.sleep({"step": 0.2, "save": 0.01, "evaluation": 0.05}[kind] * delay)
    if not came:
        return None
    for r in victims:
        if not ranks[r].ended():
            os.killpg(ranks[r].process.pid, signal.SIGKILL)
            ranks[r].process.wait()
    last = events(folder)[-1]
    met = {
        "step": bool(steps(first)),
        "save": bool(unfinished_checkpoints(folder) - before),
        "worker start": not steps(first),
        "evaluation": last["event"] == "train" and last["step"] in evaluations,
    }
    return Kill(kind, victims, met[kind])


def train_and_kill(
    case: Case, whole: Path, folder: Path, kinds: Sequence[str], random: Random
) -> tuple[list[Kill], str]:
    """Train in `folder` with a kill of each of `kinds`, spread over the run -> (kills, the first difference
    from the run in `whole`). There are fewer kills if the run ends early.
    """
    kills: list[Kill] = []
    evaluations = {event["step"] for event in events(whole) if event["event"] == "eval"}
    for number in range(len(kinds) + 1):
        ranks, kill = start(case, folder, number, *KILLED_FLAGS), None
        if number < len(kinds):
            step = (number + random.random()) / len(kinds) * max(evaluations)
            kill = strike(case, ranks, folder, kinds[number], step, evaluations, random)
        in_time, wrong = end(ranks, kill.victims if kill else ())
        if in_time and kill:
            kills.append(kill)
        if wrong and not kills:
            raise UserError(f"{case} does not train at all: {wrong}")
        if wrong:
            kills[-1] = kills[-1]._replace(survived=False)
            return kills, f"start {number + 1} after {kills[-1]}: {wrong}"
        if not in_time:  # the run has ended
            break
    return kills, difference(whole, folder)


def trial(case: Case, kinds: Sequence[str], folder: Path, seed: int) -> tuple[list[Kill], list[str]]:
    """All kills of a case, in as many runs as are needed -> (kills, the difference of each run)."""
    folder.mkdir()
    _, wrong = end(start(case, folder / "whole", 0, "--workers", "0"))
    if wrong:
        raise UserError(f"{case} does not train at all: {wrong}")
    kills: list[Kill] = []
    differences: list[str] = []
    random = Random(f"{seed} {case}")
    while len(kills) < len(kinds):
        run = folder / f"killed-{len(differences)}"
        new, different = train_and_kill(case, folder / "whole", run, kinds[len(kills) :], random)
        if not new:
            raise UserError(f"{case} ended before any kill: a run is too short for this machine")
        kills += new
        differences.append(different)
        print(f"{case}: {len(new)} kills, {different or 'bit-equal'}", flush=True)
    return kills, differences


def campaign(
    kills: int, seed: int, folder: Path, cases: Sequence[Case] = CASES, jobs: int = 1
) -> tuple[list[Kill], list[str]]:
    """Distribute `kills` of the four kinds over the cases -> (kills, the difference of each killed run from
    the uninterrupted run).
    """
    plan: dict[Case, list[str]] = {case: [] for case in cases[:kills]}
    for number, case in zip(range(kills), list(plan) * kills):
        plan[case].append(list(KINDS)[number % len(KINDS)])
    for case, kinds in plan.items():
        Random(f"order {seed} {case}").shuffle(kinds)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(
            pool.map(lambda case: trial(case, plan[case], folder / str(case).replace(" ", ""), seed), plan)
        )
    all_kills = [kill for case_kills, _ in results for kill in case_kills]
    return all_kills, [one for _, differences in results for one in differences]


def table(kills: list[Kill], differences: list[str]) -> str:
    rows = ["| killed | kills | met | survived |", "|---|---|---|---|"]
    for kind, label in [*KINDS.items(), ("", "all")]:
        some = [kill for kill in kills if kind in ("", kill.kind)]
        met, survived = sum(kill.met for kill in some), sum(kill.survived for kill in some)
        rows.append(f"| {label} | {len(some)} | {met} | {survived} |")
    equal = sum(not one for one in differences)
    return "\n".join(
        [
            *rows,
            "",
            f"{sum(k.survived for k in kills)}/{len(kills)} survived; {equal}/{len(differences)} runs ended "
            f"bit-equal. On {machine()}.",
        ]
    )


def main() -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of runs at a time; each rank has one thread"
    )
    args = parser.parse_args()
    if args.kills < 1 or args.jobs < 1:
        raise UserError("--kills and --jobs must be 1 or more")
    if not Path("/proc/self/stat").exists():
        raise UserError("this needs Linux: the processes that a run starts are found in /proc")
    work = Path(tempfile.mkdtemp(prefix="simmatch-kills-"))
    kills, differences = campaign(args.kills, args.seed, work, jobs=args.jobs)
    print(f"\n{table(kills, differences)}")
    if any(differences) or not all(kill.survived for kill in kills):
        print(f"the files of the runs are in {work}")
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    cli_main(main)
