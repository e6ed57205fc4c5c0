"""Tiny models and a tiny tokenizer, made on the spot: two layers of width 32, about 300 tokens.

They are real models of real architectures with random weights, saved as any base model is
(safetensors, config, tokenizer files), so tests can load, train, extract and merge them in moments.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

VOCABULARY = 300

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The tokenizer is trained on this; any text still works, since its alphabet is all bytes.
_CORPUS = [
    "Below is an instruction that describes a task. Write a response.",
    "### Instruction:\nTurn the booking into JSON.\n\n### Input:\nA table for four.\n\n### Response:\n",
    '{"intent":"book","people":4,"day":"friday","time":"19:30","name":"Meyer"}',
    "Please cancel the reservation for two people on monday at half past seven, name of Okafor.",
]

_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA_LIKE: dict[str, Any] = _SIZES | {
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}

# family -> (prefix of its configuration class, class of the model, sizes)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", _LLAMA_LIKE),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", _LLAMA_LIKE),
    "mistral": ("Mistral", "MistralForCausalLM", _LLAMA_LIKE),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 64}),
    "phi": ("Phi", "PhiForCausalLM", _LLAMA_LIKE | {"num_key_value_heads": 4}),
    "opt": (
        "OPT",
        "OPTForCausalLM",
        _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    ),
    "bloom": ("Bloom", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "bert": ("Bert", "BertForMaskedLM", _SIZES | {"intermediate_size": 64}),
    "roberta": ("Roberta", "RobertaForMaskedLM", _SIZES | {"intermediate_size": 64}),
    "electra": ("Electra", "ElectraForMaskedLM", _SIZES | {"intermediate_size": 64, "embedding_size": 32}),
    "bert-seq-cls": ("Bert", "BertForSequenceClassification", _SIZES | {"intermediate_size": 64}),
}


@cache
def _byte_level_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens with a chat template; as in SmolLM2, padding is the EOS."""
    options: dict[str, Any] = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe()), **(options | overrides)
    )


def tiny_model(
    family: str = "llama", seed: int = 0, sparsity: float = 0, **overrides: Any
) -> PreTrainedModel:
    """A random model of ``family`` (see :data:`FAMILIES`); ``overrides`` go to its configuration.
    Of the linear layers' weights the share ``sparsity`` is zero, here and there."""
    prefix, architecture, sizes = FAMILIES[family]
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = getattr(transformers, f"{prefix}Config")(**(sizes | tokens | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, architecture)(config)
        with torch.no_grad():
            for module in model.modules():
                if sparsity and isinstance(module, torch.nn.Linear | Conv1D):
                    module.weight.mul_(torch.rand_like(module.weight) >= sparsity)
    return model.eval()


def save_tiny_model(
    directory: Path, family: str = "llama", tokenizer: bool = True, seed: int = 0, **overrides: Any
) -> Path:
    """Save :func:`tiny_model` (safetensors) and, if asked, :func:`tiny_tokenizer`; returns ``directory``."""
    tiny_model(family, seed, **overrides).save_pretrained(directory)
    if tokenizer:
        tiny_tokenizer().save_pretrained(directory)
    return directory
