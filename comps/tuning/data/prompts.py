"""The prompt of a record: one function for training and for evaluation, so the two never differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from comps.tuning.data.shapes import shape_of
from comps.tuning.errors import DataError, ModelError

# The wording of Stanford Alpaca, which OPEA's fine-tuning component documents for its data.
_CUE = "### Response:\n"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n" + _CUE
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n" + _CUE
)


@dataclass(frozen=True)
class Rendered:
    """A record as text. What the model reads is ``prompt``; what it then says is ``response`` and EOS.

    ``cue`` is the end of the prompt that announces the response; truncation keeps it. Chats besides:
    ``chat`` (the template has put special tokens in, none are to be added), ``turns`` (the character
    ranges of ``prompt`` that the assistant said earlier and that count), ``counts`` (false when the
    last message has weight 0).
    """

    prompt: str
    response: str
    cue: str = ""
    chat: bool = False
    turns: tuple[tuple[int, int], ...] = ()
    counts: bool = True


def render(record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "record") -> Rendered:
    """Render a record that ``shapes.check_record`` has accepted.

    Raises :class:`DataError` for a chat that the tokenizer's template refuses, :class:`ModelError` for
    a tokenizer that has no template.
    """
    if "messages" in record and shape_of(record) == "messages":
        return _render_chat(record["messages"], tokenizer, where)
    if shape_of(record) == "prompt_completion":
        return Rendered(record["prompt"], record["completion"])
    template = WITH_INPUT if record.get("input") else WITHOUT_INPUT
    prompt = template.format(instruction=record["instruction"], input=record.get("input"))
    return Rendered(prompt, record["output"], _CUE)


def expected_response(record: dict[str, Any]) -> str:
    """What a perfect model would answer: the output, the completion, or the last message."""
    shape = shape_of(record)
    if shape == "messages":
        return str(record["messages"][-1]["content"])
    return str(record["completion" if shape == "prompt_completion" else "output"])


def _render_chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> Rendered:
    if not tokenizer.chat_template:
        raise ModelError(
            f"{where} is a chat, but the base model's tokenizer has no chat template; "
            "use Alpaca or prompt/completion records, or an instruction-tuned base model"
        )

    def text(count: int, cue: bool) -> str:
        plain = [{"role": m["role"], "content": m["content"]} for m in messages[:count]]
        try:
            rendered = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=cue)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the tokenizer's chat template refuses the chat: {error}") from error
        except Exception as error:  # a template is a program, and may fail in any way
            raise ModelError(
                f"the base model's chat template cannot be used: {type(error).__name__}: {error}"
            ) from error
        return str(rendered)

    last = len(messages) - 1
    content = messages[last]["content"].strip()
    prompt, whole = text(last, cue=True), text(last + 1, cue=False)
    # Some templates add to the prompt what they leave out of the finished chat (an opened <think>);
    # the prompt is what the model will meet, so the message then follows it as it is.
    response = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else content
    closing = response.partition(content)[2]  # what ends a turn, for example <|im_end|>
    turns = []
    for index, message in enumerate(messages[:last]):
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        before = text(index, cue=True)
        said = message["content"].strip()
        start = len(before)
        if not prompt.startswith(before) or said not in prompt[start:]:
            raise DataError(
                f"{where}: 'messages[{index}]' cannot be found again in the text that the tokenizer's "
                "chat template makes of the chat; send the turns as records of their own"
            )
        end = prompt.index(said, start) + len(said)
        turns.append((start, end + len(closing) if prompt.startswith(closing, end) else end))
    bare = text(last, cue=False)
    cue = prompt[len(bare) :] if prompt.startswith(bare) else ""
    counts = messages[last].get("weight") != 0
    return Rendered(prompt, response, cue, chat=True, turns=tuple(turns), counts=counts)
