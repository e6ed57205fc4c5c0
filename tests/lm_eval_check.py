"""lm-evaluation-harness on questions that were rendered before: ``python lm_eval_check.py MODEL DOCS OUT``.

``DOCS`` is a JSON list of ``{"prompt", "choices", "answer"}``. What it finds goes to ``OUT``. In a process of
its own, since lm-eval's imports warn and set things that tests should not have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM


def main(model: str, docs: str, out: str) -> None:
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm", "acc_bytes")
    ]
    task = ConfigurableTask(
        config={
            "task": "rendered",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": docs}, "cache_dir": f"{out}-cache"},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": metrics,
        }
    )
    found = simple_evaluate(
        HFLM(pretrained=model, device="cpu", batch_size=4, dtype="float32"),
        tasks=[task],
        bootstrap_iters=100,
        log_samples=True,
    )
    samples = sorted(found["samples"]["rendered"], key=lambda sample: sample["doc_id"])
    lls = [[each[0][0] for each in sample["resps"]] for sample in samples]
    result = {"results": found["results"]["rendered"], "log_likelihoods": lls}
    Path(out).write_text(json.dumps(result, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
