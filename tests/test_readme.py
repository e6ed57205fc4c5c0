"""What the README says is so: its commands run, and it names every route, setting and make target."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from fixtures_models import save_tiny_model
from service_process import ServiceProcess

from comps.finetuning.settings import Settings, variables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.M | re.S)


def test_the_walk_through_is_the_script() -> None:
    script = (ROOT / "examples" / "walkthrough.sh").read_text().partition("set -euo pipefail\n\n")[2]
    assert script in blocks("bash")


@pytest.mark.timeout(900)
def test_the_walk_through_and_the_python_example_run_as_written(tmp_path: Path) -> None:
    # A tiny model with as many layers as the real one, under its name; a part of the data, under its name.
    data = tmp_path / "examples" / "data" / "bookings_train.json"
    data.parent.mkdir(parents=True)
    data.write_text(json.dumps(json.loads((ROOT / "examples/data/bookings_train.json").read_text())[:40]))
    sizes = {"num_hidden_layers": 30, "hidden_size": 64, "intermediate_size": 64}
    save_tiny_model(tmp_path / "data" / "models" / MODEL, **sizes)
    with closing(ServiceProcess(tmp_path, ray=True)) as service:
        script = subprocess.run(
            ["bash", ROOT / "examples" / "walkthrough.sh"],
            cwd=tmp_path, env=os.environ | {"URL": service.url}, capture_output=True, text=True, timeout=540,
        )  # fmt: skip
        assert script.returncode == 0, script.stdout[-3000:] + script.stderr[-3000:] + service.log[-3000:]
        assert '"adapter_version":"half"' in script.stdout
        assert "/heuristic/merged_model" in script.stdout
        (example,) = blocks("python")
        code = example.replace("http://127.0.0.1:8015", service.url)
        python = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert python.stdout.startswith("ft-job-"), python.stderr
        the_other_examples_run_as_written(service)


def the_other_examples_run_as_written(service: ServiceProcess) -> None:
    """Pruning, INT4, an evaluation, a search: curl on what the walk-through has left."""
    questions = [
        {"question": f"What is {n} + 1?", "choices": [f"{n + 1}", "7"], "answer": 0} for n in range(12)
    ]
    uploads = [("questions.json", questions), ("questions.jsonl", questions)]
    for name, records in uploads:
        lines = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
        upload = {"file": (name, lines.encode())}
        assert service.http.post("/v1/files", files=upload, data={"purpose": "fine-tune"}).is_success
    jobs = service.http.get("/v1/fine_tuning/jobs").json()["data"]
    trained = next(job["id"] for job in jobs if job["status"] == "succeeded")
    requests = "".join(block for block in blocks("sh") if block.startswith("curl "))
    for command in re.findall(r"^curl .*?(?=^curl |\Z)", requests, flags=re.M | re.S):
        script = f"URL={service.url} JOB={trained}; {command}".replace("curl ", "curl -sS --fail-with-body ")
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, command + done.stdout + done.stderr
        answer = json.loads(done.stdout)
        if answer.get("id", "").startswith(("eval", "search")):
            ended(service, answer["id"])


def ended(service: ServiceProcess, job_id: str) -> None:
    deadline = time.monotonic() + 240
    while (job := service.http.get(f"/v1/fine_tuning/jobs/{job_id}").json())["status"] != "succeeded":
        assert job["status"] in ("validating_files", "queued", "running"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.5)


def test_every_setting_is_in_the_table_with_its_description() -> None:
    for name, description in variables().items():
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(description)} \|$", README, flags=re.M), name


def test_every_route_is_named(tmp_path: Path) -> None:
    from comps.finetuning.app import create_app

    app = create_app(Settings(data_dir=tmp_path))
    table = README.partition("## Routes")[2].partition("## Settings")[0]
    for path in app.openapi()["paths"]:
        generic = re.sub(r"\{[^}]*\}", "{", path)
        named = re.sub(r"\{[^}]*\}", "{", table).replace("`.../", "`/v1/finetune/")
        assert generic in named, path


def test_every_proof_of_a_promise_is_a_test() -> None:
    table = README.partition("## What it promises")[2].partition("## Measured")[0]
    named = set(re.findall(r"`(test_\w+\.py)`", table))
    assert len(named) > 10
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize(
    "target", re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M)
)
def test_every_make_target_is_named(target: str) -> None:
    internal = {"setup", "requirements"}
    assert target in internal or f"make {target}" in README


def test_make_serve_runs_the_service_until_it_is_told_to_stop(tmp_path: Path) -> None:
    environment = os.environ | {
        "FINETUNING_PORT": "0",
        "FINETUNING_DATA_DIR": str(tmp_path),
        "RAY_ADDRESS": "http://127.0.0.1:9",
    }
    process = subprocess.Popen(
        ["make", "--silent", "serve"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "listens on http://127.0.0.1:" in process.stdout.readline()
    finally:
        os.killpg(process.pid, 15)
        process.wait(20)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_make_demo_trains_a_model_that_answers_better_than_its_base() -> None:
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    scores = dict(
        re.findall(r"^(base model|heuristic|merged heuristic) .*?(\d+)/100", done.stdout, flags=re.M)
    )
    assert int(scores["heuristic"]) > int(scores["base model"]) + 20
    assert scores["merged heuristic"] == scores["heuristic"]
    seconds = re.search(r"all done after (\d+) s", done.stdout)
    assert seconds is not None
    assert int(seconds[1]) < 600
