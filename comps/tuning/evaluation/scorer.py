"""Log-likelihoods of items by any number of configurations of one super-adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from transformers import PreTrainedModel

from comps.tuning.elastic.model import ElasticController
from comps.tuning.evaluation import padded
from comps.tuning.evaluation.items import Item, Items
from comps.tuning.evaluation.scores import Configuration, ItemScore, Scores

# (items scored so far, items to score), an item of two configurations counting twice. May raise, to stop.
Progress = Callable[[int, int], None]

_TOKENS = 2048  # in a batch


class Scorer:
    """Scores items by a model, which must be in evaluation mode; with a ``controller`` by configurations.

    What was scored once is remembered, by configuration and item: a slice of items that grows costs only
    what is new in it.
    """

    def __init__(self, model: PreTrainedModel, controller: ElasticController | None = None) -> None:
        self._model, self._controller = model, controller
        self._known: dict[tuple[Configuration | None, str], ItemScore] = {}

    def score(
        self,
        items: Items,
        configurations: Sequence[Configuration | None] = (None,),
        progress: Progress | None = None,
    ) -> list[Scores]:
        """The scores of ``items`` by each of ``configurations``, in order.

        ``None`` is the model as it is: of a super-adapter, what its controller has set. Raises
        :class:`AdapterError` for a configuration that is not in the space.
        """
        wanted = [self._resolved(each) for each in configurations]
        todo = {
            config: [item for item in items if (config, item.key) not in self._known]
            for config in dict.fromkeys(wanted)
        }
        done, total = 0, sum(map(len, todo.values()))
        for config, missing in todo.items():
            with nullcontext() if config is None or self._controller is None else self._controller.at(config):
                for part in self._batches(missing):
                    rows = [row for item in part for row in item.rows]
                    found = iter(padded.score_rows(self._model, rows))
                    for item in part:
                        self._known[config, item.key] = tuple(next(found) for _ in item.rows)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
        return [
            Scores(config, items, tuple(self._known[config, item.key] for item in items)) for config in wanted
        ]

    def _resolved(self, config: Configuration | None) -> Configuration | None:
        if self._controller is None:
            if config is not None:
                raise ValueError("a configuration needs a super-adapter")
            return None
        return self._controller.active if config is None else self._controller.space.check(config)

    @staticmethod
    def _batches(items: Sequence[Item]) -> list[list[Item]]:
        """Items of similar length together."""
        order = sorted(items, key=lambda item: -max(len(row.ids) for row in item.rows))
        found: list[list[Item]] = []
        longest, rows = 0, 0
        for item in order:
            rows += len(item.rows)
            if not found or rows * longest > _TOKENS:
                found.append([])
                longest, rows = max(len(row.ids) for row in item.rows), len(item.rows)
            found[-1].append(item)
        return found
