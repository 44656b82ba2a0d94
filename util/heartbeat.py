"""Heartbeats of the ranks in a key-value store, so that a rank that hangs or has ended can be named.

They need neither a process group nor the main thread, which may be waiting inside NCCL.
"""

import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from util.errors import exit_at_once
from util.run.preempt import signals_blocked

PERIOD = 1.0  # seconds between two heartbeats of a rank
SILENT_SECONDS = 10.0  # a process without a heartbeat for so long is stopped, or it was killed


@dataclass
class Seen:
    """What this rank last read of a rank. Times are those of `Heartbeat.clock`."""

    beats: int = 0
    progress: int = 0
    phase: str = "start-up"
    lost: list[int] = field(default_factory=list)  # the ranks that it waited for when it gave up
    ended: bool = False
    beats_at: float = 0.0  # when `beats` last changed
    progress_at: float = 0.0  # when `progress` last changed

    def update(self, value: bytes, clock: float) -> None:
        before = self.beats, self.progress
        self.beats, self.progress, self.phase, self.lost, self.ended = json.loads(value)
        self.beats_at = self.beats_at if self.beats == before[0] else clock
        self.progress_at = self.progress_at if self.progress == before[1] else clock


class Heartbeat:
    """Publishes how far this rank is, and ends this process when it has waited too long for another rank.

    The progress of a rank is the number of phases and collectives that it has begun; all ranks begin the same
    ones, in the same order. A rank that waits for others makes no progress either, but those are behind it.
    A heartbeat itself shows only that the process runs.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float, rank_0_keeps_store: bool):
        """store: has the methods of torch.distributed.Store, and is used by nothing else. timeout: how long a
        rank waits for another one, in seconds. rank_0_keeps_store: otherwise torchrun does.
        """
        self.store, self.rank, self.timeout = store, rank, timeout
        self.rank_0_keeps_store = rank_0_keeps_store
        self.keys = [f"heartbeat {r}" for r in range(world)]
        self.hostnames = [""] * world
        self.seen = [Seen() for _ in self.keys]
        self.absent: list[int] = []  # the ranks that `wait_for_all` waits for
        # Seconds since `start`, without those in which this process was stopped, as Slurm may do with a job.
        self.clock = 0.0
        self.answered_at = 0.0  # when the store last answered
        self.beats, self.progress, self.phase, self.progress_at = 0, 0, "start-up", 0.0
        self.lost: list[int] = []  # see Seen
        self.parent = 0  # see `start`
        self.decision = threading.Lock()  # held by the thread that ends this process
        self.stopped = threading.Event()
        # Two threads, because a store that is stopped with rank 0 never answers.
        self.exchange = threading.Thread(target=self._exchange, daemon=True)
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def wait_for_all(self) -> None:
        """Wait until every rank has called this."""
        self._publish()
        while not self.store.check(self.keys):
            self.absent = [r for r, key in enumerate(self.keys) if not self.store.check([key])]
            time.sleep(0.1)
        self.absent = []

    def start(self, hostnames: list[str], parent: int) -> None:
        """hostnames: by rank. parent: the process whose end also ends this one; 0: there is none."""
        self.hostnames, self.parent = hostnames, parent
        with signals_blocked():  # so that the main thread gets all signals
            self.exchange.start()
            self.watch.start()

    def stop(self) -> None:
        """End the threads. Rank 0, which ends the store with its process, first waits until no other rank
        uses it, but no longer than the others need to notice that.
        """
        self.stopped.set()
        if not self.exchange.ident:
            return
        self.watch.join(PERIOD)
        self.exchange.join(3 * PERIOD)
        if self.rank == 0 and self.rank_0_keeps_store and not self.exchange.is_alive():
            for _ in range(20):
                self._read()
                if all(seen.ended for seen in self.seen):
                    return
                time.sleep(PERIOD / 10)

    def advance(self, phase: str = "") -> None:
        """Count the beginning of a phase or, without a name, of a collective."""
        self.phase = phase or self.phase
        self.progress += 1
        self.progress_at = self.clock

    def explain(self, timed_out: bool) -> str:
        """Return a line that names the ranks which made a collective fail, or "" if there are none. The
        caller must end this process, because the other ranks read which ranks are lost, and end too.

        timed_out: whether the collective failed because another rank did not come in time.
        """
        self.decision.acquire()  # and never released
        line = ""
        end = self.clock + SILENT_SECONDS + 3 * PERIOD  # a rank that was killed just now is silent then
        while not line and self.clock < end and not self.stopped.wait(PERIOD / 4):
            line = self._verdict(0, self.timeout)
        if not line and timed_out:
            line = self._verdict(0, 0)
        time.sleep(3 * PERIOD)  # until the others have read it, because rank 0 may keep the store
        return line

    def _publish(self) -> None:
        self.beats += 1
        state = [self.beats, self.progress, self.phase, self.lost, self.stopped.is_set()]
        self.store.set(self.keys[self.rank], json.dumps(state))

    def _read(self) -> None:
        for seen, value in zip(self.seen, self.store.multi_get(self.keys), strict=True):
            seen.update(value, self.clock)
        self.answered_at = self.clock

    def _exchange(self) -> None:
        """Publish and read, until the store is going to end: using it then prints a warning."""
        try:
            while not self.stopped.is_set():
                self._publish()
                self._read()
                if any(seen.lost for seen in self.seen) or (self.rank_0_keeps_store and self.seen[0].ended):
                    return
                self.stopped.wait(PERIOD)
            self._publish()
        except RuntimeError:
            pass  # the store has ended; `_verdict` sees that it does not answer

    def _watch(self) -> None:
        while not self.stopped.wait(PERIOD):
            self.clock += PERIOD
            if not self.decision.acquire(blocking=False):
                continue  # `explain` needs the clock
            if self.parent and os.getppid() != self.parent:
                exit_at_once(f"{self._name(self.rank)} ends because the process that started it has ended")
            waits = self.clock - self.progress_at >= self.timeout
            given_up = any(seen.lost for seen in self.seen)
            if (waits or given_up) and (line := self._verdict(self.timeout, self.timeout)):
                time.sleep(3 * PERIOD)  # as in `explain`
                exit_at_once(line)
            self.decision.release()

    def _verdict(self, silent_for: float, behind_for: float) -> str:
        """Return a line that names the lost ranks, and publish them; "" if no rank is lost.

        Lost are the ranks that another rank has published as lost; else rank 0, if the store that it keeps
        has ended; else the ranks that are silent and have made no progress for `silent_for` seconds; else the
        slowest of those which are behind this one and have made no progress for `behind_for` seconds.
        """
        published = next((seen.lost for seen in self.seen if seen.lost), [])
        no_store = self.clock - self.answered_at > max(SILENT_SECONDS, silent_for)
        if no_store and not published and not self.rank_0_keeps_store:
            return f"{self._name(self.rank)} lost the connection to torchrun: look at its last output"
        no_store = self.rank_0_keeps_store and (no_store or self.seen[0].ended)
        ranks = [r for r in range(len(self.seen)) if r != self.rank]
        # Until the last answer: later nothing is known of the others.
        stuck = [self.answered_at - seen.progress_at for seen in self.seen]
        silent = [seen.ended or self.answered_at - seen.beats_at > SILENT_SECONDS for seen in self.seen]
        gone = [r for r in ranks if silent[r] and stuck[r] >= silent_for]
        behind = [r for r in ranks if self.seen[r].progress < self.progress and stuck[r] >= behind_for]
        least = min((self.seen[r].progress for r in behind), default=0)
        slowest = [r for r in behind if self.seen[r].progress == least]
        self.lost = published or ([0] if no_store else gone or slowest)
        if not self.lost:
            return ""
        if self.rank in self.lost:
            return f"{self._name(self.rank)} hangs in {self.phase}: the other ranks timed out waiting for it"
        names = ", ".join(map(self._name, self.lost))
        phases = "; ".join(dict.fromkeys(self.seen[r].phase for r in self.lost))
        return (
            f"{self._name(self.rank)} timed out waiting for {names}, which hangs or has ended (last seen in "
            f"{phases}): look at its last output and at its machine. The same command continues from the "
            "last checkpoint"
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hostnames[rank]}"
