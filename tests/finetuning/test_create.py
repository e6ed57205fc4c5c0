"""From a request to a row: what the run is asked to do, and what is refused before there is a row."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fixtures_documents import SQFT_ONE_GROUP
from fixtures_elastic import lora, super_adapter
from fixtures_jobs import add_file, start_and_finish, succeeded_job
from fixtures_models import save_tiny_model, tiny_model
from sqlalchemy import select

from comps.cores.errors import Conflict, InvalidRequest, NotFound
from comps.finetuning.jobs.adapters import create_extract, create_merge
from comps.finetuning.jobs.create import create_fine_tuning_job
from comps.finetuning.jobs.secrets import Secrets
from comps.finetuning.owner import EVERYBODY, Owner
from comps.finetuning.schemas.adapters import ExtractRequest, MergeRequest
from comps.finetuning.schemas.integrations import tracking_environment
from comps.finetuning.schemas.jobs import JobRequest
from comps.finetuning.settings import Settings
from comps.finetuning.store.database import Database
from comps.finetuning.store.tables import CheckpointRow, EventRow, JobRow, ModelRow, new_id
from comps.tuning.export.extract import extract
from comps.tuning.spec import ExtractSpec, MergeSpec, TrainSpec


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and a super-adapter of it, to be copied."""
    directory = tmp_path_factory.mktemp("models")
    save_tiny_model(directory / "base")
    super_adapter(tiny_model(), lora(), directory / "adapter")
    return directory


@pytest.fixture
def settings(tmp_path: Path, models: Path) -> Settings:
    settings = Settings(data_dir=tmp_path, hf_hub_offline=True)
    settings.jobs_dir.mkdir()
    shutil.copytree(models / "base", settings.models_dir / "org" / "tiny")
    return settings


@pytest.fixture
def database(settings: Settings) -> Database:
    database = Database(settings.database_url)
    database.migrate()
    return database


@pytest.fixture
def secrets(settings: Settings) -> Secrets:
    return Secrets(settings.data_dir / "secrets.key")


@pytest.fixture
def create(settings: Settings, database: Database, secrets: Secrets) -> Any:
    add_file(database, "rows.json")

    def create(owner: Owner = EVERYBODY, **body: Any) -> JobRow:
        request = JobRequest.model_validate({"training_file": "rows.json", "model": "org/tiny"} | body)
        return create_fine_tuning_job(database, settings, secrets, request, owner)

    return create


def spec_of(job: JobRow) -> TrainSpec:
    return TrainSpec.model_validate(job.spec)


