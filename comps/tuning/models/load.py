"""Load base models and tokenizers: safetensors only, no foreign code, and every fault in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from comps.tuning.errors import ModelError
from comps.tuning.export.files import has_tokenizer
from comps.tuning.quantised.load import load_quantised
from comps.tuning.sparse.report import is_quantised
from comps.tuning.spec import ModelSpec

# Bars that redraw themselves fill a log with control characters.
transformers.utils.logging.disable_progress_bar()

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def load_base_model(
    model: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    use_cache: bool = False,
) -> PreTrainedModel:
    """Load the base model in ``dtype`` on ``device``, in evaluation mode.

    ``use_cache`` false turns the key/value cache off in the model's configuration, as training wants
    it; pass true for a model that is to generate or to be saved. A hub model is looked for with the
    environment's ``HF_TOKEN``, ``HF_HOME`` and ``HF_HUB_OFFLINE``. A model with integer weights is loaded as
    the floating-point numbers that they stand for. One of those families that can be encoders or decoders
    (BERT and its like) is loaded as a decoder. Raises :class:`ModelError`.
    """
    if model.local:
        _check_directory(model)
    with _explained(model):
        if model.local and is_quantised(Path(model.path)):
            loaded, report = load_quantised(model, dtype)
        else:
            config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
            if getattr(config, "is_decoder", None) is False:
                config.is_decoder = (
                    True  # as an encoder it would be shown the very tokens that it is to predict
                )
            loaded, report = AutoModelForCausalLM.from_pretrained(
                model.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
            )
    if report["missing_keys"]:
        # They would be random instead.
        names = sorted(report["missing_keys"])
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ModelError(f"base model {model.name}: its files lack the weight {names[0]}{others}")
    loaded.config.use_cache = use_cache
    return loaded.to(device).eval()


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits depend on later tokens: it would learn to copy what it is shown.

    Two rows that differ in their last token must have the same logits before it. Raises :class:`ModelError`.
    """
    size = model.get_input_embeddings().weight.shape[0]
    rows = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 10]], device=model.device) % size
    one, other = model(input_ids=rows).logits[:, :-1].float()
    if not torch.allclose(one, other, rtol=0, atol=1e-4 * float(one.abs().max())):
        raise ModelError(
            f"base model {name} looks at the tokens after the one it is to predict (its attention is not "
            "causal), so it cannot be trained as a language model"
        )


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer. A missing padding token becomes the EOS token.

    Raises :class:`ModelError`, also for a base model that has none.
    """
    if model.local:
        _check_directory(model, weights=False)
        if not has_tokenizer(Path(model.path)):
            raise ModelError(f"base model {model.name} has no tokenizer, so it cannot be trained on text")
    with _explained(model, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_directory(model: ModelSpec, weights: bool = True) -> None:
    directory = Path(model.path)
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise ModelError(f"{model.name} is an adapter, not a base model")
        raise ModelError(f"base model {model.name}: its directory does not exist or has no config.json")
    if (directory / "adapter_config.json").is_file():
        # transformers would go and load the base model that this file names.
        raise ModelError(f"base model {model.name}: its directory holds an adapter too")
    if not weights or any(directory.glob("*.safetensors")):
        return
    if any(found for pattern in _PICKLES for found in directory.glob(pattern)):
        raise ModelError(
            f"base model {model.name} has its weights only as pickle files, which can run any code "
            "when they are read; convert it to safetensors"
        )
    raise ModelError(f"base model {model.name}: its directory has no safetensors file")


@contextmanager
def _explained(model: ModelSpec, part: str = "") -> Iterator[None]:
    """Turn what the libraries raise for a model they cannot load into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{part}base model {model.name} {_reason(model, error)}") from error


def _reason(model: ModelSpec, error: BaseException) -> str:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    if any(isinstance(each, GatedRepoError) for each in causes):
        return "is gated: its owner must grant access, and HF_TOKEN must be a token that has it"
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return "does not exist on the hub, or HF_TOKEN gives no access to it"
    if any(isinstance(each, LocalEntryNotFoundError) for each in causes):
        return "is not on this machine, and the hub cannot be reached"
    if isinstance(error, SafetensorError):
        return f"has a damaged safetensors file: {text}"
    if "custom code" in text or "trust_remote_code" in text:
        return "needs code of its own, which is only run when the operator allows it (trust_remote_code)"
    if "model type" in text or "model_type" in text or "Unrecognized configuration" in text:
        return f"has an architecture that transformers {transformers.__version__} does not support"
    if "size mismatch" in text or "ignore_mismatched_sizes" in text:
        return "has weights whose shapes are not those of its config.json"
    if not model.local and "model.safetensors" in text:
        return "has no safetensors weights on the hub; other formats are not read"
    return f"cannot be loaded: {text.strip().splitlines()[0]}" if text.strip() else "cannot be loaded"
