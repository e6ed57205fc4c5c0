"""The main job, for real: ``make demo`` (set-up included) or ``.venv/bin/python examples/demo.py``.

Starts the service with a Ray of its own, uploads the booking sentences that lie beside this file, trains
an NLS super-adapter on SmolLM2-135M-Instruct, extracts two sub-adapters, merges one, and compares them
all on sentences that no training has seen. Everything goes over HTTP, as any client would do it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data" / "demo"
MODELS = ROOT / "data" / "models"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
GROUPS = [["q_proj", "k_proj", "v_proj"], ["up_proj"], ["down_proj"]]
LAYERS = 30
JOB = {
    "General": {
        "lora_config": {
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0,
            "neural_lora_search": True,
            "target_module_groups": GROUPS,
            "search_space": ["16,12,8", "16,12,8", "16,12,8"],
        },
        "save_steps": 16,
    },
    "Dataset": {"max_length": 256, "validation_split_percentage": 5},
    "Training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "logging_steps": 5},
}
# A rank for every group and layer: full ranks in the lower half of the model, small ones above.
CUSTOM = ([16] * (LAYERS // 2) + [8] * (LAYERS // 2)) * len(GROUPS)


def say(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


@contextmanager
def service() -> Iterator[openai.OpenAI]:
    """The service on a free port, ended with the ``with`` block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "FINETUNING_PORT": str(port),
        "FINETUNING_DATA_DIR": str(DATA),
        "FINETUNING_MODELS_DIR": str(MODELS),
    }
    DATA.mkdir(parents=True, exist_ok=True)
    with open(DATA / "service.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "comps.finetuning"], cwd=ROOT, env=environment, stderr=log
        )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="None", timeout=1200)
        deadline = time.monotonic() + 60
        while True:
            try:
                client.get("/health_check", cast_to=object)
                break
            except openai.APIConnectionError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the service did not start; see {DATA / 'service.log'}") from None
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def follow(client: openai.OpenAI, job_id: str) -> Any:
    """Print the job's events as they come; returns the finished job."""
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        for event in reversed(client.fine_tuning.jobs.list_events(job_id, limit=100).data):
            if event.id not in seen:
                seen.add(event.id)
                say(f"  {event.message}")
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(1)


def post(client: openai.OpenAI, path: str, **body: Any) -> dict[str, Any]:
    answer: Any = client.post(path, cast_to=object, body=body)
    return dict(answer)


def exact_match(model: Path | str, adapter: Path | str | None = None) -> dict[str, Any]:
    """Greedy answers on the held-out sentences, compared as JSON values."""
    sys.path.insert(0, str(ROOT))
    from comps.tuning.evaluation.__main__ import evaluate, parse

    warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by an old name
    options = ["--json", "--batch-size", "50", "--max-new-tokens", "48", "--model", str(model)]
    options += ["--file", str(ROOT / "examples" / "data" / "bookings_test.json")]
    return dict(evaluate(parse([*options, *(["--adapter", str(adapter)] if adapter else [])])))


def main() -> None:
    # Whoever ends the demo ends its service with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    with service() as client:
        say(f"The service answers at {client.base_url}; Ray starts beside it")
        with open(ROOT / "examples" / "data" / "bookings_train.json", "rb") as data:
            file = client.files.create(file=data, purpose="fine-tune")
        say(f"Uploaded {file.filename} as {file.id}")
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, extra_body=JOB)
        say(f"Created {job.id}")
        job = follow(client, job.id)
        if job.status != "succeeded":
            raise SystemExit(f"The job {job.status}: {job.error}")
        trained = time.monotonic() - began

        versions: dict[str, dict[str, Any]] = {}
        for wait in (False, True):  # all are asked for, so that two are worked on at a time; then waited for
            for name in ("maximal", "heuristic", "minimal", "half"):
                versions[name] = post(
                    client, "/finetune/extract_adapter", fine_tuning_job_id=job.id, adapter_version=name,
                    wait=wait, **({"custom_config": CUSTOM} if name == "half" else {}),
                )  # fmt: skip
        say(f"Extracted the sub-adapters {', '.join(versions)} (half is a configuration of our own)")
        merged = post(
            client, "/finetune/merge_adapter", fine_tuning_job_id=job.id, adapter_version="heuristic"
        )
        say(f"Merged heuristic into {merged['path']}; now all answer the held-out sentences")

    base, output = MODELS / MODEL, DATA / "jobs" / job.id / "output"
    compared: list[tuple[str, dict[str, Any] | None, Path | str, Path | str | None]] = [
        ("base model", None, base, None),
        ("super-adapter", versions["maximal"], base, output),
        *((name, versions[name], base, versions[name]["path"]) for name in ("heuristic", "half", "minimal")),
        ("merged heuristic", None, merged["path"], None),
    ]
    # Two processes side by side are quicker than one on all cores.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        asked = [pool.submit(exact_match, model, adapter) for _, _, model, adapter in compared]
        scores = [each.result() for each in asked]
    print(f"\n{'':18}{'ranks':>12}{'parameters':>12}{'exact match':>13}{'seconds':>9}")
    for (name, version, *_), score in zip(compared, scores, strict=True):
        ranks = sorted({group["rank"] for group in version["groups"]}) if version else []
        parameters = f"{version['parameters']:,}" if version else ""
        match = f"{score['correct']}/{score['total']}"
        print(f"{name:18}{', '.join(map(str, ranks)):>12}{parameters:>12}{match:>13}{score['seconds']:>9.1f}")
    total = time.monotonic() - began
    print("\nSeconds: answering all the held-out sentences, two models at a time.")
    print(f"Trained after {trained:.0f} s, all done after {total:.0f} s. The results lie in {output}")


if __name__ == "__main__":
    main()
