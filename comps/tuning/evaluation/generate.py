"""Generate greedily with the prompts of training, and compare with what was expected.

- *exact match*: the answer is the expected response, spaces at the ends aside;
- *numeric match*: the last number in the answer is the expected one, within 0.001, as LLM-Adapters evaluates
  arithmetic; where a letter is expected, as of AQuA's options, the last such letter.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from comps.tuning.data.prompts import expected_response, render
from comps.tuning.data.tokenise import eos_id, prompt_ids

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_LETTER = re.compile(r"\b[A-E]\b")
_NEAR = 1e-3
# The most likely token, without the penalties that a model's own generation_config may ask for.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


class ExactMatch(TypedDict):
    """``correct`` of ``total`` records, ``seconds`` of generation, and the ``outputs`` in order."""

    correct: int
    total: int
    seconds: float
    outputs: list[str]


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    as_json: bool = False,
) -> ExactMatch:
    """:func:`answers` of every record, and how many equal the expected one, spaces at the ends aside.

    With ``as_json`` answers are compared as JSON values, so that the order of keys and blanks do not count.
    """
    started = time.perf_counter()
    outputs = answers(model, tokenizer, records, max_new_tokens=max_new_tokens, batch_size=batch_size)
    seconds = time.perf_counter() - started
    expected = (expected_response(record) for record in records)
    correct = sum(is_exact(output, each, as_json) for output, each in zip(outputs, expected, strict=True))
    return ExactMatch(correct=correct, total=len(outputs), seconds=seconds, outputs=outputs)


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    known: dict[str, str] | None = None,
    cut: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's answer to each record, without spaces at its ends.

    ``records`` have passed ``shapes.check_record``; a chat is asked for its last message. Batches hold
    prompts of similar length, padded on the left. Answers end at the EOS token or after
    ``max_new_tokens``, or where the model's positions end; a quarter of these is for it at least: of longer
    prompts the beginning is dropped, and ``cut`` is told of how many. ``progress`` gets (answered, to
    answer), and may raise to stop. ``known`` are answers by a hash of their prompt's tokens: those there are
    not generated again, and new ones are added before ``progress`` is called.
    """
    end = eos_id(tokenizer)
    rendered = [render(record, tokenizer) for record in records]
    prompts = prompt_ids(rendered, tokenizer)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        room = max(1, positions - min(max_new_tokens, positions // 4))
        if cut is not None and (long := sum(len(ids) > room for ids in prompts)):
            cut(long)
        prompts = [ids[-room:] for ids in prompts]
    keys = [hashlib.sha256(json.dumps([ids, max_new_tokens]).encode()).hexdigest()[:32] for ids in prompts]
    found = {} if known is None else known
    missing = {key: ids for key, ids in zip(keys, prompts, strict=True) if key not in found}
    order = sorted(missing, key=lambda key: len(missing[key]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(missing[chosen[-1]])
        most = min(max_new_tokens, max(1, positions - longest)) if positions else max_new_tokens
        generated = _generate(model, [missing[key] for key in chosen], end, most)
        for key, ids in zip(chosen, generated, strict=True):
            found[key] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
        if progress is not None:
            progress(start + len(chosen), len(order))
    return [found[key] for key in keys]


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, prompts: list[list[int]], end: int, max_new_tokens: int
) -> list[list[int]]:
    """The new ids of each prompt, up to and without the EOS token."""
    longest = max(len(ids) for ids in prompts)
    padded = [[end] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    rows = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_new_tokens,
        use_cache=True,
        **_GREEDY,
        eos_token_id=end,
        pad_token_id=end,
    )
    new = rows[:, longest:].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in new]


def is_exact(output: str, expected: str, as_json: bool = False) -> bool:
    """Whether an answer is the expected response."""
    if not as_json:
        return output.strip() == expected.strip()
    try:
        return bool(json.loads(output) == json.loads(expected))
    except (ValueError, RecursionError):  # what a model writes need not be JSON
        return False


def is_numeric(output: str, expected: str) -> bool:
    """Whether the last number (or option's letter) of an answer is that of ``expected``."""
    wanted = last_number(expected)
    if wanted is None:
        letters = _LETTER.findall(expected)
        found = _LETTER.findall(output)
        return bool(letters and found and letters[-1] == found[-1])
    number = last_number(output)
    return number is not None and abs(number - wanted) <= _NEAR


def is_number(text: str) -> bool:
    """Whether :func:`is_numeric` has something to look for in an expected answer."""
    return last_number(text) is not None or bool(_LETTER.search(text))


def last_number(text: str) -> float | None:
    """The last number in a text, where commas may part thousands."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1][:300]) if found else None
