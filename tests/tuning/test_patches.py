"""Elastic ranks on PEFT's seam: what a layer computes, merges and refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from fixtures_models import tiny_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import patches
from patches import PatchError
from patches.peft import ElasticRank, check_seam, make_layer_elastic
from patches.transformers import causal_lm_types

ROOT = Path(__file__).resolve().parents[2]
TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict"


class Group:
    def __init__(self, rank: int) -> None:
        self.rank = rank


def lora_layer(rank: int = 8, dtype: torch.dtype = torch.float32, **config: object) -> LoraLinear:
    torch.manual_seed(0)
    settings = peft.LoraConfig(init_lora_weights=False, lora_dropout=config.pop("dropout", 0.0), **config)
    layer = LoraLinear(nn.Linear(6, 10).to(dtype), "default", settings, r=rank, lora_alpha=16)
    return layer.to(dtype)


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_apply_may_be_called_again_and_leaves_random_numbers_alone():
    patches.apply.cache_clear()
    state = torch.get_rng_state()
    patches.apply()
    patches.apply()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_types_read_from_the_source_are_those_that_transformers_takes():
    assert causal_lm_types() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    "source", ["", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = load()", f"{TABLE}([('a', B), 'c'])"]
)
def test_a_table_of_another_form_is_said_to_be_missing(tmp_path, monkeypatch, source):
    (tmp_path / "models" / "auto").mkdir(parents=True)
    (tmp_path / "models" / "auto" / "modeling_auto.py").write_text(source)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(PatchError, match=r"transformers .* has no list of pairs called MODEL_FOR_CAUSAL_LM"):
        causal_lm_types.__wrapped__()


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_a_layer_computes_the_formula(rank, options):
    layer = lora_layer(**options)
    make_layer_elastic(layer, "default", Group(rank))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    scale = 16 / (8**0.5 if options.get("use_rslora") else 8)
    low = x() @ a[:rank].T @ b[:, :rank].T
    if options.get("lora_bias"):
        low = low + layer.lora_B["default"].bias
    assert torch.allclose(layer(x()), layer.base_layer(x()) + scale * low, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_maximal_rank_is_bit_identical_to_stock_peft(dtype):
    layer = lora_layer(dtype=dtype, dropout=0.5)
    torch.manual_seed(5)
    stock = layer(x(dtype))
    make_layer_elastic(layer, "default", Group(8))
    torch.manual_seed(5)
    assert torch.equal(layer(x(dtype)), stock)


def test_inputs_of_another_type_are_cast_as_peft_casts_them():
    layer = lora_layer()
    make_layer_elastic(layer, "default", Group(3))
    layer.base_layer.to(torch.bfloat16)
    assert layer(x(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_uses_the_active_rank_and_can_be_undone_after_it_changed(safe, dtype):
    group = Group(3)
    layer = lora_layer(dtype=dtype)
    make_layer_elastic(layer, "default", group)
    weight, elastic = layer.base_layer.weight.clone(), layer(x(dtype))
    layer.merge(safe_merge=safe)
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    assert torch.allclose(layer(x(dtype)), elastic, atol=tolerance)
    assert not torch.equal(layer.base_layer.weight, weight)
    group.rank = 8
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, weight, atol=tolerance)


def test_merging_the_maximal_rank_is_bit_identical_to_stock_peft():
    stock, elastic = lora_layer(), lora_layer()
    make_layer_elastic(elastic, "default", Group(8))
    stock.merge()
    elastic.merge()
    assert torch.equal(elastic.base_layer.weight, stock.base_layer.weight)


def test_batches_of_several_adapters_use_the_active_rank():
    layer = lora_layer()
    make_layer_elastic(layer, "default", Group(3))
    mixed = layer(x(), adapter_names=["default", "__base__", "default"])
    assert torch.allclose(mixed[0], layer(x())[0], atol=1e-6)
    assert torch.equal(mixed[1], layer.base_layer(x())[1])


def test_weights_outside_the_active_rank_get_exact_zeros_as_gradients():
    layer = lora_layer()
    make_layer_elastic(layer, "default", Group(3))
    layer(x()).square().sum().backward()
    a, b = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    assert a[:3].abs().min() > 0
    assert b[:, :3].abs().min() > 0
    assert torch.count_nonzero(a[3:]) == torch.count_nonzero(b[:, 3:]) == 0


def test_layers_that_cannot_be_elastic_are_refused():
    with pytest.raises(TypeError, match="Linear layer has no linear LoRA adapter named 'default'"):
        make_layer_elastic(nn.Linear(2, 2), "default", Group(1))
    with pytest.raises(TypeError, match="named 'other'"):
        make_layer_elastic(lora_layer(), "other", Group(1))
    with pytest.raises(ValueError, match="DoraLinearVariant"):
        make_layer_elastic(lora_layer(use_dora=True), "default", Group(1))


def test_a_missing_seam_is_told_with_library_and_version(monkeypatch):
    def stock_only(self: LoraLinear, inputs: torch.Tensor) -> torch.Tensor:
        return self.base_layer(inputs) + self.lora_B["default"](self.lora_A["default"](inputs))

    monkeypatch.setattr(LoraLinear, "forward", stock_only)
    with pytest.raises(PatchError, match=rf"peft {peft.__version__} lacks the LoRA-variant seam"):
        check_seam()


def test_a_peft_without_variants_is_told_with_library_and_version(monkeypatch):
    original = LoraLayer.__init__

    def without(self: LoraLayer, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        del self.lora_variant

    monkeypatch.setattr(LoraLayer, "__init__", without)
    with pytest.raises(PatchError, match=rf"peft {peft.__version__} lacks .*lora_variant"):
        check_seam()


def test_no_class_of_peft_is_changed():
    before = dict(vars(LoraLinear)), dict(vars(LoraLayer))
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    make_layer_elastic(layer, "default", Group(1))
    assert isinstance(layer.lora_variant["default"], ElasticRank)
    assert (dict(vars(LoraLinear)), dict(vars(LoraLayer))) == before


def test_training_imports_neither_data_frames_nor_solvers():
    code = "\n".join(
        [
            "import sys",
            "from patches.transformers_imports import leave_out",
            "leave_out()",
            "import comps.tuning.training.loop",
            "heavy = {'datasets', 'pandas', 'pyarrow', 'scipy', 'ray'} & set(sys.modules)",
            "assert not heavy, heavy",
            "import datasets",  # whoever wants it can have it
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_transformers_still_imports_what_is_there_at_once():
    """The patch can go when this fails."""
    source = Path(transformers.__file__).with_name("trainer.py").read_text()
    assert "\nif is_datasets_available():\n    import datasets\n" in source
