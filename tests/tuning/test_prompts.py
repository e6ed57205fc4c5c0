"""What a record looks like to the model."""

from __future__ import annotations

from typing import Any

import pytest
from fixtures_models import tiny_tokenizer

from comps.tuning.data.prompts import expected_response, render
from comps.tuning.errors import DataError, ModelError

USER = {"role": "user", "content": "Hi"}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def test_an_alpaca_record_with_input_has_the_documented_prompt() -> None:
    rendered = render({"instruction": "Add {a}.", "input": "1 + {1}", "output": "2"}, tiny_tokenizer())
    assert rendered.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {a}.\n\n### Input:\n1 + {1}\n\n### Response:\n"
    )
    assert rendered.response == "2"
    assert rendered.prompt.endswith(rendered.cue)


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}])
def test_an_alpaca_record_without_input_has_the_shorter_prompt(empty: dict[str, Any]) -> None:
    assert render({"instruction": "Say hi.", "output": "Hi"} | empty, tiny_tokenizer()).prompt == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n"
    )


def test_prompt_and_completion_are_taken_as_they_are() -> None:
    rendered = render({"prompt": "2 + 2 =", "completion": " 4\n"}, tiny_tokenizer())
    assert (rendered.prompt, rendered.response) == ("2 + 2 =", " 4\n")


def test_a_chat_goes_through_the_tokenizers_own_template() -> None:
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, USER, said("Hello!")]
    rendered = render({"messages": messages}, tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.prompt + rendered.response == whole.rstrip()
    assert rendered.response == "Hello!<|im_end|>"
    assert rendered.cue == "<|im_start|>assistant\n"


def test_earlier_turns_of_the_assistant_are_found_with_their_end() -> None:
    # Each content also occurs elsewhere: in the role's name, in the user's words.
    messages = [USER, said("assistant"), {"role": "user", "content": "Hello"}, said("Hello"), USER, said("o")]
    rendered = render({"messages": messages}, tiny_tokenizer())
    turns = [rendered.prompt[start:end] for start, end in rendered.turns]
    assert turns == ["assistant<|im_end|>", "Hello<|im_end|>"]
    assert all(rendered.prompt[:start].endswith("<|im_start|>assistant\n") for start, _ in rendered.turns)


def test_a_message_of_weight_zero_does_not_count() -> None:
    messages = [USER, said("no", weight=0), USER, said("yes", weight=1), USER, said("last", weight=0)]
    rendered = render({"messages": messages}, tiny_tokenizer())
    assert [rendered.prompt[start:end] for start, end in rendered.turns] == ["yes<|im_end|>"]
    assert not rendered.counts


def test_a_template_that_opens_a_thought_in_the_prompt_is_followed_by_the_answer() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    rendered = render({"messages": [USER, said("Hello!")]}, tiny_tokenizer(chat_template=template))
    assert rendered.prompt == "[user]Hi<|im_end|>[assistant]<think>"
    assert rendered.response == "Hello!"


def test_a_chat_without_a_template_is_refused_in_a_sentence() -> None:
    with pytest.raises(ModelError, match=r"train\.json, line 3 is a chat, but .* has no chat template"):
        render({"messages": [USER, said("x")]}, tiny_tokenizer(chat_template=None), "train.json, line 3")


def test_a_chat_that_the_template_refuses_is_named() -> None:
    template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(DataError, match=r"line 3: the tokenizer's chat template refuses .*: only one turn"):
        render({"messages": [USER, said("x")]}, tiny_tokenizer(chat_template=template), "line 3")


def test_a_chat_whose_turns_the_template_rewrites_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    messages = [USER, said("one"), USER, said("two")]
    with pytest.raises(DataError, match=r"line 3: 'messages\[1\]' cannot be found again"):
        render({"messages": messages}, tiny_tokenizer(chat_template=template), "line 3")


def test_the_expected_response_is_the_records_own() -> None:
    assert expected_response({"instruction": "a", "output": "b"}) == "b"
    assert expected_response({"prompt": "a", "completion": "c"}) == "c"
    assert expected_response({"messages": [USER, said("d")]}) == "d"
