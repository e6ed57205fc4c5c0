"""Code that comes with a model or a checkpoint: pickles and modules, none of which ever runs unasked."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fixtures_elastic import lora, super_adapter
from fixtures_models import save_tiny_model, tiny_model
from fixtures_training import Run, run, train_spec, write_records
from hostile import plain_pickle, torch_pickle

from comps.tuning import rundir
from comps.tuning.errors import AdapterError, ModelError, TuningError
from comps.tuning.export.adapter import read_adapter
from comps.tuning.export.merge import merge
from comps.tuning.models.load import load_base_model, load_tokenizer
from comps.tuning.spec import MergeSpec, ModelSpec, TrainSpec
from comps.tuning.training.checkpoints import MANIFEST, damage, publish

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = [path for folder in ("comps", "patches", "examples") for path in (ROOT / folder).rglob("*.py")]
BOMBS = {"plain": plain_pickle, "torch": torch_pickle}


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that only code of a model or a checkpoint would make."""
    canary = tmp_path / "canary"
    yield canary
    assert not canary.exists()


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_the_bombs_of_these_tests_do_go_off(tmp_path: Path, bomb: Callable[[Path], bytes]) -> None:
    (tmp_path / "bomb.pt").write_bytes(bomb(tmp_path / "canary"))
    if bomb is plain_pickle:
        __import__("pickle").loads(bomb(tmp_path / "canary"))
    else:
        torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "canary").exists()


# -- pickles ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_a_base_model_with_pickled_weights_only_is_refused(
    tmp_path: Path, canary: Path, name: str, bomb: Callable[[Path], bytes]
) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(bomb(canary))
    with pytest.raises(ModelError, match="only as pickle files, which can run any code"):
        load_base_model(ModelSpec(name="org/tiny", path=str(model)))


def test_pickles_beside_safetensors_are_not_looked_at(tmp_path: Path, canary: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "adapter_model.bin",
        "tokenizer.pkl",
    ):
        (model / name).write_bytes(torch_pickle(canary))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    spec = ModelSpec(name="org/tiny", path=str(model))
    assert load_base_model(spec).num_parameters() == tiny_model().num_parameters()
    load_tokenizer(spec)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_safetensors_file_that_is_a_pickle_is_refused(
    tmp_path: Path, canary: Path, bomb: Callable[[Path], bytes]
) -> None:
    model = save_tiny_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(bomb(canary))
    with pytest.raises(ModelError, match="has a damaged safetensors file"):
        load_base_model(ModelSpec(name="org/tiny", path=str(model)))


def test_a_pickled_adapter_is_refused(tmp_path: Path, canary: Path) -> None:
    adapter = tmp_path / "adapter"
    super_adapter(tiny_model(), lora(), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(torch_pickle(canary))
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle, which is not read"):
        read_adapter(adapter)
    base = ModelSpec(name="org/tiny", path=str(save_tiny_model(tmp_path / "base")))
    spec = MergeSpec(
        job_id="m", directory=tmp_path, adapter=adapter, base_model=base, output=tmp_path / "out"
    )
    with pytest.raises(AdapterError, match="which is not read"):
        merge(spec)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Run]:
    """A short run with one checkpoint, at its end."""
    directory = tmp_path_factory.mktemp("trained")
    model, data = save_tiny_model(directory / "model"), write_records(directory / "records.json")
    spec = train_spec(directory / "run", model, data, max_train_steps=2, save_steps=2)
    return spec, run(spec)


def tampered(trained: tuple[TrainSpec, Run], directory: Path, name: str, content: bytes) -> Path:
    """The run's checkpoint with one file replaced or added, and a manifest that knows of nothing else."""
    checkpoint = directory / rundir.OUTPUT / "checkpoint-2"
    shutil.copytree(trained[1].output / "checkpoint-2", directory / "changed")
    (directory / "changed" / name).write_bytes(content)
    (directory / "changed" / MANIFEST).unlink()
    publish(directory / "changed", directory / rundir.OUTPUT, 2, {"step": 2})
    assert damage(checkpoint) is None
    return checkpoint


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_another_pickle_is_refused_and_does_not_run(
    trained: tuple[TrainSpec, Run], tmp_path: Path, canary: Path, name: str, bomb: Callable[[Path], bytes]
) -> None:
    tampered(trained, tmp_path, name, bomb(canary))
    longer = trained[0].training.model_copy(update={"max_train_steps": 4})
    again = trained[0].model_copy(update={"directory": tmp_path, "training": longer})
    with pytest.raises(TuningError, match="checkpoint-2 holds more than tensors and is not read") as refused:
        run(again)
    assert refused.value.param == "General.resume_from_checkpoint"


def from_checkpoint(trained: tuple[TrainSpec, Run], start: Path, directory: Path) -> Run:
    """A run that starts from another one's checkpoint and does one more step."""
    longer = trained[0].training.model_copy(update={"max_train_steps": 3})
    changes = {"training": longer, "directory": directory, "resume_from": start}
    return run(trained[0].model_copy(update=changes))


