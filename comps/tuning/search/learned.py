"""The sub-adapter that the training itself speaks for: ``learned``, which no evaluation was needed for.

``nls_learned.json`` in a finished job's output has its ranks; it is fitted on ``nls_statistics.jsonl`` (see
:mod:`comps.tuning.search.additive`). Reading it needs neither torch nor numpy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from comps.tuning.elastic.space import SearchSpace
from comps.tuning.errors import AdapterError
from comps.tuning.export.adapter import read_json
from comps.tuning.rundir import write_json

if TYPE_CHECKING:
    from comps.tuning.search.additive import AdditiveModel

VERSION = "learned"
FILE = "nls_learned.json"
STATISTICS = "nls_statistics.jsonl"
FEWEST_STEPS = 10


def load_model(directory: Path, space: SearchSpace) -> AdditiveModel:
    """The model of the super-adapter in ``directory``, fitted on the statistics that lie there.

    Raises :class:`AdapterError` when there are none, too few, or those of another space.
    """
    import numpy as np

    from comps.tuning.search.additive import fit

    path = directory / STATISTICS
    where = f"{directory.name}/{STATISTICS}"
    if not path.is_file():
        raise AdapterError(
            f"{directory.name} has no {STATISTICS}, so nothing was learned of its ranks: it was trained "
            "before this was noted, or elsewhere, or with several configurations in a step"
        )
    places = [{rank: index for index, rank in enumerate(group.ranks)} for group in space.groups]
    choices, losses, labels = [], [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)
            if step["loss"] is None:
                continue
            choices.append([place[rank] for place, rank in zip(places, step["config"], strict=True)])
            losses.append(float(step["loss"]))
            labels.append(int(step["labels"]))
        except (ValueError, KeyError, TypeError) as error:
            raise AdapterError(f"{where} does not fit the search space: {error!r}") from error
    if len(losses) < FEWEST_STEPS:
        raise AdapterError(f"{where} has {len(losses)} steps; to learn from them takes {FEWEST_STEPS}")
    return fit(space, np.array(choices), np.array(losses), np.array(labels))


def write(directory: Path, space: SearchSpace) -> None:
    """Fit the model on the statistics in ``directory`` and write what it speaks for beside them.

    Nothing is written when the training was too short to tell.
    """
    from comps.tuning.search.additive import cheapest

    try:
        model = load_model(directory, space)
    except AdapterError:
        return
    effects = model.effects
    choice = cheapest(effects, [0 * of_group for of_group in effects])
    config = [group.ranks[index] for group, index in zip(space.groups, choice, strict=True)]
    write_json(
        directory / FILE,
        {"config": config, "steps": model.steps, "explained": model.explained,
         "effects": [of_group.tolist() for of_group in effects]},
    )  # fmt: skip


def read(directory: Path, space: SearchSpace) -> tuple[int, ...]:
    """The ranks of ``learned``. Raises :class:`AdapterError`, also when there is no such file."""
    path = directory / FILE
    if not path.is_file():
        raise AdapterError(
            f"there is no version {VERSION!r}: it takes a training of at least {FEWEST_STEPS} steps by this "
            "service, with one configuration in each",
            param="adapter_version",
        )
    content = read_json(path)
    try:
        config = [int(rank) for rank in content["config"]]
    except (TypeError, KeyError, ValueError) as error:
        raise AdapterError(f"{directory.name}/{FILE} is damaged: {error!r}") from error
    return space.check(config)
