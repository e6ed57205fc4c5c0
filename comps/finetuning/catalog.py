"""Names of base models, and what can be told of a model's directory without loading it.

A name is ``org/name``, ``name`` or a longer path under the models root, of plain characters only. It is
looked for in the models root, then in the Hugging Face caches that the caller may use, then (unless the
service is offline) it is taken for an id on the hub, of which :func:`check_on_hub` tells whether it can be
used.

Nothing here imports torch; ``huggingface_hub`` is imported when it is needed, since that takes a while.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comps.cores.errors import InvalidRequest, NotFound, Unavailable
from comps.finetuning.settings import Settings
from comps.tuning.export.files import VOCABULARIES, has_tokenizer
from comps.tuning.models.weights import Header, WeightsError, read_headers, weights_files
from comps.tuning.sparse.report import INTEGER_GRID
from comps.tuning.spec import ModelSpec
from patches.transformers import causal_lm_types

MAX_NAME = 200

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# GPT-NeoX calls its output head embed_out, and that is linear.
_EMBEDDING = re.compile(r"wte|wpe|shared|embed(?!_out$).*|\w*_embeddings?")
_HUB_ID = re.compile(r"[^/]+(/[^/]+)?")


def check_name(name: str, param: str = "model") -> str:
    """``name``, if it has the form of a model's name.

    Raises :class:`InvalidRequest` for anything else: URLs, absolute paths, ``..``, control characters.
    """
    if len(name) > MAX_NAME:
        raise InvalidRequest(f"{param} is longer than {MAX_NAME} characters.", param=param)
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} is not the name of a model: names are org/name, of letters, digits, '.', '_' and '-', "
            "and name a directory under the models root or a model on the Hugging Face hub.",
            param=param,
        )
    return name


def find_local_model(models_dir: Path, name: str) -> Path | None:
    """The directory of the model ``name`` under the models root, if there is one.

    Raises :class:`InvalidRequest` when the name is not one, or leads out of the root through a link.
    """
    directory = models_dir / check_name(name)
    if not directory.is_dir():
        return None
    resolved = directory.resolve()
    if not resolved.is_relative_to(models_dir.resolve()):
        raise InvalidRequest(
            f"The model {name!r} leads out of the models root; put a copy there, or set "
            "FINETUNING_MODELS_DIR to where it lies.",
            param="model",
        )
    return resolved


def list_local_models(models_dir: Path) -> list[str]:
    """The names of the models under the models root, ``name`` and ``org/name``, sorted.

    What a link leads to is only one of them when it lies under the root, too.
    """
    root = models_dir.resolve()
    return sorted(
        path.parent.relative_to(models_dir).as_posix()
        for pattern in ("*/config.json", "*/*/config.json")
        for path in models_dir.glob(pattern)
        if _NAME.fullmatch(path.parent.relative_to(models_dir).as_posix())
        and path.parent.resolve().is_relative_to(root)
    )


def hub_cache(settings: Settings, owner: str | None) -> Path | None:
    """Where the jobs of ``owner`` keep what they load from the hub; ``None`` for Hugging Face's own place.

    Each API key has a cache of its own: what one has loaded with a token, another may not be allowed to
    read. What lies in Hugging Face's own place while there are keys, the operator has put there for all.
    """
    return settings.data_dir / "hub" / owner if owner else None


def resolve(settings: Settings, name: str, owner: str | None = None) -> ModelSpec:
    """Where the base model ``name`` is for ``owner``: a local directory, or a hub id yet to be checked.

    Raises :class:`InvalidRequest` for what is not a name, :class:`NotFound` with the places looked at.
    """
    directory = find_local_model(settings.models_dir, name) or _cached(name, None)
    if directory is None and (own := hub_cache(settings, owner)):
        directory = _cached(name, own)
    own_code = name in settings.trust_remote_code_models
    if directory is not None:
        return ModelSpec(name=name, path=str(directory), trust_remote_code=own_code)
    if settings.hf_hub_offline or not _HUB_ID.fullmatch(name):
        why = "the hub is not asked, since HF_HUB_OFFLINE is set" if settings.hf_hub_offline else "no hub id"
        raise model_not_found(
            f"There is no base model {name!r}: it is not in the models root ({settings.models_dir}), nor in "
            f"the Hugging Face cache; {why}."
        )
    return ModelSpec(name=name, path=name, local=False, trust_remote_code=own_code)


def runs_own_code(settings: Settings, directory: Path) -> bool:
    """Whether the operator lets the model in ``directory`` run code that comes with it.

    What counts is where it lies, not the name that a client has registered it under.
    """
    root = settings.models_dir.resolve()
    if not directory.is_relative_to(root):
        return False
    return directory.relative_to(root).as_posix() in settings.trust_remote_code_models


def model_not_found(message: str) -> NotFound:
    return NotFound(message, param="model", code="model_not_found")


def check_on_hub(name: str, token: str | None, own_code: bool = False) -> None:
    """Ask the hub for a model that can be trained on; with ``own_code`` its type may be one of its own.

    Raises :class:`NotFound`, :class:`InvalidRequest` for a gated model or one that lacks files, and
    :class:`Unavailable` when the hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        model = HfApi().model_info(name, token=token or False, timeout=30)
    except GatedRepoError as error:
        raise InvalidRequest(
            f"The model {name!r} is gated on the Hugging Face hub: accept its terms there, and give a token "
            "that may read it as General.config.token or HF_TOKEN.",
            param="model",
            code="model_gated",
        ) from error
    except RepositoryNotFoundError as error:
        raise model_not_found(
            f"There is no base model {name!r} in the models root, in the Hugging Face cache or on the hub, "
            "or it is private and the token may not read it."
        ) from error
    except Exception as error:  # the hub client lets the errors of its HTTP library through
        raise Unavailable(
            f"There is no base model {name!r} in the models root or in the Hugging Face cache, and the hub "
            f"could not be asked for it: {type(error).__name__}.",
            param="model",
        ) from error

    files = {sibling.rfilename for sibling in model.siblings or ()}
    if not any("/" not in file and file.endswith(".safetensors") for file in files):
        fault: str | None = "has no safetensors weights; pickled weights are never loaded"
    elif "config.json" not in files:
        fault = "has no config.json"
    elif files.isdisjoint(VOCABULARIES):
        fault = "has no tokenizer, so it cannot be trained on"
    else:
        # What the hub itself has read in the model's config.json; not of every model.
        fault = _unsupported(model.config, own_code) if model.config else None
    if fault:
        message = f"The model {name!r} on the Hugging Face hub {fault}."
        raise InvalidRequest(message, param="model", code="invalid_model")


