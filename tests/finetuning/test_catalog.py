"""Names of base models, and what is said of their directories before anything is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fixtures_models import save_tiny_model, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from comps.cores.errors import InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.settings import Settings

LINEAR = (nn.Linear, Conv1D)
TIED = {"lm_head"}  # to the embeddings, so the file has no weight of its own for it


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_tiny_model(root / "org" / "tiny")
    save_tiny_model(root / "bare", tokenizer=False)
    return root


def settings(root: Path, *, offline: bool = True) -> Settings:
    return Settings(data_dir=root.parent / "data", models_dir=root, hf_hub_offline=offline)


def test_models_under_the_root_are_found_and_listed(root: Path) -> None:
    assert catalog.list_local_models(root) == ["bare", "org/tiny"]
    assert catalog.find_local_model(root, "org/tiny") == root / "org" / "tiny"
    assert catalog.find_local_model(root, "org/none") is None
    spec = catalog.resolve(settings(root), "org/tiny")
    assert (spec.name, spec.path, spec.local) == ("org/tiny", str(root / "org" / "tiny"), True)


@pytest.mark.parametrize(
    "name",
    [
        "", "..", "../outside", "org/../../outside", "/etc", "org\\tiny", "org/tiny\0", "./bare", "bare/",
        "http://host/model", "file:///etc", "C:/models", "org//tiny", "%2e%2e/outside", "a" * 300, "módel",
        "bare\n", "~/model", "-rf",
    ],
)  # fmt: skip
def test_what_is_not_a_name_is_refused_with_a_sentence(root: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        catalog.resolve(settings(root), name)
    assert caught.value.param == "model"


def test_a_link_out_of_the_root_is_refused(root: Path, tmp_path: Path) -> None:
    outside = save_tiny_model(tmp_path / "outside", tokenizer=False)
    models = tmp_path / "models"
    models.mkdir()
    (models / "link").symlink_to(outside)
    with pytest.raises(InvalidRequest, match="leads out"):
        catalog.find_local_model(models, "link")


def test_a_missing_model_is_not_found_and_the_places_are_named(root: Path) -> None:
    with pytest.raises(NotFound, match=r"models root.*Hugging Face cache.*HF_HUB_OFFLINE") as caught:
        catalog.resolve(settings(root), "org/none")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    spec = catalog.resolve(settings(root, offline=False), "org/none")
    assert (spec.local, spec.path) == (False, "org/none")


def test_module_names_come_from_the_weights_headers(root: Path) -> None:
    names = catalog.module_names(root / "org" / "tiny")
    assert "model.layers.1.self_attn.q_proj" in names
    assert "model.layers.0.mlp.down_proj" in names
    assert not any("norm" in name or "embed" in name for name in names)


@pytest.mark.parametrize(
    ("family", "embedding"), [("gpt2", "wte"), ("opt", "embed_positions"), ("bloom", "word_embeddings")]
)
def test_embeddings_are_no_modules_to_adapt(tmp_path: Path, family: str, embedding: str) -> None:
    names = catalog.module_names(save_tiny_model(tmp_path, family, tokenizer=False))
    assert embedding not in {name.rpartition(".")[2] for name in names}
    linear = {name for name, module in tiny_model(family).named_modules() if isinstance(module, LINEAR)}
    assert {name.rpartition(".")[2] for name in names} == {name.rpartition(".")[2] for name in linear} - TIED


def test_a_model_without_a_tokenizer_can_be_merged_into_and_not_trained(root: Path) -> None:
    catalog.check_trainable(root / "org" / "tiny")
    catalog.check_mergeable(root / "bare")
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        catalog.check_trainable(root / "bare")


@pytest.mark.parametrize("own_code", [False, True])
def test_a_quantised_model_is_refused_when_it_is_named(tmp_path: Path, own_code: bool) -> None:
    model = save_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    for method, said in (({"quant_method": "bitsandbytes"}, "bitsandbytes"), (["?"], "some method")):
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
        with pytest.raises(InvalidRequest, match=rf"is quantised \({said}\)") as caught:
            catalog.check_trainable(model, own_code)
        assert caught.value.code == "invalid_model"


def test_damaged_models_are_told_apart(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()

    def refusal() -> str:
        with pytest.raises(InvalidRequest) as caught:
            catalog.check_trainable(model)
        assert caught.value.code == "invalid_model"
        return caught.value.message

    weights.write_bytes(whole[:-100])
    assert "truncated weights file, model.safetensors" in refusal()
    weights.write_bytes(b"\xff" * 100)
    assert "damaged weights file" in refusal()
    for header in ([], {"a": 5}, {"a": {"shape": [1]}}):
        text = json.dumps(header).encode()
        weights.write_bytes(len(text).to_bytes(8, "little") + text)
        assert "damaged weights file" in refusal()
    weights.rename(model / "pytorch_model.bin")
    assert "no safetensors weights; pickled" in refusal()
    (model / "config.json").write_text("{")
    assert "not valid JSON" in refusal()
    (model / "config.json").unlink()
    assert "no config.json" in refusal()


def test_an_index_that_names_missing_shards_is_refused(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    catalog.check_trainable(model)
    for content, message in [
        ('{"weight_map": {"a": "model-2.safetensors"}}', "lacks the weights file model-2.safetensors"),
        ('{"weight_map": []}', "damaged model.safetensors.index.json"),
        ("[]", "damaged"),
    ]:
        index.write_text(content)
        with pytest.raises(InvalidRequest, match=message):
            catalog.check_trainable(model)


HUB_FILES = ["config.json", "tokenizer.json", "model.safetensors"]


@contextmanager
def hub(status: int, body: dict[str, object], **headers: str) -> Iterator[dict[str, str]]:
    """A hub that gives one answer to everything; yields the environment that leads there."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
        }
        server.shutdown()


