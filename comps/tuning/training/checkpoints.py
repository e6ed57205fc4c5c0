"""Checkpoints: published whole with a manifest of sizes and hashes, and found again when they are good."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comps.tuning import rundir
from comps.tuning.failpoints import failpoint

MANIFEST = "checkpoint.json"
# What the Trainer writes beside the checkpoint proper: a pickle that nobody should be invited to load,
# and a model card of placeholders.
_UNWANTED = ("training_args.bin", "README.md")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def publish(written: Path, output: Path, step: int, metrics: dict[str, Any]) -> Path:
    """Seal the checkpoint directory ``written`` and move it to ``output/checkpoint-<step>``.

    ``metrics`` go into the manifest beside the name, size and SHA-256 of every file. Returns the final path.
    """
    for name in _UNWANTED:
        (written / name).unlink(missing_ok=True)
    files = {
        path.relative_to(written).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(written.rglob("*"))
        if path.is_file()
    }
    failpoint("checkpoint-written")
    rundir.write_json(written / MANIFEST, {"step": step, "metrics": metrics, "files": files})
    final = output / f"{rundir.CHECKPOINT_PREFIX}{step}"
    failpoint("manifest-written")
    rundir.publish_directory(written, final)
    failpoint("checkpoint-published")
    return final


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; ``None`` when it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be read ({error})"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"{name} has changed since it was written"
    # Hidden files are those of file systems and people; nothing reads them.
    present = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    visible = {path.as_posix() for path in present if not path.name.startswith(".")}
    if added := visible - files.keys() - {MANIFEST}:
        return f"{min(added)} was added after it was written"
    return None


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint, if any, and the damaged newer ones that were passed over."""

    path: Path | None
    damaged: dict[Path, str]


def steps(output: Path) -> dict[int, Path]:
    """All published checkpoints of a run by step, ascending."""
    prefix = rundir.CHECKPOINT_PREFIX
    found = {
        int(path.name.removeprefix(prefix)): path
        for path in output.glob(f"{prefix}*")
        if path.is_dir() and path.name.removeprefix(prefix).isdecimal()
    }
    return dict(sorted(found.items()))


def newest_good(output: Path) -> Found:
    """Look from the newest checkpoint backwards for one that is whole."""
    damaged: dict[Path, str] = {}
    for path in reversed(steps(output).values()):
        reason = damage(path)
        if reason is None:
            return Found(path, damaged)
        damaged[path] = reason
    return Found(None, damaged)
