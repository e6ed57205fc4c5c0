"""What a search scores, and by what: the super-adapter on its base model, and the items in their order."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from comps.tuning.data.dataset import build_datasets
from comps.tuning.data.masking import IGNORED
from comps.tuning.data.tokenise import Row
from comps.tuning.elastic.model import ElasticController, load_adapter, make_elastic
from comps.tuning.elastic.read_space import load_space
from comps.tuning.elastic.space import SearchSpace
from comps.tuning.errors import AdapterError, DataError
from comps.tuning.evaluation.items import Item, Items
from comps.tuning.evaluation.questions import read_questions
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.export.adapter import read_adapter
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.search.ledger import Config
from comps.tuning.spec import SearchSpec

MACS_TOKENS = 256  # of the forward pass whose multiply-accumulates are counted
FEWEST_ITEMS = 8
_ITEMS = 300  # for the search, at most, unless the spec says otherwise


@dataclass(frozen=True)
class Candidates:
    """A super-adapter that can be scored at any configuration.

    ``items``: all of them, in an order that does not depend on the search; ``searched``: how many of the
    first are for the search itself. ``key``: what values depend on. ``plain``: the adapter's weights that are
    not elastic; ``linear``: those of the base model's linear layers.
    """

    space: SearchSpace
    items: Items
    searched: int
    metric: str
    key: str
    plain: int
    linear: int
    scorer: Scorer

    @property
    def sign(self) -> int:
        """What values are multiplied by, so that higher is better."""
        return -1 if self.metric == "loss" else 1

    def parameters(self, config: Config) -> int:
        """The weights of the sub-adapter."""
        return self.space.parameters(config) + self.plain

    def macs(self, config: Config) -> int:
        """Multiply-accumulates of the linear layers in one forward pass of 256 tokens, adapter included."""
        return MACS_TOKENS * (self.linear + self.parameters(config))

    def score(
        self, configs: Sequence[Config], first: int, last: int, progress: Callable[[int, int], None]
    ) -> list[list[float]]:
        """The values of the items from ``first`` up to ``last``. ``progress`` may raise, to stop."""
        found = self.scorer.score(self.items[first:last], configs, progress)
        self.scorer.forget()  # the search's ledger remembers
        values = [scores.per_item(self.metric) for scores in found]
        if not all(math.isfinite(value) for each in values for value in each):
            raise AdapterError(
                "the model's log-likelihoods are not finite numbers; has its training diverged?"
            )
        return values


def open_candidates(spec: SearchSpec) -> Candidates:
    """Load base model and super-adapter, read and tokenise the items.

    Raises :class:`TuningError` for what a person can change.
    """
    adapter = read_adapter(spec.super_adapter)
    space = load_space(spec.super_adapter, adapter)  # before anything that takes long
    tokenizer = load_tokenizer(spec.base_model)
    base = load_base_model(spec.base_model, device=spec.resources.device)
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear | Conv1D))
    items, metric = _items(spec, tokenizer, base)
    fingerprint = _fingerprint(base)
    model, controller = load_elastic(base, spec.super_adapter, space)
    elastic = space.ranks
    plain = sum(m.rank * m.parameters_per_rank for name, m in adapter.modules.items() if name not in elastic)
    with open(adapter.weights, "rb") as stream:
        weights = hashlib.file_digest(stream, "sha256").hexdigest()
    about = hashlib.sha256(f"{weights}/{json.dumps(adapter.config, sort_keys=True)}/{fingerprint}".encode())
    searched = min(spec.items or min(_ITEMS, -(-2 * len(items) // 3)), len(items))
    # Of all items: their order is the same for every search.
    key = f"{about.hexdigest()}/{items.hash}/{metric}"
    items = items[: max(searched, spec.all_items or 4 * searched)]
    return Candidates(space, items, searched, metric, key, plain, linear, Scorer(model, controller))


def _fingerprint(model: nn.Module) -> str:
    """A hash of about a thousand numbers of each weight: of another base model it is another one."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 1000)].float().cpu()
        digest.update(f"{name}{list(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def load_elastic(
    base: PreTrainedModel, super_adapter: Path, space: SearchSpace
) -> tuple[peft.PeftModel, ElasticController]:
    """The super-adapter on ``base``, its ranks elastic, in evaluation mode."""
    model = load_adapter(base, super_adapter)
    return model, make_elastic(model, space)


def _items(spec: SearchSpec, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> tuple[Items, str]:
    """All items in a drawn order, the same for every search, and the metric."""
    metric: str = spec.metric or "loss"
    if spec.validation_file is None:
        items = _held_out(spec, tokenizer)
    else:
        questions = read_questions(
            spec.validation_file, spec.validation_name, texts=spec.texts, choices=metric in ("acc",
            "acc_norm"), max_bytes=spec.data.max_record_bytes,
        )  # fmt: skip
        if spec.metric is None and all(question.choices for question in questions):
            metric = "acc_norm"
        if metric == "loss":
            items = Items.responses(questions, tokenizer, spec.data)
        else:
            items = Items.choices(
                questions, tokenizer, getattr(model.config, "max_position_embeddings", None)
            )
    if len(items) < FEWEST_ITEMS:
        raise DataError(
            f"{spec.validation_name or 'what the training held out'} has {len(items)} usable record(s); to "
            f"tell sub-adapters apart takes at least {FEWEST_ITEMS}, and some hundreds to do it well; give a "
            "larger validation_file",
            param="validation_file",
        )
    order = list(range(len(items)))
    random.Random("items").shuffle(order)
    return Items(items[place] for place in order), metric


def _held_out(spec: SearchSpec, tokenizer: PreTrainedTokenizerBase) -> Items:
    """The rows that the training has validated on."""
    if spec.metric not in (None, "loss"):
        raise DataError(
            f"the records that the training held out have no choices, so {spec.metric} cannot be told of "
            "them; use the metric loss, or give a validation_file of questions",
            param="metric",
        )
    rows = build_datasets(spec.data, spec.task, tokenizer, spec.data_seed).validation
    if rows is None:
        raise DataError("the training held nothing out; give a validation_file", param="validation_file")
    return Items(
        Item((Row(row["input_ids"], [label != IGNORED for label in row["labels"]]),), f"validation row {n}")
        for n, row in enumerate(rows, start=1)
    )


def set_threads(cpus: int | None) -> None:
    """Compute on so many cores."""
    if cpus:
        torch.set_num_threads(cpus)
