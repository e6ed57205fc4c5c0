"""Log-likelihoods of items by any number of configurations of one super-adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft import PeftModel
from transformers import PreTrainedModel

from comps.tuning.elastic.model import ElasticController
from comps.tuning.evaluation import tree
from comps.tuning.evaluation.engine import Engine
from comps.tuning.evaluation.items import Item, Items
from comps.tuning.evaluation.scores import Configuration, ItemScore, Scores

# (items scored so far, items to score), an item of two configurations counting twice. May raise, to stop.
Progress = Callable[[int, int], None]

TOKENS = 1024  # in a batch
COPIES = 8  # configurations in a batch
_WORTH_SHARING = 0.1  # of the way through the layers


class Scorer:
    """Scores items by a model, which must be in evaluation mode; with a ``controller`` by configurations.

    What was scored once is remembered, by configuration and item: a slice of items that grows costs only
    what is new in it, until :meth:`forget`. ``way``: how, see
    :class:`~comps.tuning.evaluation.engine.Engine`; the fastest that the model allows, unless a slower one is
    asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        controller: ElasticController | None = None,
        *,
        way: str = "fused",
        tokens: int = TOKENS,
        copies: int = COPIES,
    ) -> None:
        self._controller = controller
        self._engine = Engine(model, controller, way)
        self._tokens, self._copies = tokens, copies if self._engine.way == "fused" else 1
        self._known: dict[tuple[Configuration | None, str], ItemScore] = {}

    @property
    def way(self) -> str:
        """How items are scored: ``fused``, ``packed`` or ``padded``."""
        return self._engine.way

    @property
    def known(self) -> dict[tuple[Configuration | None, str], ItemScore]:
        """What was scored, by configuration and :attr:`Item.key`; more may be put in."""
        return self._known

    def forget(self) -> None:
        """Free what is remembered."""
        self._known.clear()

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
        missing: dict[tuple[Configuration | None, ...], list[Item]] = {}  # by who has not scored them
        for item in {item.key: item for item in items}.values():
            configs = tuple(c for c in dict.fromkeys(wanted) if (c, item.key) not in self._known)
            missing.setdefault(configs, []).append(item)
        done, total = 0, sum(len(configs) * len(each) for configs, each in missing.items())
        for configs, each in missing.items():
            for chosen in self._together(configs):
                for batch in self._batches(each):
                    found = self._engine.score(batch, chosen)
                    for config, scores in zip(chosen, found, strict=True):
                        for item, score in zip(batch, scores, strict=True):
                            self._known[config, item.key] = score
                    done += len(batch) * len(chosen)
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

    def _together(self, configs: Sequence[Configuration | None]) -> list[list[Configuration | None]]:
        """Those that agree in the first layers, and so compute these once, are scored side by side; to put
        others into one batch gains nothing."""
        if self._controller is None:
            return [[config] for config in configs]
        groups = self._controller.space.groups
        order = sorted(range(len(groups)), key=lambda place: groups[place].layer)
        found: list[list[Configuration | None]] = []
        before: list[int] = []
        for ranks, config in sorted(
            ([(config or ())[place] for place in order], config) for config in configs
        ):
            pairs = enumerate(zip(before, ranks, strict=False))
            shared = next((place for place, (one, other) in pairs if one != other), len(before))
            if not found or len(found[-1]) == self._copies or shared < _WORTH_SHARING * len(order):
                found.append([])
            found[-1].append(config)
            before = ranks
        return found

    def _batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Items of similar length together: at most so many tokens, of which none is padding."""
        if self.way == "padded":
            sizes = [max(len(row.ids) for row in item.rows) * len(item.rows) for item in items]
        else:
            sizes = tree.sizes(items)
        order = sorted(range(len(items)), key=lambda place: -sizes[place])
        found: list[list[Item]] = []
        room = 0
        for place in order:
            if not found or sizes[place] > room:
                found.append([])
                room = self._tokens
            room -= sizes[place]
            found[-1].append(items[place])
        return found
