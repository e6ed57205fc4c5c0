"""How one model scores batches of items: the fastest way that gives what the plain one gives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from comps.tuning.data.tokenise import Row
from comps.tuning.elastic.model import ElasticController
from comps.tuning.evaluation import padded, tree
from comps.tuning.evaluation.decoder import TreeDecoder, plan
from comps.tuning.evaluation.items import Item
from comps.tuning.evaluation.scores import Configuration, ItemScore, RowScore
from patches.transformers_layers import decoder_layers, replace_forward, restore_forward

log = logging.getLogger(__name__)

# How far a row's log-likelihood may be off in float32: so much, and so much of the mean one.
_TOLERANCE, _RELATIVE = 1e-4, 1e-5
_LOWER_PRECISION = 0.05  # of the mean one, in other types
_LONGEST = 4096  # tokens of an item; what sees what is a matrix of their square
# Settings of attention that depends on places in the batch, or on lengths that a trial does not reach.
_BY_PLACE = ("attention_chunk_size", "attn_temperature_tuning", "keep_window_size", "index_topk")


class Engine:
    """Scores batches by ``model``. Which way was found in a trial at the start:

    ``fused``: packed trees through our own layers, several configurations at once; ``packed``: packed trees
    through the model's own layers; ``padded``: one row a choice, padded. The model's attention, and the
    forward of its layers, stay what they were for all that is not a packed tree.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        controller: ElasticController | None = None,
        way: str = "fused",
    ) -> None:
        self._model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self._controller = controller
        self._layers: list[TreeDecoder] = []
        self.way = "padded"
        if way != "padded" and self._packs():
            self.way = "packed"
            if way == "fused" and self._fuses():
                self.way = "fused"

    def score(
        self, items: Sequence[Item], configurations: Sequence[Configuration | None]
    ) -> list[list[ItemScore]]:
        """The scores of one batch of items by each of ``configurations``."""
        way = self.way if self._fits(items) else "padded"
        if way == "fused":
            rows = self._fused(items, configurations)
        else:
            rows = list[list[RowScore]]()
            for config in configurations:
                with self._at(config):
                    rows.append(self._packed(items) if way == "packed" else self._padded(items))
        scores = []
        for each in rows:
            found = iter(each)
            scores.append([tuple(next(found) for _ in item.rows) for item in items])
        return scores

    def _fits(self, items: Sequence[Item]) -> bool:
        """Whether all rows lie within the model's window of attention, which trees know nothing of, and items
        are not too long to be trees."""
        if max(tree.sizes(items)) > _LONGEST:
            return False
        window = getattr(self._model.config, "sliding_window", None)
        return window is None or max(len(row.ids) for item in items for row in item.rows) <= window

    def _at(self, config: Configuration | None) -> Any:
        return nullcontext() if config is None or self._controller is None else self._controller.at(config)

    def _padded(self, items: Sequence[Item]) -> list[RowScore]:
        return padded.score_rows(self._model, [row for item in items for row in item.rows])

    @torch.inference_mode()
    def _packed(self, items: Sequence[Item]) -> list[RowScore]:
        batch = tree.pack(items, self._model.device)
        return self._scored(batch, self._hidden(batch)[batch.sources])

    @torch.inference_mode()
    def _fused(
        self, items: Sequence[Item], configurations: Sequence[Configuration | None]
    ) -> list[list[RowScore]]:
        batch = tree.pack(items, self._model.device)
        ranks = []
        for config in configurations:
            with self._at(config):
                ranks.append([half for layer in self._layers for half in layer.ranks])
        steps, copies = plan(ranks)
        hidden = self._hidden(batch, steps=steps, sources=batch.sources)
        found = [self._scored(batch, each) for each in hidden.split(len(batch.sources))]
        return [found[copy] for copy in copies]

    def _hidden(self, batch: tree.Packed, **others: Any) -> Tensor:
        """``[copies * tokens, hidden]``, what the output head reads; of fused layers the sources' only."""
        ones = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device)  # so that no mask is made
        hidden: Tensor = self._model.base_model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            attention_mask=ones,
            use_cache=False,
            tree=batch.tree,
            **others,
        ).last_hidden_state[0]
        return hidden

    def _scored(self, batch: tree.Packed, hidden: Tensor) -> list[RowScore]:
        """From the hidden states of the batch's sources, in chunks of logits."""
        head = self._model.get_output_embeddings()
        size = max(1, padded.CHUNK // self._model.config.get_text_config().vocab_size)
        parts = []
        for start in range(0, len(hidden), size):
            first, last = torch.searchsorted(
                batch.predictors, torch.tensor([start, start + size], device=hidden.device)
            ).tolist()
            places, labels = batch.predictors[first:last] - start, batch.labels[first:last]
            parts.append(padded.token_scores(head(hidden[start : start + size]), places, labels))
        found, greedy = (torch.cat(each)[batch.wanted] for each in zip(*parts, strict=True))
        return padded.row_scores(found, greedy, batch.of_row, batch.rows)

    def _packs(self) -> bool:
        """Whether the model gives the same for packed trees. Then its attention is ours from now on."""
        config = self._model.config
        if config._attn_implementation not in ("sdpa", "packed", tree.NAME):
            return False
        if any(getattr(config, name, None) for name in _BY_PLACE):
            return False
        AttentionInterface.register(tree.NAME, tree.attend)
        AttentionMaskInterface.register(tree.NAME, sdpa_mask)
        before = config._attn_implementation
        self._expected = self._padded(_trial(self._model))
        self._model.set_attn_implementation(tree.NAME)
        if self._same(lambda: self._packed(_trial(self._model))):
            return True
        self._model.set_attn_implementation(before)
        return False

    def _fuses(self) -> bool:
        with _frozen(self._model):
            layers = list(decoder_layers(self._model))
        if not layers or any(parts is None for _, parts in layers):
            return False
        adapters = [linear.adapter for _, parts in layers if parts for linear in parts.linears]
        if any(adapter is not None and adapter.sparse for adapter in adapters):
            return False  # their products have a mask, which these layers know nothing of
        for number, (layer, parts) in enumerate(layers):
            assert parts is not None
            self._layers.append(TreeDecoder(parts, number, last=number == len(layers) - 1))
            replace_forward(layer, self._layers[-1])
        if self._same(lambda: self._fused(_trial(self._model), [None])[0]):
            return True
        self._layers = []
        for layer, _ in layers:
            restore_forward(layer)
        return False

    def _same(self, way: Any) -> bool:
        try:
            found = [row.log_likelihood for row in way()]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an unknown model does with what it gets
            log.info("items are not packed, since the model fails on packed ones: %r", error)
            return False
        expected = [row.log_likelihood for row in self._expected]
        precise = self._model.dtype == torch.float32
        mean = abs(sum(expected) / len(expected))
        near = _TOLERANCE + _RELATIVE * mean if precise else _LOWER_PRECISION * mean
        return all(abs(mine - own) <= near for mine, own in zip(found, expected, strict=True))


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients, as fused layers must be; scoring needs none."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


def _trial(model: PreTrainedModel) -> list[Item]:
    """Three small items that begin alike, of one to three choices."""
    generator = torch.Generator().manual_seed(0)
    most = min(1000, model.config.get_text_config().vocab_size)

    def draw(count: int) -> list[int]:
        ids: list[int] = torch.randint(most, (count,), generator=generator).tolist()
        return ids

    preamble, items = draw(6), []
    for choices in (3, 2, 1):
        prompt = preamble + draw(4 + choices)
        rows = list[Row]()
        for _ in range(choices):
            answer = draw(4 + 2 * len(rows))
            rows.append(Row(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
        items.append(Item(tuple(rows), "trial"))
    return items
