"""From records to rows of token ids with their loss masks, cut to the lengths asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from comps.tuning.data.masking import learnt_tokens
from comps.tuning.data.prompts import Rendered, render
from comps.tuning.data.records import Checked
from comps.tuning.errors import ModelError
from comps.tuning.spec import DataSpec

_BATCH = 512  # records handed to the tokenizer at once, which uses all cores for them


@dataclass(frozen=True)
class Row:
    """One record as tokens; ``learnt`` says for each id whether it carries loss."""

    ids: list[int]
    learnt: list[bool]
    truncated: bool = False

    @property
    def usable(self) -> bool:
        """Whether any token is learnt. The first has nothing before it to be predicted from."""
        return any(self.learnt[1:])


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a response. Raises :class:`ModelError` for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the base model's tokenizer has no EOS token, so a model could not learn to stop")
    return int(tokenizer.eos_token_id)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special ids (often BOS, often none) that the tokenizer puts before a text."""
    plain = _encode(tokenizer, ["a"])[0]
    full = tokenizer(["a"])["input_ids"][0]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


def prompt_ids(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each prompt, as training uses them and as generation has to."""
    leading = leading_ids(tokenizer)
    encoded = _encode(tokenizer, [each.prompt for each in rendered])
    return [ids if each.chat else leading + ids for each, ids in zip(rendered, encoded, strict=True)]


def instruction_rows(
    records: Iterable[Checked], tokenizer: PreTrainedTokenizerBase, spec: DataSpec
) -> Iterator[Row]:
    """One row for each record: prompt, response, EOS. Rows may be unusable; the caller counts them."""
    end = eos_id(tokenizer)
    stream = iter(records)
    while batch := list(islice(stream, _BATCH)):
        rendered = [render(each.record, tokenizer, each.where) for each in batch]
        prompts = prompt_ids(rendered, tokenizer)
        cues = _encode(tokenizer, [each.cue for each in rendered])
        responses = _responses(rendered, prompts, tokenizer)
        earlier = _earlier_turns(rendered, tokenizer)
        for index, each in enumerate(rendered):
            prompt, response = prompts[index], responses[index]
            if not response or response[-1] != end:
                response = [*response, end]
            said = earlier.get(index) or [False] * len(prompt)
            learnt = learnt_tokens(
                [*said, *[each.counts] * len(response)], spec.mask_input, spec.mask_response
            )
            row = Row(prompt + response, learnt)
            yield _cut(row, len(prompt), len(cues[index]), tokenizer.bos_token_id, spec)


def text_rows(
    records: Iterable[Checked], tokenizer: PreTrainedTokenizerBase, spec: DataSpec
) -> Iterator[Row]:
    """Plain texts, each ended by EOS, with loss on every token.

    With ``group`` they are joined and cut into rows of ``block_size`` tokens (the last may be shorter);
    otherwise each text is a row of at most ``max_length`` tokens.
    """
    end, leading = eos_id(tokenizer), leading_ids(tokenizer)
    rest: list[int] = []
    stream = iter(records)
    while batch := list(islice(stream, _BATCH)):
        for ids in _encode(tokenizer, [each.record["text"] for each in batch]):
            text = [*leading, *ids, end]
            if spec.group:
                rest += text
                whole = len(rest) - len(rest) % spec.block_size
                for start in range(0, whole, spec.block_size):
                    yield _all_learnt(rest[start : start + spec.block_size])
                del rest[:whole]
            else:
                left = spec.truncation_side == "left"
                kept = text[-spec.max_length :] if left else text[: spec.max_length]
                yield _all_learnt(kept, truncated=len(kept) < len(text))
    if len(rest) > 1:
        yield _all_learnt(rest)


def _all_learnt(ids: list[int], truncated: bool = False) -> Row:
    return Row(ids, [True] * len(ids), truncated)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: rows longer than the model's window are cut here and reported by us.
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded


def _responses(
    rendered: Sequence[Rendered], prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The ids of the responses as they read after their prompts.

    A tokenizer may write the first word of a text differently from one within it, so prompt and
    response are encoded together; where a token would span the two, the response is encoded alone,
    because the prompt's ids have to be those that generation starts from.
    """
    leading = len(leading_ids(tokenizer))
    together = _encode(tokenizer, [each.prompt + each.response for each in rendered])
    alone = _encode(tokenizer, [each.response for each in rendered])
    responses = []
    for index, each in enumerate(rendered):
        prompt = prompts[index] if each.chat else prompts[index][leading:]
        whole = together[index]
        fits = whole[: len(prompt)] == prompt
        responses.append(whole[len(prompt) :] if fits else alone[index])
    return responses


def _earlier_turns(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[bool]]:
    """For prompts that hold turns of the assistant: which of their tokens lie in such a turn."""
    chats = [index for index, each in enumerate(rendered) if each.turns]
    if not chats:
        return {}
    if not tokenizer.is_fast:
        raise ModelError("chats of several turns need a fast tokenizer, and the base model has a slow one")
    options: dict[str, Any] = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    offsets = tokenizer([rendered[index].prompt for index in chats], **options)["offset_mapping"]
    return {
        index: [any(start <= left < end for start, end in rendered[index].turns) for left, _ in spans]
        for index, spans in zip(chats, offsets, strict=True)
    }


def _cut(row: Row, prompt: int, cue: int, bos: int | None, spec: DataSpec) -> Row:
    """Cut the prompt to ``max_source_length`` and the row to ``max_length`` tokens.

    The prompt keeps its BOS and the cue at its end, and loses what lies between: its end when
    ``truncation_side`` is ``right``, its beginning when it is ``left``. The row then loses tokens from
    that side; a response cut at its end has no EOS, since it has not ended.
    """
    keep = list(range(len(row.ids)))
    excess = prompt - spec.max_source_length
    if excess > 0:
        first = 1 if row.ids[0] == bos else 0
        last = max(prompt - cue, first + excess)
        start = last - excess if spec.truncation_side == "right" else first
        del keep[start : start + excess]
    keep = keep[: spec.max_length] if spec.truncation_side == "right" else keep[-spec.max_length :]
    if len(keep) == len(row.ids):
        return row
    return Row([row.ids[i] for i in keep], [row.learnt[i] for i in keep], truncated=True)
