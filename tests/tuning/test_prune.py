"""Pruning against a formula written down again, on tiny models of several architectures."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_models import save_tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from comps.tuning import rundir
from comps.tuning.data.calibration import calibration_rows
from comps.tuning.errors import DataError, ModelError, ResourceError
from comps.tuning.sparse.prune import MANIFEST, prune
from comps.tuning.sparse.report import sparsity_of_directory
from comps.tuning.sparse.scores import kept_by_pattern, kept_by_ratio
from comps.tuning.spec import CalibrationSpec, ModelSpec, PruneSpec

RECORDS = [
    {"instruction": f"Turn the booking {n} into JSON.", "input": "for four " * (n % 5), "output": f"{n}"}
    for n in range(12)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(RECORDS))
    return path


def spec(directory: Path, data: Path | None = None, **fields: Any) -> PruneSpec:
    calibration = CalibrationSpec(file=data, samples=8, max_length=64) if data else None
    run = directory / "run"
    run.mkdir(exist_ok=True)
    wanted: dict[str, Any] = {"sparsity": 0.5} if "pattern" not in fields else {}
    return PruneSpec(
        job_id="prune-1", directory=run, name="tiny:pruned", calibration=calibration, output=run / "output",
        base_model=ModelSpec(name="tiny/base", path=str(directory / "base")), **(wanted | fields),
    )  # fmt: skip


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def lowest(score: np.ndarray, target: float | str) -> np.ndarray:
    """True where the score [out, in] is among the lowest that have to go."""
    if isinstance(target, str):
        n, m = map(int, target.split(":"))
        ranks = score.reshape(len(score), -1, m).argsort(-1, kind="stable").argsort(-1)
        return (ranks < m - n).reshape(score.shape)
    return score.argsort(-1, kind="stable").argsort(-1) < int(round(target * score.shape[1], 6))


def reference(base: Path, rows: list[list[int]] | None, target: float | str) -> Any:
    """Wanda by whole forward passes: for each layer all rows go through the whole model, pruned so far."""
    model = load(base)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    for layer in layers:
        linears = [m for m in layer.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
        seen: dict[Any, list[torch.Tensor]] = {linear: [] for linear in linears}

        def see(linear: Any, x: Any, _: Any, seen: Any = seen) -> None:
            seen[linear].append(x[0].flatten(0, -2))

        hooks = [linear.register_forward_hook(see) for linear in linears]
        for row in rows or []:
            model(torch.tensor([row]))
        for linear, hook in zip(linears, hooks, strict=True):
            hook.remove()
            weight = linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data
            score = weight.abs().numpy()
            if rows:
                squares = sum(x.square().sum(0).double() for x in seen[linear])
                score = score * squares.sqrt().float().numpy()
            weight[torch.from_numpy(lowest(score, target))] = 0
    return model


@pytest.mark.parametrize("target", [0.5, 0.3, "2:4", "4:8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_wanda_is_the_formula_layer_after_layer(
    family: str, target: float | str, tmp_path: Path, data: Path
) -> None:
    save_tiny_model(tmp_path / "base", family)
    asked = spec(tmp_path, data, **({"pattern": target} if isinstance(target, str) else {"sparsity": target}))
    result = prune(asked)
    assert result is not None
    assert asked.calibration is not None
    rows = calibration_rows(asked.calibration, tiny_tokenizer()).rows
    with torch.no_grad():
        wanted = reference(tmp_path / "base", rows, target).state_dict()
    got = load(asked.output).state_dict()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
    fraction = target if isinstance(target, float) else 0.5
    assert result["sparsity"]["total"] == pytest.approx(fraction, abs=0.03)
    assert min(result["sparsity"]["layers"].values()) > fraction - 0.04


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "phi", "opt", "bloom"])
def test_wanda_works_on_other_architectures(family: str, tmp_path: Path, data: Path) -> None:
    save_tiny_model(tmp_path / "base", family)
    asked = spec(tmp_path, data)
    prune(asked)
    assert asked.calibration is not None
    rows = calibration_rows(asked.calibration, tiny_tokenizer()).rows
    with torch.no_grad():
        wanted = reference(tmp_path / "base", rows, 0.5).state_dict()
    got = load(asked.output).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [0.25, "2:4"])
def test_magnitude_needs_no_data_and_no_tokenizer(family: str, target: float | str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", family, tokenizer=False)
    fields = {"pattern": target} if isinstance(target, str) else {"sparsity": target}
    asked = spec(tmp_path, method="magnitude", **fields)
    prune(asked)
    wanted, got = reference(tmp_path / "base", None, target).state_dict(), load(asked.output).state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_the_files_are_the_base_models_but_for_the_zeros(tmp_path: Path, data: Path) -> None:
    base = tmp_path / "base"
    save_tiny_model(base)
    model = load(base).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="40KB")
    (base / "model.safetensors").unlink()
    asked = spec(tmp_path, data)
    result = prune(asked)
    assert result is not None
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 1
    changed = 0
    for shard in shards:
        before, after = load_file(base / shard), load_file(asked.output / shard)
        assert (base / shard).stat().st_size == (asked.output / shard).stat().st_size
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            same = after[name] == tensor
            assert torch.all(same | (after[name] == 0))
            changed += not same.all()
    assert changed == 2 * 7
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (asked.output / path.name).read_bytes()
    manifest = json.loads((asked.output / MANIFEST).read_text())
    assert manifest == {key: value for key, value in result.items() if key != "path"}
    assert manifest["sparsity"] == sparsity_of_directory(asked.output).facts()
    assert manifest["calibration"] | {"tokens": 0} == {
        "file": "calibration.json", "samples": 8, "tokens": 0, "max_length": 64, "seed": 42,
    }  # fmt: skip


def test_weights_of_several_types_are_pruned_as_they_are_stored(tmp_path: Path, data: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
    odd = "model.layers.0.self_attn.o_proj.weight"
    weights[odd] = torch.randn(weights[odd].shape, generator=torch.Generator().manual_seed(3))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    asked = spec(tmp_path, data)
    assert prune(asked) is not None
    after = load_file(asked.output / "model.safetensors")[odd]
    kept = after != 0
    assert kept.float().mean() == 0.5
    assert torch.equal(after[kept], weights[odd][kept])

    weights[odd][0, 0] = torch.inf
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.o_proj has weights that are not finite"):
        prune(spec(tmp_path, method="magnitude"))


def test_more_calibration_than_there_is_memory_for_is_refused(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "base")
    monkeypatch.setattr("comps.tuning.sparse.layers.available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match="fewer calibration_samples") as caught:
        prune(spec(tmp_path, data))
    assert caught.value.param == "calibration_samples"


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safe*")}


def test_the_same_run_gives_the_same_files_and_another_seed_others(tmp_path: Path, data: Path) -> None:
    save_tiny_model(tmp_path / "base")
    asked = spec(tmp_path, data)
    prune(asked)
    first = digests(asked.output)
    prune(asked)
    assert digests(asked.output) == first
    assert asked.calibration is not None
    other = asked.calibration.model_copy(update={"seed": 7})
    prune(asked.model_copy(update={"calibration": other}))
    assert digests(asked.output) != first


def test_a_pruned_model_is_pruned_further_and_its_zeros_stay(tmp_path: Path, data: Path) -> None:
    save_tiny_model(tmp_path / "base")
    asked = spec(tmp_path, data, sparsity=0.25)
    prune(asked)
    parent = ModelSpec(name="tiny:pruned", path=str(asked.output))
    again = asked.model_copy(
        update={"base_model": parent, "sparsity": 0.5, "output": tmp_path / "run" / "again"}
    )
    prune(again)
    before, after = load(asked.output).state_dict(), load(again.output).state_dict()
    assert all(torch.all(after[name][tensor == 0] == 0) for name, tensor in before.items())
    assert sparsity_of_directory(again.output).total == pytest.approx(0.5)


def test_a_run_that_is_asked_to_stop_leaves_nothing(tmp_path: Path, data: Path) -> None:
    save_tiny_model(tmp_path / "base")
    asked = spec(tmp_path, data)
    (asked.directory / rundir.STOP).touch()
    assert prune(asked) is None
    assert sorted(path.name for path in asked.directory.iterdir()) == ["events.jsonl", "stop"]


def test_each_layer_is_told(tmp_path: Path, data: Path) -> None:
    save_tiny_model(tmp_path / "base")
    asked = spec(tmp_path, data)
    prune(asked)
    lines = [json.loads(line) for line in (asked.directory / rundir.EVENTS).read_text().splitlines()]
    steps = [line["data"] for line in lines if line["type"] == "progress"]
    assert [(data["step"], data["total_steps"]) for data in steps] == [(1, 2), (2, 2)]
    assert all(data["seconds_left"] >= 0 for data in steps)


def test_fewer_records_than_asked_for_are_all_used_with_a_warning(data: Path) -> None:
    found = calibration_rows(CalibrationSpec(file=data, samples=50, max_length=32), tiny_tokenizer())
    assert len(found.rows) == 12
    assert max(map(len, found.rows)) <= 32
    assert found.warnings == ["calibration.json: has 12 records to calibrate with, not 50"]


def test_plain_texts_calibrate_too(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"The table {n} is free."}) for n in range(200)))
    drawn = [
        calibration_rows(CalibrationSpec(file=path, samples=20, seed=seed), tiny_tokenizer()).rows
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20


def of_experts(base: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, vocab_size=300,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(base)


def not_finite(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][:] = float("inf")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (of_experts, "mixture of experts"),
        (not_finite, "not finite"),
        (quantised, "quantised"),
        (lambda base: (base / "model.safetensors").unlink(), "no safetensors"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused_with_a_sentence(
    damage: Any, message: str, tmp_path: Path, data: Path
) -> None:
    save_tiny_model(tmp_path / "base")
    damage(tmp_path / "base")
    asked = spec(tmp_path, data)
    with pytest.raises(ModelError, match=message):
        prune(asked)
    assert not asked.output.exists()


def test_a_pattern_must_fit_the_inputs(tmp_path: Path, data: Path) -> None:
    save_tiny_model(tmp_path / "base", intermediate_size=66)
    with pytest.raises(ModelError, match=r"mlp\.down_proj has 66 inputs") as caught:
        prune(spec(tmp_path, data, pattern="2:4"))
    assert caught.value.param == "pattern"


def test_bad_records_are_named(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{"question": "?"}]))
    with pytest.raises(DataError, match=r"bad\.json, record 1"):
        prune(spec(tmp_path, path))


@pytest.mark.parametrize("target", [0.5, 0.29, 0.999, "2:4", "4:8"])
def test_of_equal_scores_the_first_goes_first(target: float | str) -> None:
    score = torch.randint(0, 4, (50, 200), generator=torch.Generator().manual_seed(0)).float()
    if isinstance(target, str):
        kept = kept_by_pattern(score, target)
    else:
        kept = kept_by_ratio(score, target)
        assert kept.sum(1).tolist() == [200 - {0.5: 100, 0.29: 58, 0.999: 199}[target]] * 50
    assert torch.equal(kept, torch.from_numpy(~lowest(score.numpy(), target)))
