"""Evaluate a model on the eight commonsense sets, or on arithmetic, through a running service.

    python examples/evaluate.py commonsense --model HuggingFaceTB/SmolLM2-135M-Instruct --limit 300
    python examples/evaluate.py math --job ft-job-... --version heuristic
    python examples/evaluate.py commonsense --model ... --tasks ARC-Easy,boolq --choices texts

The questions come from ``<FINETUNING_TASKS_DIR>/<task>/test.json`` on the server (LLM-Adapters' files as they
are), or else from the hub. All evaluations are asked for at once and run one after the other; one line each
tells what was found, with standard errors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

TASKS = {
    "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
    ),
    "math": ("gsm8k", "SVAMP", "mawps", "AQuA"),
}  # fmt: skip


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer's JSON. Ends with the service's sentence when it refuses."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("FINETUNING_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        sys.exit(json.load(error)["detail"])
    except (urllib.error.URLError, ValueError) as error:
        sys.exit(f"No service answers at {url}: {error}. Is it running (make serve)?")


def main() -> None:
    parser = argparse.ArgumentParser(description="Commonsense or arithmetic evaluation of a model.")
    parser.add_argument("kind", choices=list(TASKS))
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="a base model, an adapter or a merged model")
    which.add_argument("--job", help="the fine-tuning job that trained an adapter")
    parser.add_argument("--version", help="a super-adapter's version: heuristic, minimal, ...")
    parser.add_argument("--tasks", help="some of the tasks, comma-separated")
    parser.add_argument("--limit", type=int, help="draw so many questions of each task")
    parser.add_argument(
        "--choices", choices=("labels", "texts"), default="labels", help="what is chosen from"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8015")
    options = parser.parse_args()
    body: dict[str, Any] = {"choices": options.choices}
    body |= {"model": options.model} if options.model else {"fine_tuning_job_id": options.job}
    body |= {"adapter_version": options.version} if options.version else {}
    body |= {"limit": options.limit} if options.limit is not None else {}
    tasks = options.tasks.split(",") if options.tasks else TASKS[options.kind]
    base = f"{options.url.rstrip('/')}/v1/evaluations"
    begun = [ask(base, {**body, "task": task}) for task in tasks]
    failed = False
    for evaluation in begun:
        while evaluation["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(1)
            evaluation = ask(f"{base}/{evaluation['id']}")
        if evaluation["status"] == "succeeded":
            said = "  ".join(
                f"{name} {found['value']:.4f}"
                + ("" if found["stderr"] is None else f" ± {found['stderr']:.4f}")
                for name, found in evaluation["metrics"].items()
            )
        else:
            failed, said = True, (evaluation["error"] or {"message": evaluation["status"]})["message"]
        print(f"{evaluation['task']:<14} {said}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