def _cached(name: str, cache: Path | None) -> Path | None:
    """The snapshot of ``name`` in a Hugging Face cache, when config and weights are both there."""
    if not _HUB_ID.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", cache_dir=cache)
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    try:
        return directory if weights_files(directory) else None
    except WeightsError:  # a download that was not finished
        return None


def read_config(directory: Path) -> dict[str, Any]:
    """The model's ``config.json``. Raises :class:`InvalidRequest` when it cannot be read."""
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except FileNotFoundError:
        raise _unusable(directory, "has no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(directory, "has a config.json that is not valid JSON") from error
    if not isinstance(config, dict):
        raise _unusable(directory, "has a config.json that is not an object")
    return config


def check_mergeable(directory: Path) -> None:
    """Refuse a base model whose weights cannot be used. A tokenizer is not needed.

    Raises :class:`InvalidRequest` with code ``invalid_model``.
    """
    read_config(directory)
    for _ in _tensors(directory):
        return
    raise _unusable(directory, "has safetensors files without a tensor in them")


def check_causal(directory: Path, own_code: bool = False) -> None:
    """As :func:`check_mergeable`, and the model must be a causal language model of a type that transformers
    knows, unless ``own_code`` of it may say what it is."""
    check_mergeable(directory)
    if fault := _unsupported(read_config(directory), own_code):
        raise _unusable(directory, fault)


def check_trainable(directory: Path, own_code: bool = False) -> None:
    """As :func:`check_causal`, and the model must have a tokenizer."""
    check_causal(directory, own_code)
    if not has_tokenizer(directory):
        names = ", ".join(VOCABULARIES)
        raise _unusable(directory, f"has no tokenizer ({names}), so it cannot be trained on")


def _unsupported(config: Mapping[str, Any], own_code: bool) -> str | None:
    """Why a model with this config.json cannot be trained, as the rest of a sentence."""
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        if method != INTEGER_GRID:  # our own
            return (
                f"is quantised ({str(method or 'some method')[:40]}); an adapter is trained on full weights"
            )
    kind = config.get("model_type")
    if own_code or (isinstance(kind, str) and kind in causal_lm_types()):
        return None
    if config.get("auto_map"):
        return (
            "needs code of its own, which only the operator can allow (FINETUNING_TRUST_REMOTE_CODE_MODELS)"
        )
    if not kind or not isinstance(kind, str):
        return "has a config.json without a model_type"
    library = f"transformers {version('transformers')}"
    return f"is of the type {kind[:80]!r}, which is no causal language model that {library} knows"


def module_names(directory: Path) -> set[str]:
    """The paths of the model's linear modules, such as ``model.layers.0.mlp.up_proj``.

    These are those with a weight matrix that are not embeddings by their name. Read from the headers of
    the safetensors files. Raises :class:`InvalidRequest` as above.
    """
    found = set()
    for tensor in _tensors(directory):
        module, _, parameter = tensor.name.rpartition(".")
        last = module.rpartition(".")[2]
        if parameter in ("weight", "qweight") and len(tensor.shape) == 2 and not _EMBEDDING.fullmatch(last):
            found.add(module)
    return found


def _tensors(directory: Path) -> Iterator[Header]:
    try:
        files = weights_files(directory)
        if not files:
            pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
            hint = "; pickled weights are never loaded" if pickled else ""
            raise _unusable(directory, f"has no safetensors weights{hint}")
        yield from read_headers(files)
    except WeightsError as error:
        raise _unusable(directory, str(error)) from error


def _unusable(directory: Path, what: str) -> InvalidRequest:
    message = f"The base model in {directory.name!r} {what}."
    return InvalidRequest(message, param="model", code="invalid_model")
