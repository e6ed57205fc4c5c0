"""Every function that makes a path of a name, given names that nobody thought of."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import SECRET, traversals, tree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from comps.cores.errors import InvalidRequest, NotFound
from comps.finetuning import catalog
from comps.finetuning.jobs.adapters import MERGED, versions_directory
from comps.finetuning.registry import inspect_directory
from comps.finetuning.schemas.adapters import Version
from comps.finetuning.schemas.files import display_name
from comps.finetuning.settings import Settings
from comps.finetuning.store.blobs import Blobs
from comps.tuning.errors import ModelError
from comps.tuning.export.base_files import find_base
from comps.tuning.models.weights import WeightsError, weights_files
from comps.tuning.spec import ModelSpec
from comps.tuning.training.checkpoints import MANIFEST

ROOT = Path(tempfile.gettempdir()) / "hostile-root"
CONFIG = '{"model_type": "llama"}'

# Whole traversals, pieces of them put together, and any text at all.
_PIECES = ["..", ".", "/", "\\", "%2e", "%2f", "\0", "~", "a", "org", "link", "tiny", "secret", "-", "@", " "]
NAMES = (
    st.sampled_from(traversals(ROOT))
    | st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8).map("".join)
    | st.lists(st.sampled_from(_PIECES), min_size=1, max_size=8).map("/".join)
    | st.text(max_size=300)
)
any_name = given(NAMES)
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A models root with a model in it, and beside it what must stay as it is and be read by nobody."""
    parent = tmp_path_factory.mktemp("names")
    for directory in ("models/org/tiny", "secret", "models-evil/secret", "data-evil"):
        (parent / directory).mkdir(parents=True)
        (parent / directory / "config.json").write_text(CONFIG)
    (parent / "secret" / "model.safetensors").write_text(SECRET)
    (parent / "models" / "link").symlink_to(parent)
    before = tree(parent)
    yield parent / "models"
    assert tree(parent) == before


@many
@any_name
def test_a_file_s_id_stays_in_the_directory_of_files(name: str) -> None:
    blobs = Blobs(Path("/data/files"))
    try:
        path = blobs.path(name)
    except ValueError:
        return
    assert path.parent == Path("/data/files")
    assert path.name == name
    assert not name.startswith(".")


@many
@any_name
def test_a_client_s_file_name_is_shown_without_its_directory(name: str) -> None:
    shown = display_name(name)
    assert 0 < len(shown) <= 255
    assert not any(unicodedata.category(char)[0] == "C" for char in shown)
    assert not {"/", "\\", "\0"} & set(shown)


@many
@any_name
def test_a_model_s_name_stays_under_the_models_root(root: Path, name: str) -> None:
    options = Settings(data_dir=root.parent / "data", models_dir=root, hf_hub_offline=True)
    try:
        spec = catalog.resolve(options, name)
    except (InvalidRequest, NotFound):
        return
    assert Path(spec.path) in (root / "org", root / "org" / "tiny")


def test_a_link_out_of_the_models_root_is_not_listed(root: Path) -> None:
    assert catalog.list_local_models(root) == ["org/tiny"]


@many
@any_name
def test_a_directory_to_register_stays_under_the_models_root(root: Path, name: str) -> None:
    with pytest.raises(InvalidRequest) as refused:  # the one model there has no weights
        inspect_directory(root, name)
    assert refused.value.param == "path"
    assert SECRET not in refused.value.message


@many
@given(NAMES, NAMES)
def test_the_versions_of_each_model_have_a_directory_of_their_own(one: str, other: str) -> None:
    options = Settings(data_dir=Path("/data"))
    directories = {}
    for name in (one, other):
        try:
            catalog.check_name(name, "id")
        except InvalidRequest:
            continue
        directories[name] = versions_directory(options, name)
        assert directories[name].parent == Path("/data/adapters")
    assert len(set(directories.values())) == len(directories)


_VERSION: TypeAdapter[str] = TypeAdapter(Version)
# What else there is in a job's output directory.
TAKEN = {
    MERGED, "checkpoint-1", MANIFEST, "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    "nncf_config.json", "training_manifest.json", "sub_adapter.json",
}  # fmt: skip


@many
@given(NAMES | st.from_regex(r"[A-Za-z0-9._-]{1,70}\n?", fullmatch=True) | st.sampled_from(sorted(TAKEN)))
def test_a_version_is_a_directory_that_a_job_has_no_other_use_for(name: str) -> None:
    try:
        _VERSION.validate_python(name)
    except ValidationError:
        return
    assert (Path("/output") / name).parent == Path("/output")
    assert name.lower() not in TAKEN
    assert len(name) <= 64


_FILES = NAMES.map(lambda name: f"{name}.safetensors") | NAMES | st.integers() | st.none()
SHARDS = st.dictionaries(st.text(max_size=5), _FILES, max_size=3)


@many
@given(SHARDS)
def test_the_files_that_a_model_s_index_names_are_its_own(root: Path, shards: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory(dir=root.parent.parent) as name:
        directory = Path(name)
        (directory / "config.json").write_text(CONFIG)
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": shards}))
        try:
            found = weights_files(directory)
        except WeightsError:
            found = []
        assert all(path.parent == directory for path in found)
        try:
            base = find_base(ModelSpec(name="org/tiny", path=str(directory)))
        except ModelError:
            return
        assert all((directory / shard).parent == directory for shard in base.shards)
        assert all(shard.endswith(".safetensors") for shard in base.shards)