def test_the_row_says_what_the_request_asked_for(create: Any, settings: Settings) -> None:
    body = SQFT_ONE_GROUP | {"model": "org/tiny", "training_file": "rows.json", "suffix": "arc", "seed": 7}
    job = create(**body, metadata={"who": "me"})
    spec = spec_of(job)
    assert job.id.startswith("ft-job-")
    assert (job.status, job.model, job.suffix, job.seed) == ("validating_files", "org/tiny", "arc", 7)
    assert (job.job_metadata, job.warnings) == ({"who": "me"}, [])
    assert job.hyperparameters == {"n_epochs": 5, "batch_size": 16, "learning_rate_multiplier": 2.0}
    assert spec.directory == settings.jobs_dir / job.id
    assert spec.base_model.path == str(settings.models_dir / "org" / "tiny")
    assert [group.ranks for group in spec.lora.groups] == [(16, 12, 8)]
    assert (spec.training.epochs, spec.training.learning_rate, spec.training.seed) == (5, 1e-4, 7)
    assert (spec.data.max_length, spec.data.train_name) == (256, "rows.json")
    assert spec.data.train_file == settings.files_dir / str(job.training_file)
    assert (spec.resources.num_workers, spec.resources.cpus) == (1, None)
    assert spec_of(create(Training={"learning_rate": "auto"})).training.auto == ("learning_rate",)


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({}, (True, True)),
        ({"mask_input": False}, (False, False)),
        ({"mask_input": False, "mask_response": True}, (False, True)),
    ],
)
def test_turning_the_masking_of_prompts_off_does_not_mask_the_responses(
    create: Any, block: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    data = TrainSpec.model_validate(create(Dataset=block).spec).data
    assert (data.mask_input, data.mask_response) == expected


def test_only_files_that_were_uploaded_for_it_are_trained_on(create: Any, database: Database) -> None:
    other = add_file(database, "other.json", purpose="user_data")
    for name in (other, "other.json"):
        for field in ("training_file", "validation_file"):
            with pytest.raises(
                InvalidRequest, match=r"the purpose 'user_data'; upload it with .*'fine-tune'"
            ):
                create(**{field: name})
    right = add_file(database, "other.json", created_at=1000.0)
    assert create(training_file="other.json").training_file == right


def test_warnings_are_events_too(create: Any, database: Database) -> None:
    job = create(surprise=1, General={"output_dir": "/tmp/x"}, Training={"dpo_beta": 0.5})
    with database.reading() as session:
        query = select(EventRow.message).where(EventRow.job_id == job.id, EventRow.level == "warn")
        assert list(session.scalars(query)) == job.warnings
    assert len(job.warnings) == 3


def test_a_name_means_the_newest_file_of_that_name(create: Any, database: Database) -> None:
    add_file(database, "twice.json", created_at=1000.0)
    newer = add_file(database, "twice.json", created_at=2000.0)
    add_file(database, "twice.json", created_at=3000.0, expires_at=3001.0)
    assert create(training_file="twice.json").training_file == newer
    assert create(training_file=newer).training_file == newer
    assert create(validation_file="twice.json").validation_file == newer
    assert create(Dataset={"validation_file": "twice.json"}).validation_file == newer


def test_a_missing_file_is_not_found(create: Any) -> None:
    for body, param in [
        ({"training_file": "none.json"}, "training_file"),
        ({"validation_file": "none.json"}, "validation_file"),
        ({"Dataset": {"validation_file": "none.json"}}, "Dataset.validation_file"),
    ]:
        with pytest.raises(NotFound, match=r"none\.json") as caught:
            create(**body)
        assert caught.value.param == param


def test_a_refused_request_leaves_no_row(create: Any, database: Database) -> None:
    groups = {"neural_lora_search": True, "target_module_groups": [["w_proj"]], "search_space": ["8"]}
    for body in (
        {"model": "org/none"},
        {"model": None},
        {"General": {"lora_config": groups}},
        {"Training": {"mixed_precision": "fp16"}},
        {"General": {"resume_from_checkpoint": "ftckpt-none"}},
    ):
        with pytest.raises((InvalidRequest, NotFound)):
            create(**body)
    with database.reading() as session:
        assert session.scalars(select(JobRow)).all() == []


def test_the_token_is_kept_sealed_only(
    create: Any, secrets: Secrets, settings: Settings, database: Database
) -> None:
    job = create(General={"config": {"token": "hf_canary"}, "base_model": "org/tiny"}, model=None)
    assert secrets.token(job) == "hf_canary"
    assert "hf_canary" not in json.dumps([job.spec, job.request, job.warnings])
    database.dispose()
    files = [path for path in settings.data_dir.rglob("*") if path.is_file()]
    assert not any(b"hf_canary" in path.read_bytes() for path in files)


def test_a_registered_base_model_is_found_by_its_id(
    create: Any, database: Database, settings: Settings
) -> None:
    with database.session() as session:
        session.add(
            ModelRow(id="mine", kind="base", path=str(settings.models_dir / "org" / "tiny"), details={})
        )
    assert spec_of(create(model="mine")).base_model.path.endswith("org/tiny")


def test_jobs_and_files_of_others_are_not_found(create: Any, database: Database) -> None:
    theirs = add_file(database, "theirs.json", owner="them")
    assert create(owner=Owner("them"), training_file=theirs).owner == "them"
    with pytest.raises(NotFound):
        create(owner=Owner("us"), training_file=theirs)
    assert create(owner=Owner("operator", sees_all=True), training_file=theirs).owner == "operator"


def test_by_name_the_callers_own_file_goes_before_others(create: Any, database: Database) -> None:
    operator = Owner("operator", sees_all=True)
    ours = add_file(database, "same.json", owner="operator")
    theirs = add_file(database, "same.json", owner="them", created_at=time.time() + 60)
    assert create(owner=operator, training_file="same.json").training_file == ours
    assert create(owner=Owner("them"), training_file="same.json").training_file == theirs


def test_a_run_starts_from_a_checkpoint_of_the_same_adapter(create: Any, database: Database) -> None:
    job = create(General={"lora_config": {"r": 4}})
    path = f"{spec_of(job).directory}/output/checkpoint-5"
    with database.session() as session:
        session.add(CheckpointRow(id="ftckpt-1", job_id=job.id, step=5, path=path))
    for name in ("ftckpt-1", path):
        again = create(General={"lora_config": {"r": 4}, "resume_from_checkpoint": name})
        assert spec_of(again).resume_from == Path(path)
    with pytest.raises(InvalidRequest, match="another lora_config"):
        create(General={"lora_config": {"r": 8}, "resume_from_checkpoint": "ftckpt-1"})
    with pytest.raises(NotFound):
        create(General={"lora_config": {"r": 4}, "resume_from_checkpoint": f"{path}/../checkpoint-5"})


def test_an_integration_reports_the_run_where_it_says(create: Any) -> None:
    wandb = {"project": "p", "entity": "e", "tags": ["a", "b"]}
    body = {"integrations": [{"type": "wandb", "wandb": wandb}]}
    job = create(**body)
    assert spec_of(job).training.report_to == "wandb"
    assert tracking_environment(job.request["integrations"]) == {
        "WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_TAGS": "a,b",
    }  # fmt: skip
    assert job.warnings == []
    body["integrations"][0]["wandb"] = wandb | {"name": "n"}
    body["General"] = {"report_to": "none"}
    named, unused = create(**body).warnings
    assert named == "integrations.0.wandb.name is not used: the run is named after the job."
    assert unused == "integrations is not used: General.report_to is none."


def test_devices_and_resources(create: Any) -> None:
    job = create(Training={"num_training_workers": 2, "resources_per_worker": {"CPU": 1, "GPU": 1}})
    assert (spec_of(job).resources.num_workers, spec_of(job).resources.cpus) == (2, 1)
    assert spec_of(job).resources.gpus == 0
    assert "Training.device is cpu" in job.warnings[0]
    assert spec_of(create(Training={"device": "gpu"})).resources.gpus == 1


# -- extraction and merge -----------------------------------------------------------------------------

CUSTOM = [8, 5, 2, 8, 5, 2]  # three groups, two layers


@pytest.fixture
def job_id(database: Database, settings: Settings, models: Path) -> str:
    return succeeded_job(
        database, settings.jobs_dir, settings.models_dir / "org" / "tiny", models / "adapter"
    )


def ask_extract(database: Database, settings: Settings, **body: Any) -> JobRow:
    return create_extract(database, settings, ExtractRequest.model_validate(body), EVERYBODY)


def ask_merge(database: Database, settings: Settings, **body: Any) -> JobRow:
    return create_merge(database, settings, MergeRequest.model_validate(body), EVERYBODY)


def run_extract(database: Database, job: JobRow) -> None:
    result = extract(ExtractSpec.model_validate(job.spec))
    start_and_finish(database, job.id, {"outcome": "succeeded"} | result)


def test_an_extraction_is_run_once_and_then_answered_from_its_output(
    database: Database, settings: Settings, job_id: str
) -> None:
    first = ask_extract(database, settings, fine_tuning_job_id=job_id)
    spec = ExtractSpec.model_validate(first.spec)
    assert (first.kind, first.status, first.version) == ("extract", "queued", "heuristic")
    assert spec.output == settings.jobs_dir / job_id / "output" / "heuristic"
    assert spec.config == (5,) * 6
    same = {"fine_tuning_job_id": job_id, "sub_adapter_version": "heuristic"}
    assert ask_extract(database, settings, **same).id == first.id  # while it is under way
    run_extract(database, first)
    again = ask_extract(database, settings, **same)
    assert (again.id, again.status) == (first.id, "succeeded")


def test_a_version_keeps_its_configuration(database: Database, settings: Settings, job_id: str) -> None:
    body = {"fine_tuning_job_id": job_id, "adapter_version": "mine", "custom_config": CUSTOM}
    first = ask_extract(database, settings, **body)
    with pytest.raises(Conflict, match="another configuration") as caught:
        ask_extract(database, settings, **body | {"custom_config": CUSTOM[::-1]})
    assert caught.value.headers["x-should-retry"] == "false"
    assert ask_extract(database, settings, **body).id == first.id
    assert ask_extract(database, settings, fine_tuning_job_id=job_id, adapter_version="mine").id == first.id


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"custom_config": [8] * 5, "adapter_version": "mine"}, "custom_config"),
        ({"custom_config": [7] * 6, "adapter_version": "mine"}, "custom_config"),
        ({"adapter_version": "mine"}, "custom_config"),
        ({"adapter_version": "best", "custom_config": CUSTOM}, "adapter_version"),
        ({"adapter_version": "best"}, "adapter_version"),
        ({"adapter_version": "heuristic", "custom_config": CUSTOM}, "custom_config"),
        ({"custom_config": CUSTOM}, "adapter_version"),
        ({"adapter_version": "a", "sub_adapter_version": "b", "custom_config": CUSTOM}, "adapter_version"),
    ],
)
def test_wrong_extractions_are_refused_at_once(
    database: Database, settings: Settings, job_id: str, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask_extract(database, settings, fine_tuning_job_id=job_id, **body)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "name", ["../up", "checkpoint-5", "Checkpoints", "merged_model", "events", "a/b", ".", "", "x" * 65,
             "adapter_config.json", "a\0", "runs", "-a"],
)  # fmt: skip
def test_versions_that_are_no_names_or_reserved_are_refused(name: str) -> None:
    for field in ("adapter_version", "sub_adapter_version"):
        with pytest.raises(ValueError):
            ExtractRequest.model_validate({field: name})


