"""Sparse adapters on PEFT's layers: what they compute, merge, keep in memory and refuse."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patches.peft import make_layer_elastic
from patches.peft_sparse import SparseLinear, effective_weight, make_layer_sparse, masked_

IN, OUT, RANK = 7, 11, 4
DENSE = nn.Linear, Conv1D


class Group:
    def __init__(self, rank: int) -> None:
        self.rank = rank


def sparse_layer(
    kind: type = nn.Linear, dtype: torch.dtype = torch.float64, rank: int | None = None, **config: object
) -> LoraLinear:
    """A layer with random weights, a half of them zero; elastic at ``rank``, if one is given."""
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT) if kind is nn.Linear else Conv1D(OUT, IN)
    base.requires_grad_(False)
    base.bias.normal_()
    base.weight.normal_().mul_(torch.rand(base.weight.shape) < 0.5)
    settings = peft.LoraConfig(
        init_lora_weights=False,
        fan_in_fan_out=kind is Conv1D,
        lora_dropout=config.pop("dropout", 0.0),
        **config,
    )
    layer = LoraLinear(base, "default", settings, r=RANK, lora_alpha=6).to(dtype)
    make_layer_sparse(layer, "default")
    if rank:
        make_layer_elastic(layer, "default", Group(rank))
    return layer


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def formula(layer: LoraLinear, x: Tensor, rank: int = RANK) -> Tensor:
    """``(s B A * M) x``, written down plainly."""
    a, b = layer.lora_A["default"].weight[:rank], layer.lora_B["default"].weight[:, :rank]
    weight = layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight
    return x @ (6 / RANK * (b @ a) * (weight != 0)).T


def gradients(y: Tensor, x: Tensor, layer: LoraLinear) -> tuple[Tensor, ...]:
    weights = x, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return torch.autograd.grad((y * torch.cos(torch.arange(y.numel()).view_as(y))).sum(), weights)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["one product", "with dropout"])
@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("kind", DENSE)
def test_output_and_gradients_are_those_of_the_formula(kind, rank, dropout):
    layer = sparse_layer(kind, rank=rank, dropout=dropout)
    x, drop = inputs(), layer.lora_dropout["default"]
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    dropped = drop(x)
    expected = layer.base_layer(x) + formula(layer, dropped, rank or RANK)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(gradients(y, x, layer), gradients(expected, x, layer), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("rank", [None, 2])
def test_gradients_pass_the_numerical_check(kind, rank):
    layer = sparse_layer(kind, rank=rank)
    weights = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def computed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        named = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(computed, (inputs(), *(w.detach().requires_grad_() for w in weights)))


def test_an_input_that_needs_no_gradient_gets_none_and_the_adapters_do():
    layer, x = sparse_layer(), inputs()
    expected = gradients(layer(x), x, layer)[1:]
    layer(inputs().detach()).mul(torch.cos(torch.arange(66).view(2, 3, OUT))).sum().backward()
    torch.testing.assert_close(layer.lora_A["default"].weight.grad, expected[0])
    torch.testing.assert_close(layer.lora_B["default"].weight.grad, expected[1])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", DENSE)
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(kind, dropout):
    layer, kept = sparse_layer(kind, dropout=dropout), []
    x = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        layer(x)
    own = {weight.data_ptr() for weight in (*layer.parameters(), x)}
    others = [each for each in kept if each.data_ptr() not in own]
    assert len(kept) >= 4
    assert all(each.numel() <= x.numel() for each in others)  # dropout's own
    assert x.numel() < IN * OUT


def test_without_dropout_the_base_layer_computes_nothing_and_a_hook_on_it_still_works():
    layer, x, calls = sparse_layer(), inputs(), []
    expected = layer(x)
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda each: calls.append(1) or forward(each)
    layer(x)
    assert calls == []
    layer.base_layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x), expected)
    assert calls == [1]


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DENSE)
def test_a_merge_keeps_every_zero_computes_the_same_and_can_be_undone(kind, dtype, safe):
    layer = sparse_layer(kind, dtype, rank=3)
    x = inputs(dtype)
    weight, expected = layer.base_layer.weight.clone(), layer(x)
    layer.merge(safe_merge=safe)
    merged = layer.base_layer.weight.clone()
    assert torch.equal(merged == 0, weight == 0)
    tolerance = 1e-5 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(layer(x), expected, atol=tolerance, rtol=0)
    layer.lora_variant["default"].group.rank = 1
    place = tuple(torch.nonzero(merged)[0])
    with torch.no_grad():
        layer.base_layer.weight[place] = 0  # as if the sum were zero by itself
        delta = merged[place] - weight[place]
    layer.unmerge()
    weight[place] = -delta
    torch.testing.assert_close(layer.base_layer.weight, weight, atol=tolerance / 10, rtol=0)


def test_batches_of_several_adapters_and_adapters_turned_off():
    layer, x = sparse_layer(rank=2), inputs()
    mixed = layer(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], layer(x)[0])
    torch.testing.assert_close(mixed[1], layer.base_layer(x)[1])
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_a_base_in_half_precision_meets_an_adapter_in_single_precision():
    layer = sparse_layer(dtype=torch.float32)
    expected = layer(inputs(torch.float32))
    layer.base_layer.to(torch.bfloat16)
    y = layer(inputs(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)


def test_under_autocast_products_are_in_its_type_and_gradients_in_the_weights():
    layer, x = sparse_layer(dtype=torch.float32), inputs(torch.float32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)
    pairs = zip(gradients(y.float(), x, layer), gradients(expected, x, layer), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_knows_every_kind_of_zero_and_of_tiny_number(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    weight = torch.tensor([[0.0, -0.0, tiny, -tiny, tiny / 2, 1, -1, torch.inf]], dtype=dtype).repeat(9, 5)
    values = torch.full_like(weight, 3)
    assert torch.equal(masked_(values, weight), 3 * (weight != 0))
    zeros = torch.zeros(9, 1, dtype=dtype), torch.zeros(1, 40, dtype=dtype)
    finite = weight.nan_to_num(posinf=2)
    assert torch.equal(effective_weight(finite, *zeros, 1.0), finite)


def test_layers_that_cannot_be_sparse_are_refused():
    def layer(base: nn.Module, **config: object) -> LoraLinear:
        return LoraLinear(base, "default", peft.LoraConfig(**config), r=2)

    with pytest.raises(TypeError, match="the type Linear has no linear LoRA adapter 'default'"):
        make_layer_sparse(nn.Linear(2, 2), "default")
    with pytest.raises(TypeError, match="no linear LoRA adapter 'other'"):
        make_layer_sparse(layer(nn.Linear(2, 2)), "other")
    with pytest.raises(ValueError, match="DoraLinearVariant and cannot be sparse"):
        make_layer_sparse(layer(nn.Linear(2, 2), use_dora=True), "default")
    with pytest.raises(ValueError, match="has a bias"):
        make_layer_sparse(layer(nn.Linear(2, 2), lora_bias=True), "default")

    class Packed(nn.Linear):
        pass

    with pytest.raises(TypeError, match="a Packed has no plain weight"):
        make_layer_sparse(layer(Packed(2, 2)), "default")
    assert not sparse_layer().supports_lora_conversion("default")


def test_no_class_of_peft_is_changed():
    before = dict(vars(LoraLinear))
    assert type(sparse_layer()) is SparseLinear
    assert dict(vars(LoraLinear)) == before
