"""Exact match: generate greedily with the prompts of training and compare with the expected responses."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from comps.tuning.data.prompts import expected_response, render
from comps.tuning.data.tokenise import eos_id, prompt_ids


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
    """Answer every record and count the answers that equal the expected one, spaces at the ends aside.

    ``records`` have passed ``records.iter_checked``; a chat is asked for its last message. Batches hold
    prompts of similar length, padded on the left. Answers end at the EOS token or after
    ``max_new_tokens``. With ``as_json`` answers are compared as JSON values, so that the order of keys
    and blanks do not count.
    """
    end = eos_id(tokenizer)
    rendered = [render(record, tokenizer) for record in records]
    prompts = prompt_ids(rendered, tokenizer)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    outputs = [""] * len(prompts)
    started = time.perf_counter()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        generated = _generate(model, [prompts[index] for index in chosen], end, max_new_tokens)
        for index, ids in zip(chosen, generated, strict=True):
            outputs[index] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    seconds = time.perf_counter() - started
    pairs = zip(outputs, (expected_response(record).strip() for record in records), strict=True)
    correct = sum(_equal(output, expected, as_json) for output, expected in pairs)
    return ExactMatch(correct=correct, total=len(outputs), seconds=seconds, outputs=outputs)


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
        do_sample=False,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end,
    )
    new = rows[:, longest:].tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in new]


def _equal(output: str, expected: str, as_json: bool) -> bool:
    if not as_json:
        return output == expected
    try:
        return bool(json.loads(output) == json.loads(expected))
    except (ValueError, RecursionError):  # what a model writes need not be JSON
        return False