def test_a_directory_that_is_no_adapter_is_never_replaced(
    database: Database, settings: Settings, job_id: str
) -> None:
    (settings.jobs_dir / job_id / "output" / "notes").mkdir()
    body = {"fine_tuning_job_id": job_id, "adapter_version": "notes", "custom_config": CUSTOM}
    with pytest.raises(InvalidRequest, match="reserved"):
        ask_extract(database, settings, **body)


def test_only_finished_elastic_jobs_have_sub_adapters(
    create: Any, database: Database, settings: Settings
) -> None:
    unfinished = create()
    with pytest.raises(Conflict, match="is validating_files") as caught:
        ask_extract(database, settings, fine_tuning_job_id=unfinished.id)
    assert caught.value.code == "job_not_succeeded"
    plain = succeeded_job(database, settings.jobs_dir, settings.models_dir / "org" / "tiny", None)
    with pytest.raises(InvalidRequest, match="no elastic ranks"):
        ask_extract(database, settings, fine_tuning_job_id=plain)
    with pytest.raises(InvalidRequest, match="leave adapter_version out"):
        ask_merge(database, settings, fine_tuning_job_id=plain, adapter_version="heuristic")
    with pytest.raises(NotFound):
        ask_extract(database, settings, fine_tuning_job_id=new_id("ft-job"))


