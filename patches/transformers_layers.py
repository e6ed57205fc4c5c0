"""The parts of decoder layers that transformers' Llama and its like are made of, for a fused forward.

What:     takes a decoder layer apart into frozen linears, PEFT's adapters on them, norms and sizes, and
          lets a function stand in for its ``forward``.
Why:      run module by module, a LoRA step spends a third of its time outside of matrix products.
Seam:     the attribute names of :data:`LAYERS` (``self_attn.q_proj``, ``mlp.gate_proj``, ...);
          ``base_layer``, ``lora_A``, ``lora_B``, ``scaling``, ``lora_dropout``, ``lora_variant`` of PEFT's
          layers; a ``forward`` set on the instance, which ``nn.Module`` looks up first;
          ``gradient_checkpointing`` and ``_gradient_checkpointing_func`` of the layers. No class is
          changed. What is not exactly as expected is left alone, and the caller compares the result with
          the layer's own.
Checked:  transformers 5.23.0, peft 0.21.2.
Goes:     when transformers or PEFT fuse these themselves on CPUs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from patches.peft import ElasticRank, RankSource
from patches.peft_sparse import SparseLinear, SparseRank

# Pre-norm layers with RMSNorm, rotary positions on all of each head and a gated MLP with SiLU.
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")


@dataclass
class Adapter:
    """One LoRA adapter: ``down`` is A ``[r, in]``, ``up`` is B ``[out, r]``, ``dropout`` a probability; the
    product of a ``sparse`` one counts only where the layer's own weight is not 0."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float
    dropout: float
    sparse: bool
    _source: RankSource | None

    @property
    def rank(self) -> int:
        """The active rank."""
        return self.down.shape[0] if self._source is None else self._source.rank


@dataclass
class AdaptedLinear:
    """A frozen linear layer and the adapter on it, if any."""

    base: nn.Linear
    adapter: Adapter | None


@dataclass
class DecoderParts:
    """What a decoder layer consists of: ``linears`` are those of the attention's queries, keys, values and
    output, and the MLP's gate, up and down. ``eps`` is the same in both norms."""

    layer: nn.Module
    attention: nn.Module
    linears: tuple[AdaptedLinear, ...]
    norms: tuple[Tensor, Tensor]
    eps: float
    head_size: int
    scaling: float


def decoder_layers(model: nn.Module) -> Iterator[tuple[nn.Module, DecoderParts | None]]:
    """All decoder layers of the kinds in :data:`LAYERS`; without parts where one is not as expected."""
    for module in model.modules():
        if type(module).__name__ in LAYERS:
            yield module, _parts(module)


def output_head(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that makes logits of ``model``, if it is a frozen linear one without an adapter or hooks."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    linear = _linear(head)
    return None if linear is None else linear.base


def replace_forward(layer: nn.Module, forward: Callable[..., Any]) -> None:
    """Have ``layer`` run ``forward``, which gets the layer's own as its first argument."""
    own = type(layer).forward
    itself = weakref.ref(layer)  # no circle, so that a model goes as soon as nobody uses it

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(partial(own, itself()), *args, **kwargs)

    layer.forward = call


def checkpointing(layer: Any) -> Callable[..., Tensor] | None:
    """What runs a function of ``layer`` so that its activations are computed again in the backward pass;
    ``None`` while that is not asked for. (transformers does it around the ``forward`` of the class.)"""
    if not (layer.training and getattr(layer, "gradient_checkpointing", False)):
        return None
    run: Callable[..., Tensor] = layer._gradient_checkpointing_func
    return run


def restore_forward(layer: nn.Module) -> None:
    """Undo :func:`replace_forward`."""
    layer.__dict__.pop("forward", None)


def _parts(layer: Any) -> DecoderParts | None:
    try:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        linears = [_linear(getattr(attention, name)) for name in names]
        linears += [_linear(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
        fits = (
            None not in linears
            and isinstance(mlp.act_fn, nn.SiLU | SiLUActivation)
            and all(type(norm).__name__ in _NORMS for norm in norms)
            and norms[0].variance_epsilon == norms[1].variance_epsilon
            and not any(weight.requires_grad for norm in norms for weight in norm.parameters())
            and not (layer._forward_hooks or layer._forward_pre_hooks)
        )
        if not fits:
            return None
        return DecoderParts(
            layer=layer,
            attention=attention,
            linears=tuple(each for each in linears if each is not None),
            norms=(norms[0].weight.data, norms[1].weight.data),
            eps=norms[0].variance_epsilon,
            head_size=attention.head_dim,
            scaling=attention.scaling,
        )
    except AttributeError:  # a part has another name here
        return None


def _linear(module: Any) -> AdaptedLinear | None:
    if type(module) is nn.Linear:
        return _frozen(AdaptedLinear(module, None))
    if type(module) not in (LoraLinear, SparseLinear) or type(module.base_layer) is not nn.Linear:
        return None
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A or module.merged or module.disable_adapters:
        return None
    (name,) = names
    variant = module.lora_variant.get(name)
    down, up = module.lora_A[name], module.lora_B[name]
    if not (variant is None or isinstance(variant, ElasticRank)):
        return None
    if down.bias is not None or up.bias is not None:
        return None
    dropout = module.lora_dropout[name]
    adapter = Adapter(
        down.weight,
        up.weight,
        module.scaling[name],
        dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
        isinstance(variant, SparseRank),
        None if variant is None else variant.group,
    )
    return _frozen(AdaptedLinear(module.base_layer, adapter))


def _frozen(linear: AdaptedLinear) -> AdaptedLinear | None:
    weights = [linear.base.weight] + ([] if linear.base.bias is None else [linear.base.bias])
    if any(weight.requires_grad or weight.dtype != torch.float32 for weight in weights):
        return None
    adapter = linear.adapter
    if adapter is not None and adapter.down.dtype != torch.float32:
        return None
    return linear