CHECK = """
from comps.cores.errors import ServiceError
from comps.finetuning.catalog import check_on_hub
try: check_on_hub('org/some', 'hf_token'); print('usable')
except ServiceError as error: print(error.code, error)
"""
LOAD = """
from comps.tuning.errors import ModelError
from comps.tuning.models.load import load_base_model
from comps.tuning.spec import ModelSpec
try: load_base_model(ModelSpec(name='org/some', path='org/some', local=False))
except ModelError as error: print(error)
"""


def printed(script: str, environment: dict[str, str]) -> str:
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize(
    ("files", "config", "said"),
    [
        (HUB_FILES, None, "usable"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], None, "has no safetensors weights"),
        (["config.json", "tokenizer.json", "onnx/model.safetensors"], None, "has no safetensors weights"),
        (HUB_FILES[1:], None, "has no config.json"),
        (["config.json", "model.safetensors"], None, "has no tokenizer"),
        (HUB_FILES, {"model_type": "llama"}, "usable"),
        (HUB_FILES, {"model_type": "t5"}, "is of the type 't5', which is no causal language model"),
        (HUB_FILES, {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "(gptq)"),
        (HUB_FILES, {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}, "needs code of its own"),
    ],
)
def test_a_model_on_the_hub_must_have_the_files_that_are_needed(
    files: list[str], config: dict[str, object] | None, said: str
) -> None:
    siblings = [{"rfilename": name} for name in files]
    with hub(200, {"id": "org/some", "siblings": siblings, "config": config}) as environment:
        assert said in printed(CHECK, environment)


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_one_sentence_before_a_job_begins_and_in_its_run(
    tmp_path: Path, status: int
) -> None:
    gated = {"X_Error_Code": "GatedRepo", "X_Error_Message": "Access to model org/some is restricted."}
    with hub(status, {}, **gated) as environment:
        environment |= {"HF_HOME": str(tmp_path)}
        assert printed(CHECK, environment).startswith("model_gated The model 'org/some' is gated on the")
        assert "base model org/some is gated: its owner must grant access" in printed(LOAD, environment)


def test_a_private_model_is_not_found(tmp_path: Path) -> None:
    with hub(401, {}, X_Error_Code="RepoNotFound") as environment:
        environment |= {"HF_HOME": str(tmp_path)}
        assert printed(CHECK, environment).startswith("model_not_found There is no base model 'org/some'")
        assert "does not exist on the hub, or HF_TOKEN gives no access" in printed(LOAD, environment)


def test_a_hub_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    script = (
        "from comps.finetuning.catalog import check_on_hub\n"
        "from comps.cores.errors import Unavailable\n"
        "try: check_on_hub('org/none', None)\n"
        "except Unavailable as error: print(error)"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (
        "no base model 'org/none' in the models root or in the Hugging Face cache, and the hub" in run.stdout
    )


def save_in_cache(cache: Path) -> Path:
    """The model org/cached, as the hub's library keeps it; returns its directory."""
    repository = cache / "models--org--cached"
    snapshot = save_tiny_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return snapshot


def test_a_cached_snapshot_is_used_without_a_network(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = save_in_cache(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for owner in (None, "one", "other"):  # the operator's own cache is for all
        spec = catalog.resolve(settings(root), "org/cached", owner)
        assert (spec.path, spec.local) == (str(snapshot), True)


def test_what_one_key_has_loaded_from_the_hub_another_has_to_ask_for(root: Path, tmp_path: Path) -> None:
    options = Settings(data_dir=tmp_path, models_dir=root, hf_hub_offline=False)
    cache = catalog.hub_cache(options, "one")
    assert cache is not None
    snapshot = save_in_cache(cache)
    assert catalog.resolve(options, "org/cached", "one").path == str(snapshot)
    for owner in ("other", None):
        assert not catalog.resolve(options, "org/cached", owner).local
    assert catalog.hub_cache(options, None) is None


def test_the_hub_library_is_imported_only_when_it_is_needed() -> None:
    script = "import comps.finetuning.catalog, sys; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