def test_a_version_is_extracted_before_it_is_merged(
    database: Database, settings: Settings, job_id: str
) -> None:
    body = {"fine_tuning_job_id": job_id, "adapter_version": "minimal"}
    with pytest.raises(NotFound, match="extract_adapter"):
        ask_merge(database, settings, **body)
    extraction = ask_extract(database, settings, **body)
    with pytest.raises(Conflict, match="still being extracted"):
        ask_merge(database, settings, **body)
    run_extract(database, extraction)
    first = ask_merge(database, settings, **body)
    output = settings.jobs_dir / job_id / "output"
    assert MergeSpec.model_validate(first.spec).output == output / "minimal" / "merged_model"
    assert ask_merge(database, settings, **body).id == first.id
    whole = MergeSpec.model_validate(ask_merge(database, settings, fine_tuning_job_id=job_id).spec)
    assert (whole.adapter, whole.output) == (output, output / "merged_model")


def test_a_registered_super_adapter_is_named_by_model(
    database: Database, settings: Settings, job_id: str
) -> None:
    directory = settings.models_dir / "theirs"
    (settings.jobs_dir / job_id / "output").rename(directory)
    with database.session() as session:
        row = {"id": "org/theirs", "kind": "super_adapter", "base_model": "org/tiny"}
        session.add(ModelRow(**row, path=str(directory), details={}))
    job = ask_extract(database, settings, model="org/theirs")
    spec = ExtractSpec.model_validate(job.spec)
    assert spec.output == settings.data_dir / "adapters" / "org@theirs" / "heuristic"
    run_extract(database, job)
    merged = MergeSpec.model_validate(
        ask_merge(database, settings, model="org/theirs", adapter_version="heuristic").spec
    )
    assert merged.output == spec.output / "merged_model"
    assert merged.base_model.path == str(settings.models_dir / "org" / "tiny")
    with pytest.raises(NotFound):
        ask_extract(database, settings, model="org/none")


def test_an_adapter_whose_files_were_deleted_is_not_there(
    database: Database, settings: Settings, job_id: str
) -> None:
    shutil.rmtree(settings.jobs_dir / job_id / "output")
    for ask in (ask_extract, ask_merge):
        with pytest.raises(NotFound, match=f"The adapter of the job {job_id} is no longer there"):
            ask(database, settings, fine_tuning_job_id=job_id)


def test_a_finished_jobs_model_name_leads_to_the_job(
    database: Database, settings: Settings, job_id: str
) -> None:
    with database.reading() as session:
        name = session.scalars(select(JobRow.fine_tuned_model).where(JobRow.id == job_id)).one()
    assert ask_extract(database, settings, model=name).source == job_id
