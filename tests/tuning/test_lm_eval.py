"""Accuracies and log-likelihoods are those of the real lm-evaluation-harness, on the same prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_models import save_tiny_model, tiny_tokenizer

from comps.tuning.data.prompts import render
from comps.tuning.evaluation.items import Items
from comps.tuning.evaluation.questions import to_question
from comps.tuning.evaluation.scorer import Scorer
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import ModelSpec

TEXT = "the sun wärmt a table of iron for four on monday, and it is not known whether (é) 7 or 12 came"
WORDS = TEXT.split()
SCRIPT = Path(__file__).parents[1] / "lm_eval_check.py"


def questions(count: int = 24) -> list[dict[str, object]]:
    """Of two to five choices, which differ in length, some of them by bytes alone."""
    found = []
    for number in range(count):
        choices = [
            " ".join(
                WORDS[(number * 3 + place * 5 + word) % len(WORDS)]
                for word in range(1 + (number + place) % 4)
            )
            for place in range(2 + number % 4)
        ]
        asked = "one prompt" if number % 6 == 0 else " ".join(WORDS[: 2 + number % 9])
        record = {"question": asked, "choices": [*dict.fromkeys(choices), "none"], "answer": number % 2}
        if number % 5 == 0:  # without blanks at the prompt's end
            record = {**record, "prompt": f"Q: {asked}\nA:"}
        found.append(record)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_of_lm_eval(tmp_path: Path, family: str) -> None:
    pytest.importorskip("lm_eval")
    directory = save_tiny_model(tmp_path / "model", family, initializer_range=0.5)
    asked = [to_question(record) for record in questions()]
    tokenizer = tiny_tokenizer()
    documents = [
        {
            "prompt": render(question.record, tokenizer).prompt,
            "choices": list(question.choices),
            "answer": question.answer,
        }
        for question in asked
    ]
    (tmp_path / "docs.json").write_text(json.dumps(documents))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, SCRIPT, directory, tmp_path / "docs.json", tmp_path / "out.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())

    spec = ModelSpec(name="tiny", path=str(directory))
    model = load_base_model(spec)
    (ours,) = Scorer(model).score(Items.choices(asked, load_tokenizer(spec)))
    for result, expected in zip(ours.results, theirs["log_likelihoods"], strict=True):
        assert [row.log_likelihood for row in result] == pytest.approx([float(e) for e in expected], abs=1e-4)
    for name in ("acc", "acc_norm", "acc_bytes"):
        metric = ours.metric(name)
        assert metric.value == pytest.approx(theirs["results"][f"{name},none"], abs=1e-9)
        assert metric.stderr == pytest.approx(theirs["results"][f"{name}_stderr,none"], abs=1e-9)
    chosen = [{name: ours.per_item(name) for name in ("acc", "acc_norm", "acc_bytes")}]
    assert chosen[0]["acc"] != chosen[0]["acc_norm"]  # or the lengths would not have been seen
