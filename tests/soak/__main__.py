"""``python -m tests.soak --minutes 60 --seed N``: a real service with its own Ray, in random use and trouble.

What is done is decided by the seed and printed; at the end everything is checked, and each violation is a
sentence. Exit code 1 when there is any. The last half of the time leaves the service's own process alone,
to see whether its memory is flat.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

from tests.fixtures_models import save_tiny_model
from tests.soak.bodies import MODEL
from tests.soak.clients import Client, can_pause
from tests.soak.report import inspect, print_table, write_summary
from tests.soak.trouble import STOP_SECONDS, Trouble
from tests.soak.watch import Health, Memory
from tests.soak.world import World

CLIENTS = 3
# Jobs are given up when none of them has moved for so long, and in any case after so long.
STUCK_SECONDS, SETTLE_SECONDS = 300.0, 2400.0


def finish(threads: list[Client | Trouble | Health | Memory]) -> None:
    """Let what they are doing come to its end."""
    for thread in threads:
        thread.done.set()
    for thread in threads:
        thread.join()


def unsettled(world: World) -> tuple[list[tuple[str, str]], int]:
    """Id and status of the jobs that have not ended, or whose processes are not known to be gone; and a
    number that changes with everything that happens to any of them."""
    with closing(sqlite3.connect(world.data_dir / "finetuning.db")) as database:
        query = (
            "SELECT id, status FROM jobs WHERE status NOT IN ('succeeded', 'failed', 'cancelled') "
            "OR submission_id IS NOT NULL AND NOT stopped"
        )
        (newest,) = database.execute("SELECT max(sequence) FROM events").fetchone()
        return database.execute(query).fetchall(), newest or 0


def settle(world: World) -> None:
    """Resume what is paused, and wait until all jobs have ended, or nothing has happened for too long."""
    began = moved = time.monotonic()
    before = -1
    with world.client() as http:
        while time.monotonic() - moved < STUCK_SECONDS and time.monotonic() - began < SETTLE_SECONDS:
            left, now = unsettled(world)
            if not left:
                break
            if now != before:
                before, moved = now, time.monotonic()
            for job_id, status in left:
                if status == "paused":
                    world.ask(http, "POST", f"/v1/fine_tuning/jobs/{job_id}/resume", (200, 409))
            time.sleep(2)
    world.say("soak", f"{len(left)} jobs have not settled" if left else "all jobs have settled")


def stop(world: World) -> None:
    """Once more with a start in between, which tidies up after earlier kills."""
    for again in (True, False):
        world.up = False
        code = world.service.stop(STOP_SECONDS)
        if code != 0:
            world.violation(f"the service ended with exit code {code} at the end")
        if again:
            world.service.start()


def soak(directory: Path, minutes: float, seed: int, summary: Path) -> int:
    """Returns the number of violations."""
    save_tiny_model(directory / "data" / "models" / MODEL)
    world = World(directory)
    with closing(world.service):
        pausing = can_pause(world)
        if not pausing:
            world.say("soak", "pause and resume are skipped: this service has no such routes")
        seconds = 60 * minutes
        # A minute is long enough to try everything out, an hour for some rest in between.
        pause = max(0.5, min(4.0, seconds / 120))
        clients = [Client(world, f"client-{n}", seed, pause, pausing) for n in range(CLIENTS)]
        trouble = Trouble(world, seed, min(90.0, seconds / 6), world.began + seconds / 2)
        health, memory = Health(world), Memory(world)
        for thread in (*clients, trouble, health, memory):
            thread.start()
        threading.Event().wait(seconds)
        world.say("soak", "no more trouble from now on")
        finish([trouble, *clients])
        if world.up:
            settle(world)
            finish([health, memory])
            stop(world)
        else:
            world.violation("the service could not be started again")
            finish([health, memory])
        facts, found = inspect(world, health, memory, seed)
    print_table(facts, found)
    write_summary(summary, facts | {"minutes": minutes}, found)
    return sum(map(len, found.values()))


def main() -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--summary", type=Path, default=Path("build/soak.json"), help="what came out, as JSON"
    )
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    violations = soak(directory, arguments.minutes, arguments.seed, arguments.summary)
    if violations:
        print(f"\n{violations} violations; everything is left in {directory}")
        return 1
    shutil.rmtree(directory)
    print("\nno violations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
