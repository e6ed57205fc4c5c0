"""Answer instructions with an INT4 model's OpenVINO form, without torch: greedily, whole rows at each step.

    python examples/run_openvino.py PATH/openvino/openvino_model.xml "Name a fruit." "Add 2 and 3."

PATH is the ``path`` of the quantised or merged model, whose tokenizer lies there. Inputs are ``input_ids``
and ``attention_mask`` ``[rows, tokens]`` (padding on the left or on the right; positions follow from the
mask), the output is ``logits`` ``[rows, tokens, vocabulary]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import openvino
from tokenizers import Tokenizer

PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="openvino_model.xml")
    parser.add_argument("instructions", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--end", default="<|im_end|>", help="the token that ends an answer")
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model.parents[1] / "tokenizer.json"))
    model = openvino.Core().compile_model(options.model, "CPU")
    rows = [tokenizer.encode(PROMPT.format(each)).ids for each in options.instructions]
    longest = max(map(len, rows))
    ids = np.array([[0] * (longest - len(row)) + row for row in rows])
    mask = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    for _ in range(options.max_new_tokens):
        logits = model({"input_ids": ids, "attention_mask": mask})["logits"]
        ids = np.concatenate([ids, logits[:, -1].argmax(-1)[:, None]], 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
    for instruction, row in zip(options.instructions, ids[:, longest:].tolist(), strict=True):
        answer = tokenizer.decode(row, skip_special_tokens=False).split(options.end)[0]
        print(f"{instruction}\n  {answer.strip()}")


if __name__ == "__main__":
    main()
