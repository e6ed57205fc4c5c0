"""Runs inside a container of the image: the service as its user, one job from upload to merged model.

``test_image`` passes this file's text to the image's Python, and that of ``fixtures_models`` as its
argument: the image holds no tests and no client, so this uses the image's own packages.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import requests

SERVICE = ["tini", "-s", "--", sys.executable, "-m", "comps.finetuning"]
# Every process of the service inherits the mark; /proc may show those of other containers.
MARK, MARKED = "IMAGE_CHECK", os.urandom(8).hex()
KEY = {"Authorization": "Bearer secret"}
RECORDS = [
    {"instruction": "Say it.", "input": str(number), "output": f"number {number}"} for number in range(24)
]
NLS = {
    "r": 8,
    "neural_lora_search": True,
    "target_module_groups": [["q_proj", "k_proj", "v_proj"], ["up_proj"]],
    "search_space": ["8,6,4", "8,4"],
}


def refused_without_keys() -> None:
    refusal = subprocess.run(SERVICE, capture_output=True, text=True, timeout=60)
    assert refusal.returncode == 2, refusal
    assert "FINETUNING_API_KEYS" in refusal.stderr, refusal
    assert len(refusal.stderr.splitlines()) == 1, refusal


def ask(url: str, method: str, path: str, **parts: Any) -> Any:
    response = requests.request(method, url + path, headers=KEY, timeout=300, **parts)
    assert response.ok, (path, response.status_code, response.text)
    return response.json()


def train(url: str) -> str:
    """A small NLS job, run to its end. Returns its id."""
    file = ("numbers.json", json.dumps(RECORDS))
    uploaded = ask(url, "POST", "/v1/files", files={"file": file}, data={"purpose": "fine-tune"})
    body = {
        "model": "tiny/llama",
        "training_file": uploaded["id"],
        "General": {"lora_config": NLS},
        "Training": {"epochs": 2, "batch_size": 4},
    }
    job = ask(url, "POST", "/v1/fine_tuning/jobs", json=body)
    deadline = time.monotonic() + 600
    while job["status"] not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        time.sleep(0.5)
        job = ask(url, "GET", f"/v1/fine_tuning/jobs/{job['id']}")
    assert job["status"] == "succeeded", (job, ask(url, "GET", "/v1/health_check"))
    return str(job["id"])


def marked() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or gone meanwhile
            if process.environ().get(MARK) == MARKED:
                found.append(process)
    return found


def main() -> None:
    assert os.getuid() != 0
    refused_without_keys()
    Path("/tmp/fixtures_models.py").write_text(sys.argv[1])
    sys.path.append("/tmp")
    import fixtures_models

    fixtures_models.save_tiny_model(Path(os.environ["FINETUNING_DATA_DIR"], "models", "tiny", "llama"))
    environment = os.environ | {
        MARK: MARKED,
        "FINETUNING_API_KEYS": "secret",
        "FINETUNING_PORT": "0",
        "FINETUNING_LOG_LEVEL": "warning",
    }
    started = time.monotonic()
    seconds = {}

    def note(step: str) -> None:
        seconds[step] = round(time.monotonic() - started, 1)

    service = subprocess.Popen(SERVICE, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        url = service.stdout.readline().split()[-1].replace("0.0.0.0", "127.0.0.1")
        ask(url, "GET", "/v1/health_check")
        note("healthy")
        version = {"fine_tuning_job_id": train(url), "adapter_version": "heuristic"}
        note("trained")
        extracted = ask(url, "POST", "/v1/finetune/extract_adapter", json=version)
        assert [group["rank"] for group in extracted["groups"]] == [6, 6, 8, 8], extracted
        merged = ask(url, "POST", "/v1/finetune/merge_adapter", json=version)
        assert Path(merged["path"], "model.safetensors").is_file(), merged
        note("merged")
        orphans = psutil.Process(service.pid).children()
        assert not [each for each in orphans if each.status() == psutil.STATUS_ZOMBIE], orphans
    finally:
        service.send_signal(signal.SIGTERM)
        code = service.wait(60)
    note("stopped")
    assert code == 0, code
    assert not marked(), marked()
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
