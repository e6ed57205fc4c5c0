"""What a configuration scored on some items, and the metrics of it, with standard errors. Needs no torch.

Metrics over items of several choices, as lm-evaluation-harness 0.4.13 defines them:

- ``acc``: the choice of the largest log-likelihood is the right one (of equal ones the first is chosen);
- ``acc_norm``: the same of log-likelihoods divided by the choice's length in characters;
- ``acc_bytes``: divided by its length in bytes;

their standard error is the sample's standard deviation over the root of n. Over the right rows (or the only
ones):

- ``loss``: the mean negative log-likelihood of a scored token; ``token_accuracy``: the share of them that are
  the most likely ones. Both are ratios of sums over items; the standard error is that of a ratio estimator,
  ``sqrt(sum((y_i - R x_i)^2) / (n (n - 1))) / mean(x)`` (Cochran, Sampling Techniques, chapter 6);
- ``perplexity``: ``exp(loss)``, its error by the delta method.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comps.tuning.evaluation.items import Item, Items

Configuration = tuple[int, ...]
CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes")
TOKEN_METRICS = ("loss", "perplexity", "token_accuracy")
LOWER_IS_BETTER = ("loss", "perplexity")


@dataclass(frozen=True)
class Metric:
    """A value and its standard error (``nan`` for a single item)."""

    value: float
    stderr: float


@dataclass(frozen=True)
class RowScore:
    """Of one row: the sum of its scored tokens' log-likelihoods, how many they are, and how many of them
    are the most likely ones."""

    log_likelihood: float
    tokens: int
    greedy: int


ItemScore = tuple[RowScore, ...]


@dataclass(frozen=True)
class Scores:
    """``results`` of ``items`` in order, by ``configuration`` (``None``: the model as it is)."""

    configuration: Configuration | None
    items: Items
    results: tuple[ItemScore, ...]

    def metric(self, name: str) -> Metric:
        """Raises ``ValueError`` for an unknown name, or a choice's metric of items without choices."""
        if name in CHOICE_METRICS:
            return mean(self.per_item(name))
        pairs = [self._right(item, score) for item, score in zip(self.items, self.results, strict=True)]
        tokens = [float(each.tokens) for each in pairs]
        if name == "token_accuracy":
            return ratio([float(each.greedy) for each in pairs], tokens)
        loss = ratio([-each.log_likelihood for each in pairs], tokens)
        if name == "loss":
            return loss
        if name == "perplexity":
            value = math.exp(min(loss.value, 700.0))
            return Metric(value, value * loss.stderr)
        raise ValueError(f"{name!r} is no metric of log-likelihoods")

    def per_item(self, name: str) -> list[float]:
        """A value for each item, for paired comparisons: 0 or 1 for the accuracies, else the item's mean
        over its tokens."""
        pairs = zip(self.items, self.results, strict=True)
        if name in CHOICE_METRICS:
            return [float(_chosen(item, score, name) == item.answer) for item, score in pairs]
        rows = [self._right(item, score) for item, score in pairs]
        if name == "token_accuracy":
            return [row.greedy / max(1, row.tokens) for row in rows]
        losses = [-row.log_likelihood / max(1, row.tokens) for row in rows]
        if name == "loss":
            return losses
        if name == "perplexity":
            return [math.exp(min(loss, 700.0)) for loss in losses]
        raise ValueError(f"{name!r} is no metric of log-likelihoods")

    def records(self) -> Iterator[dict[str, Any]]:
        """One object for each item, for a file."""
        for item, score in zip(self.items, self.results, strict=True):
            record: dict[str, Any] = {"item": item.where}
            if item.answer is not None:
                record["answer"] = item.answer
                for name in CHOICE_METRICS:
                    chosen = _chosen(item, score, name)
                    record[name] = int(chosen == item.answer)
                    record[name.replace("acc", "chosen")] = chosen
                record["log_likelihoods"] = [row.log_likelihood for row in score]
            else:
                (row,) = score
                record |= {"log_likelihood": row.log_likelihood, "tokens": row.tokens, "greedy": row.greedy}
            yield record

    @staticmethod
    def _right(item: Item, score: ItemScore) -> RowScore:
        return score[item.answer or 0]


def _chosen(item: Item, score: ItemScore, name: str) -> int:
    if item.answer is None:
        raise ValueError(f"{item.where}: {name} needs choices")
    values = [row.log_likelihood for row in score]
    if name != "acc":
        lengths = item.characters if name == "acc_norm" else item.bytes
        values = [value / length for value, length in zip(values, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)  # of equal ones the first


def mean(values: Sequence[float]) -> Metric:
    """The mean, with its standard error."""
    count = len(values)
    middle = math.fsum(values) / count
    if count < 2:
        return Metric(middle, math.nan)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    return Metric(middle, math.sqrt(variance / count))


def ratio(above: Sequence[float], below: Sequence[float]) -> Metric:
    """``sum(above) / sum(below)``, with its standard error over items."""
    count, total = len(above), math.fsum(below)
    value = math.fsum(above) / total
    if count < 2:
        return Metric(value, math.nan)
    rest = math.fsum((y - value * x) ** 2 for y, x in zip(above, below, strict=True))
    return Metric(value, math.sqrt(rest / (count * (count - 1))) / (total / count))