def test_another_job_s_changed_checkpoint_is_refused_as_well(
    trained: tuple[TrainSpec, Run], tmp_path: Path, canary: Path
) -> None:
    for name in ("optimizer.pt", "pytorch_model.bin"):  # the second one is not there otherwise
        start = tampered(trained, tmp_path / name, name, torch_pickle(canary))
        with pytest.raises(TuningError, match="holds more than tensors"):
            from_checkpoint(trained, start, tmp_path / "run")


def test_other_pickles_in_a_checkpoint_are_not_looked_at(
    trained: tuple[TrainSpec, Run], tmp_path: Path, canary: Path
) -> None:
    start = trained[1].output / "checkpoint-2"
    for name in ("adapter_model.bin", "training_args.bin", "other.pt"):
        start = tampered((trained[0], Run(start.parents[1])), tmp_path / name, name, torch_pickle(canary))
    assert from_checkpoint(trained, start, tmp_path / "run").series("train_loss")[0][0] == 3


def test_a_file_that_was_added_to_a_checkpoint_is_damage(
    trained: tuple[TrainSpec, Run], tmp_path: Path, canary: Path
) -> None:
    start = tmp_path / "checkpoint-2"
    shutil.copytree(trained[1].output / "checkpoint-2", start)
    (start / ".nfs0001").touch()
    assert damage(start) is None
    (start / "pytorch_model.bin").write_bytes(torch_pickle(canary))
    with pytest.raises(TuningError, match=r"used: pytorch_model\.bin was added after it was written"):
        from_checkpoint(trained, start, tmp_path / "run")


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", '{"files": []}', '{"files": {"x": 1}}', '{"files": {"x": {}}}', "[" * 100_000, "\xff"],
    ids=lambda text: text[:20],
)
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, manifest: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest, encoding="latin-1")
    assert str(damage(tmp_path)).startswith("its manifest cannot be read")


# -- modules ------------------------------------------------------------------------------------------


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A model whose config and tokenizer point to a module beside them."""
    model = save_tiny_model(tmp_path / "model")
    canary = str(tmp_path / "canary")
    (model / "own.py").write_text(
        f"open({canary!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name, changes in (
        ("config.json", {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Tokenizer"]}),
    ):
        content = json.loads((model / name).read_text()) | {"auto_map": changes}
        (model / name).write_text(json.dumps(content))
    return model


def with_type(model: Path, kind: str) -> Path:
    config = json.loads((model / "config.json").read_text()) | {"model_type": kind}
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_a_model_s_own_module_is_never_imported(own_code: Path, canary: Path) -> None:
    known = ModelSpec(name="org/own", path=str(own_code))
    assert type(load_base_model(known)).__module__.startswith("transformers.")
    assert not type(load_tokenizer(known)).__module__.startswith("transformers_modules")
    unknown = ModelSpec(name="org/own", path=str(with_type(own_code, "own")))
    with pytest.raises(
        ModelError, match="needs code of its own, which is only run when the operator allows it"
    ):
        load_base_model(unknown)
    assert not any(name.startswith("transformers_modules") for name in sys.modules)


def test_it_is_imported_when_the_operator_has_allowed_it(
    own_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    allowed = ModelSpec(name="org/own", path=str(with_type(own_code, "own")), trust_remote_code=True)
    assert type(load_base_model(allowed)).__name__ == "Model"
    assert type(load_tokenizer(allowed)).__name__ == "Tokenizer"
    assert (tmp_path / "canary").exists()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


# -- our own code -------------------------------------------------------------------------------------

LOADERS = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "jsonpickle"}
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle",
    "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "subprocess.getoutput",
}  # fmt: skip


def faults(source: str) -> list[str]:
    """The places of ``source`` that could run what somebody else wrote."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.partition(".")[0] in LOADERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LOADERS:
            found += [name.name for name in node.names if not name.name.endswith("Error")]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {each.arg: ast.unparse(each.value) for each in node.keywords}
            if (
                name in FORBIDDEN
                or (name in ("torch.load", "load") and options.get("weights_only") != "True")
                or options.get("shell", "False") != "False"
                or options.get("allow_pickle", "False") != "False"
                or options.get("trust_remote_code") == "True"
            ):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "torch.load(path, weights_only=False)", "import pickle", "from dill import loads",
        "np.load(path, allow_pickle=True)", "yaml.load(text)", "subprocess.run(line, shell=True)",
        "os.system(line)", "eval(text)", "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds(line: str) -> None:
    assert len(faults(line)) == 1


def test_nothing_of_ours_reads_pickles_or_runs_text() -> None:
    assert len(PRODUCT) > 90
    found = {path.name: what for path in PRODUCT if (what := faults(path.read_text(encoding="utf-8")))}
    assert found == {}
    assert faults("torch.load(path, weights_only=True)\nfrom pickle import UnpicklingError") == []
