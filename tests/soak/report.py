"""All checks of a soak that has come to its end, and the table of what they found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.service_process import ROOT
from tests.soak import history, leftovers, numbers
from tests.soak.bodies import MODEL
from tests.soak.record import Record, read_record
from tests.soak.watch import Health, Memory
from tests.soak.world import World

ADAPTERS = 40  # loaded at most

Found = dict[str, list[str]]


def unusable_results(record: Record, seed: int) -> tuple[int, list[str]]:
    """How many of the adapters and merged models were loaded, and which cannot be used."""
    made = [[row["id"], row["kind"], row["path"]] for row in record.models if row["job_id"]]
    chosen = random.Random(seed).sample(sorted(made), min(ADAPTERS, len(made)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak.adapters", str(record.data_dir / "models" / MODEL)],
        cwd=ROOT, input=json.dumps(chosen), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return 0, [f"the results could not be loaded: {done.stderr[-2000:]}"]
    return len(chosen), [f"{name} cannot be used: {why}" for name, why in json.loads(done.stdout).items()]


def logged_errors(log: str) -> list[str]:
    """Each error that the service has logged, once, with how often; what is no log line is one, too."""
    errors: Counter[str] = Counter()
    for line in log.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            errors[line[:300]] += 1
            continue
        if entry["level"] in ("error", "critical"):
            last = entry.get("traceback", "").strip().rpartition("\n")[2]
            errors[f"{entry['message']} {last}".strip()[:500]] += 1
    return [f"the service logged {count} time(s): {message}" for message, count in errors.items()]


def inspect(world: World, health: Health, memory: Memory, seed: int) -> tuple[dict[str, Any], Found]:
    """Numbers, and the violations by check. The service must have ended."""
    record = read_record(world.data_dir)
    promises = world.promises
    kept = {*promises.files} - promises.deleted_files
    # Each kill may catch every client between the bytes of its file and the row.
    kills = world.counts["kill_service"] + world.counts["kill_service_and_ray"]
    loaded, unusable = unusable_results(record, seed)
    health_numbers, slow = numbers.health(health.seconds)
    lives, grown = numbers.memory(memory.samples)
    ends = Counter(f"{promises.jobs.get(job['id'], 'unanswered')} {job['status']}" for job in record.jobs)
    found = {
        "while it ran": world.violations,
        "every job has ended": history.unfinished(record),
        "every history is legal": history.illegal_histories(record),
        "nothing answered is forgotten": history.forgotten(record, promises.jobs, kept),
        "every end is as expected": history.unexpected_ends(record, promises.jobs),
        "every event once": history.lost_lines(record),
        "the database is whole": record.damage,
        f"{loaded} results load with stock PEFT": unusable,
        "health in time": slow,
        "memory is flat": grown,
        "no errors logged": logged_errors(world.service.log),
        "no process is left": leftovers.left_processes(world.data_dir),
        "no bytes without a row": leftovers.unknown_bytes(record, orphans_allowed=3 * kills),
        "no row without bytes": leftovers.missing_bytes(record),
    }
    facts = {
        "seed": seed,
        "health seconds": health_numbers,
        "memory by life": lives,
        "start seconds": world.starts,
        "jobs by kind and end": dict(sorted(ends.items())),
        "attempts": sum(job["attempt"] for job in record.jobs),
        "done": dict(sorted(world.counts.items())),
        "rows": {name: len(getattr(record, name)) for name in ("jobs", "files", "models", "checkpoints")},
    }
    return facts, found


def print_table(facts: dict[str, Any], found: Found) -> None:
    """For people; the same as JSON goes to a file."""
    print("\n| job | ended as | |\n|---|---|---|")
    for name, count in facts["jobs by kind and end"].items():
        kind, _, status = name.rpartition(" ")
        print(f"| {kind} | {status} | {count} |")
    print(f"\nhealth, seconds: {facts['health seconds']}")
    print(f"starts, seconds: {facts['start seconds']}")
    for life in facts["memory by life"]:
        if "rss first" in life:
            first, last = life["rss first"] / 1e6, life["rss last"] / 1e6
            files = f"{life['files first']:.0f} -> {life['files last']:.0f} files"
            print(f"life {life['life']}, {life['seconds']} s: {first:.1f} -> {last:.1f} MB, {files}")
    print("\n| check | violations |\n|---|---|")
    for name, sentences in found.items():
        print(f"| {name} | {len(sentences) or 'none'} |")
    for name, sentences in found.items():
        for sentence in sentences:
            print(f"{name}: {sentence}")


def write_summary(path: Path, facts: dict[str, Any], found: Found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | {"violations": found}, indent=2) + "\n", encoding="utf-8")
