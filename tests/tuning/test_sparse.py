"""Models with sparse adapters, from building them to their merge."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures_batches import BATCHES, Rows, padded, textbook, with_gradients
from fixtures_elastic import logits, lora, randomise, super_adapter, tokens
from fixtures_models import save_tiny_model, tiny_model
from fixtures_training import Run, assert_same_weights, run, train_spec, write_records
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from comps.tuning import rundir
from comps.tuning.elastic.model import (
    ElasticController,
    build_adapter,
    load_adapter,
    make_elastic,
    make_sparse,
)
from comps.tuning.elastic.sampler import sample
from comps.tuning.errors import AdapterError, ModelError
from comps.tuning.evaluation.__main__ import evaluate, parse
from comps.tuning.export.extract import extract
from comps.tuning.export.merge import merge
from comps.tuning.fused import Fusion, fuse
from comps.tuning.spec import ExtractSpec, LoraSpec, MergeSpec, ModelSpec
from comps.tuning.training.packing import pack, packed_loss, packs

FAMILIES = ("llama", "qwen2", "opt", "gpt2")
FUSED = ("llama", "qwen2", "mistral")


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def sparse(family: str = "llama", **settings: Any) -> tuple[PreTrainedModel, ElasticController]:
    """A half-zero tiny model with a random sparse super-adapter at mixed ranks."""
    base = tiny_model(family, sparsity=0.5)
    _, space, controller = build_adapter(base, lora(family, sparse=True, **settings))
    assert space is not None
    assert controller is not None
    randomise(base)
    controller.set([group.ranks[number % 3] for number, group in enumerate(space.groups)])
    return base.eval(), controller


def loss_of(model: PreTrainedModel, loss: Any, rows: Rows) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(3)
    inputs = pack(padded(rows))
    labels = inputs.pop("labels")
    return with_gradients(model, loss(model(**inputs), labels))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_its_base_with_masked_deltas_and_a_merge_gives_those(
    family: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "base", family, sparsity=0.5)
    base = tmp_path / "base" / "model.safetensors"
    tensors = load_file(base)
    negative = {name: torch.where(each == 0, -each.abs(), each) for name, each in tensors.items()}
    save_file(negative, base, metadata={"format": "pt"})
    spec = lora(family, sparse=True)
    model, space, controller = super_adapter(load(tmp_path / "base"), spec, tmp_path / "super")
    for version, config in (("heuristic", None), ("minimal", None), ("mine", sample(space, 0, 5))):
        with controller.at(config or space.resolve(version)):
            expected = logits(model)
        written = extract(
            ExtractSpec(
                job_id="job", directory=tmp_path, super_adapter=tmp_path / "super", version=version,
                config=config, output=tmp_path / version,
            )
        )  # fmt: skip
        assert written["sparse_adapter"] is True
        # Loaded by us the sub-adapter is masked, too.
        assert torch.allclose(
            logits(load_adapter(load(tmp_path / "base"), tmp_path / version)), expected, atol=1e-5
        )
        sparsity = merged(tmp_path, tmp_path / version)["sparsity"]
        assert torch.allclose(logits(load(tmp_path / "merged")), expected, atol=1e-5)
        assert sparsity["before"] == sparsity["after"] == pytest.approx(0.5, abs=0.05)
        assert sparsity["layers"].keys() == space.ranks.keys()
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
        assert all(torch.equal(before[name] == 0, after[name] == 0) for name in before)
    assert not torch.allclose(logits(load(tmp_path / "base")), expected, atol=1e-3)


def merged(directory: Path, adapter: Path) -> dict[str, Any]:
    base = ModelSpec(name="org/base", path=str(directory / "base"))
    return merge(
        MergeSpec(
            job_id="job", directory=directory, adapter=adapter, base_model=base, output=directory / "merged"
        )
    )


def test_zeros_stay_in_a_base_of_half_precision_also_after_the_cast(tmp_path: Path) -> None:
    tiny_model(sparsity=0.5).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    super_adapter(load(tmp_path / "base"), lora(sparse=True), tmp_path / "super")
    sparsity = merged(tmp_path, tmp_path / "super")["sparsity"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(changed) == len(sparsity["layers"]) == 10
    for name in changed:
        assert after[name].dtype == torch.bfloat16
        assert not after[name][before[name] == 0].any()
    dense = tmp_path / "dense"
    super_adapter(load(tmp_path / "base"), lora(), dense)
    answer = merged(tmp_path, dense)["sparsity"]
    assert answer["before"] == sparsity["before"] <= sparsity["after"]
    assert answer["after"] < 0.02  # plain LoRA fills them


def test_stock_peft_warns_of_the_mask_it_does_not_know_and_a_file_says_what_to_do(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", sparsity=0.5)
    model = run(
        train_spec(
            tmp_path / "run", tmp_path / "base", write_records(tmp_path / "records.json"),
            adapter=lora(sparse=True), max_train_steps=3,
        )
    )  # fmt: skip
    for directory in (model.output, model.output / "checkpoint-3"):
        assert json.loads((directory / "adapter_config.json").read_text())["sparse_adapter"] is True
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['sparse_adapter'\].*ignored"):
            stock = peft.PeftModel.from_pretrained(load(tmp_path / "base"), directory)
        ours = load_adapter(load(tmp_path / "base"), directory)
        assert not torch.allclose(logits(stock), logits(ours), atol=1e-4)
    assert "merge_adapter" in (model.output / "README.md").read_text()
    merged(tmp_path, model.output)
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(ours), atol=1e-5)


def test_a_loaded_adapter_can_be_made_elastic_and_an_elastic_one_sparse(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", sparsity=0.5)
    model, space, controller = super_adapter(load(base), lora(sparse=True), tmp_path / "super")
    loaded = load_adapter(load(base), tmp_path / "super")
    dense, _, elastic = super_adapter(load(base), lora())
    make_sparse(dense)
    for config in (space.minimal, space.maximal):
        controller.set(config)
        for other, again in ((loaded, make_elastic(loaded, space)), (dense, elastic)):
            again.set(config)
            assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_with_checkpointing_are_those_without(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model, space, controller = super_adapter(
            tiny_model(family, sparsity=0.5), lora(family, sparse=True, dropout=0.2)
        )
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        controller.set(sample(space, 0, 1))
        found.append(with_gradients(model, model(input_ids=tokens(), labels=tokens()).loss))
    assert found[1][0] == found[0][0]
    assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FUSED)
def test_fused_layers_give_what_the_layers_themselves_give(family: str, dropout: float) -> None:
    model, _ = sparse(family, dropout=dropout)
    assert packs(model, 64)
    rows = BATCHES["every token"]
    own = {}
    for training in (False, True):
        own[training] = loss_of(model.train(training), packed_loss, rows)
    if not dropout:
        expected, gradients = with_gradients(model, textbook(model.eval(), rows))
        assert own[False][0] == pytest.approx(expected, rel=1e-5)
        assert_close(own[False][1], gradients)
    fusion = fuse(model.eval())
    assert (fusion.layers, fusion.head) == (2, True)
    for training in (False, True):
        found, ours = loss_of(model.train(training), fusion.loss, rows)
        assert found == pytest.approx(own[training][0], rel=1e-5)
        assert_close(ours, own[training][1])


@pytest.mark.parametrize("modules", [["o_proj"], ["gate_proj"], ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_layers_with_sparse_adapters_on_some_modules_only(modules: list[str], dropout: float) -> None:
    model = tiny_model("qwen2", sparsity=0.5)
    build_adapter(model, LoraSpec(r=4, target_modules=tuple(modules), dropout=dropout, sparse=True))
    randomise(model)
    assert packs(model.eval(), 64)
    rows = BATCHES["every token"]  # with fewer the last layer draws less dropout
    expected, gradients = loss_of(model.train(), packed_loss, rows)
    fusion = fuse(model.eval())
    assert fusion.layers == 2
    found, ours = loss_of(model.train(), fusion.loss, rows)
    assert found == pytest.approx(expected, rel=1e-5)
    assert_close(ours, gradients)


def test_a_mask_left_out_of_the_fused_layers_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comps.tuning.fused.sparse.masked_", lambda values, weight: values)
    model, _ = sparse()
    assert packs(model, 64)
    assert fuse(model).layers == 0


def test_a_base_without_zeros_is_refused_with_its_sparsity(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    data = write_records(tmp_path / "records.json")
    with pytest.raises(ModelError, match=r"org/tiny is not sparse: 0\.00% of the weights") as caught:
        run(train_spec(tmp_path / "run", tmp_path / "base", data, adapter=lora(sparse=True)))
    assert caught.value.param == "General.lora_config.sparse_adapter"


def test_an_adapter_that_cannot_be_masked_is_refused(tmp_path: Path) -> None:
    adapter = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    adapter.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"sparse_adapter": True}))
    with pytest.raises(AdapterError, match=r"'model\.embed_tokens' cannot be sparse: .*Embedding has no"):
        load_adapter(tiny_model(), tmp_path)


def test_a_run_trains_goes_on_from_a_checkpoint_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_model(tmp_path / "base", sparsity=0.5)
    data = write_records(tmp_path / "records.json")
    settings: dict[str, Any] = {"adapter": lora(sparse=True), "max_train_steps": 6, "save_steps": 2}
    whole = run(train_spec(tmp_path / "whole", base, data, **settings))
    assert any("2 fused layers" in message for message in whole.messages)
    assert any(re.search(r"masked by the zeros .*: (49|50)\.", message) for message in whole.messages)
    assert whole.losses[-1] < whole.losses[0]

    (tmp_path / "again").mkdir()
    output = tmp_path / "again" / rundir.OUTPUT
    output.mkdir()
    (whole.output / "checkpoint-4").rename(output / "checkpoint-4")
    assert_same_weights(run(train_spec(tmp_path / "again", base, data, **settings)), whole)

    unfused = Fusion(0, False, packed_loss)
    monkeypatch.setattr("comps.tuning.training.trainer.fuse", lambda model: unfused)
    plain: Run = run(train_spec(tmp_path / "plain", base, data, **settings))
    assert plain.losses == pytest.approx(whole.losses, rel=1e-4)

    merged(tmp_path, whole.output)
    ways = (["--model", str(base), "--adapter", str(whole.output)], ["--model", str(tmp_path / "merged")])
    rest = ["--file", str(data), "--limit", "4", "--max-new-tokens", "4"]
    masked, plainly = (evaluate(parse([*way, *rest]))["outputs"] for way in ways)
    assert masked == plainly
