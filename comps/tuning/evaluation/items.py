"""Questions as tokens: read and tokenised once, then scored by any number of configurations.

The tokens of a choice are found as lm-evaluation-harness finds them (``TemplateLM._encode_pair`` of 0.4.13),
so that log-likelihoods are the same: blanks at the prompt's end belong to the choice, prompt and choice
are encoded together, and the choice is what follows the prompt's tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from comps.tuning.data.prompts import render
from comps.tuning.data.records import Checked
from comps.tuning.data.shapes import shape_of
from comps.tuning.data.tokenise import Row, instruction_rows, leading_ids
from comps.tuning.errors import DataError
from comps.tuning.evaluation.questions import Question
from comps.tuning.spec import DataSpec


@dataclass(frozen=True)
class Item:
    """What is scored together: a row of tokens for each choice (or a single row).

    ``answer``: the right row's place, if there is one to choose; ``characters`` and ``bytes``: the length of
    each choice's text, which ``acc_norm`` and ``acc_bytes`` divide by. ``truncated``: rows longer than the
    model takes lost their beginning.
    """

    rows: tuple[Row, ...]
    where: str
    answer: int | None = None
    characters: tuple[int, ...] = ()
    bytes: tuple[int, ...] = ()

    @cached_property
    def key(self) -> str:
        """What its scores depend on, besides the model: a hash of tokens and of which are scored."""
        rows = [[row.ids, [int(each) for each in row.learnt]] for row in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]

    @property
    def truncated(self) -> bool:
        return any(row.truncated for row in self.rows)


class Items(Sequence[Item]):
    """Items in order. A slice of them is Items again."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = tuple(items)

    @classmethod
    def choices(
        cls, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> Items:
        """One item for each question, one row for each of its choices, whose tokens are scored.

        ``max_length``: tokens a model takes; of longer rows the beginning is dropped, as lm-eval does.
        Raises :class:`DataError` for a question without choices, or whose choice has no tokens.
        """
        leading = leading_ids(tokenizer)
        return cls(_choice_item(each, tokenizer, leading, max_length) for each in questions)

    @classmethod
    def responses(
        cls, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, data: DataSpec
    ) -> Items:
        """One item of one row for each question: the row that training makes of it by ``data``, scored
        where training has loss. Where ``data`` lets a prompt fill ``max_length``, a quarter is kept for the
        response of those rows that are longer. Rows without any scored token are left out."""
        checked = [Checked(each.record, shape_of(each.record) or "alpaca", each.where) for each in questions]
        rows = list(instruction_rows(checked, tokenizer, data))
        cut = [place for place, row in enumerate(rows) if row.truncated]
        if cut and data.max_source_length >= data.max_length:
            shorter = data.model_copy(update={"max_source_length": data.max_length - data.max_length // 4})
            again = instruction_rows([checked[place] for place in cut], tokenizer, shorter)
            for place, row in zip(cut, again, strict=True):
                rows[place] = row
        return cls(Item((row,), each.where) for row, each in zip(rows, questions, strict=True) if row.usable)

    @overload
    def __getitem__(self, place: int) -> Item: ...
    @overload
    def __getitem__(self, place: slice) -> Items: ...
    def __getitem__(self, place: int | slice) -> Item | Items:
        return Items(self._items[place]) if isinstance(place, slice) else self._items[place]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    @cached_property
    def hash(self) -> str:
        """Of all items in order, with their answers and lengths: the data hash of a result."""
        digest = hashlib.sha256()
        for item in self._items:
            digest.update(json.dumps([item.key, item.answer, item.characters, item.bytes]).encode())
        return digest.hexdigest()[:32]

    @property
    def truncated(self) -> int:
        """How many items lost tokens."""
        return sum(item.truncated for item in self._items)


def _choice_item(
    question: Question, tokenizer: PreTrainedTokenizerBase, leading: list[int], max_length: int | None
) -> Item:
    if not question.choices:
        raise DataError(f"{question.where}: has nothing to choose from")
    rendered = render(question.record, tokenizer, question.where)
    leading = [] if rendered.chat else leading
    prompt = rendered.prompt.rstrip()
    blanks = rendered.prompt[len(prompt) :]
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    texts = [prompt, *(prompt + blanks + choice for choice in question.choices)]
    before, *wholes = tokenizer(texts, **options)["input_ids"]
    before = leading + before
    if not before:
        raise DataError(f"{question.where}: its prompt has no tokens, and the model none that begins a text")
    rows = []
    for place, whole in enumerate(wholes):
        scored = (leading + whole)[len(before) :]
        if not scored:
            raise DataError(f"{question.where}: 'choices[{place}]' has no tokens of its own")
        ids, learnt = before + scored, [False] * len(before) + [True] * len(scored)
        kept = len(ids) if max_length is None else max_length + 1  # the last token is only predicted
        rows.append(Row(ids[-kept:], learnt[-kept:], truncated=len(ids) > kept))
    return Item(
        tuple(rows),
        question.where,
        question.answer,
        tuple(len(choice) for choice in question.choices),
        tuple(len(choice.encode()) for choice in question.choices),
    )
