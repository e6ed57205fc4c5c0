"""What one run is asked to do: the only thing that crosses from the service to the library.

A spec is plain data in a JSON file (``spec.json`` in the run's directory). This module needs no
torch, so that the service can build and check specs; ``python -m comps.tuning SPEC.json`` runs one.
Secrets never go into a spec: see ``comps.tuning.sealed``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

# The Trainer's schedules and optimizers that need no settings, or packages, of their own.
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial",
    "constant", "constant_with_warmup", "inverse_sqrt",
]  # fmt: skip
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd"]


class Spec(BaseModel):
    """Base of all specs: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RankGroup(Spec):
    """Modules that share one active rank within a layer, and the ranks it may take.

    ``modules`` are last path components (``"q_proj"``), ``ranks`` descending and unique.
    """

    modules: tuple[str, ...] = Field(min_length=1)
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _descending(self) -> RankGroup:
        if list(self.ranks) != sorted(set(self.ranks), reverse=True):
            raise ValueError(f"ranks must be unique and descending, not {list(self.ranks)}")
        return self


class GridSpec(Spec):
    """Four bits a weight: with a zero point for each group of inputs, or symmetric about 0.

    ``embeddings``: 8 bits a weight for the embeddings and the output head, or as they are stored.
    """

    mode: Literal["int4_asym", "int4_sym"] = "int4_asym"
    group_size: Literal[32, 64, 128] = 64
    embeddings: Literal["int8", "as_is"] = "int8"


class LoraSpec(Spec):
    """A LoRA adapter; with ``groups`` it is an NLS super-adapter of maximal rank ``r``."""

    r: int = Field(8, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    # None: PEFT's default modules for the architecture. Modules of groups are always targets.
    target_modules: tuple[str, ...] | None = None
    use_rslora: bool = False
    groups: tuple[RankGroup, ...] = ()
    # Masked by the zeros of the base's weights, which a merge then keeps (SparsePEFT).
    sparse: bool = False
    # Sample once per optimizer step (default) or once per micro-batch, as the original does.
    sample_per: Literal["step", "micro_batch"] = "step"
    # Quantisation-aware: the adapter is trained within the rounding to this grid, and is merged onto it.
    grid: GridSpec | None = None

    @model_validator(mode="after")
    def _ranks_fit(self) -> LoraSpec:
        for index, group in enumerate(self.groups):
            if group.ranks[0] > self.r:
                raise ValueError(f"group {index} has rank {group.ranks[0]} above r={self.r}")
        if self.grid and self.dropout:
            raise ValueError("an adapter within a rounding has no dropout of its own input")
        return self


class ModelSpec(Spec):
    """A base model: ``path`` is a local directory, or a hub id when ``local`` is false."""

    name: str
    path: str
    local: bool = True
    trust_remote_code: bool = False


class DataSpec(Spec):
    """Where the records are and how they become token rows.

    ``*_file`` are paths; ``*_name`` are the client's names for them, used in messages only.
    ``mask_input`` and ``mask_response`` say which tokens carry loss: ``comps.tuning.data.masking``.
    A file with a record above ``max_record_bytes`` or more than ``max_records`` (None: any number) is
    refused, when it is validated and when it is read.
    """

    train_file: Path
    train_name: str = ""
    validation_file: Path | None = None
    validation_name: str = ""
    validation_split_percentage: float = Field(5, ge=0, lt=100)
    max_length: int = Field(512, ge=2)
    max_source_length: int = Field(384, ge=1)
    mask_input: bool = True
    mask_response: bool = False
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"
    pad_to_max: bool = False
    # Pretraining: concatenate texts and cut them into blocks of block_size tokens.
    group: bool = True
    block_size: int = Field(512, ge=2)
    shuffle: bool = True
    max_train_samples: int | None = Field(None, ge=1)
    max_eval_samples: int | None = Field(None, ge=1)
    max_record_bytes: int = Field(10_000_000, ge=1)
    max_records: int | None = Field(None, ge=1)


class OptimizationSpec(Spec):
    """How the adapter is optimised. Rates and counts are per optimizer step unless said otherwise."""

    epochs: float = Field(1, gt=0)
    batch_size: int = Field(2, ge=1)  # rows per worker and micro-batch
    gradient_accumulation_steps: int = Field(1, ge=1)
    max_train_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    lr_scheduler: Scheduler = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0, ge=0)
    optimizer: Optimizer = "adamw_torch"
    logging_steps: int = Field(10, ge=1)
    # Of these the worker chooses the value, by the rules of comps.tuning.training.auto.
    auto: tuple[Literal["learning_rate", "batch_size"], ...] = ()
    save_strategy: Literal["no", "epoch", "steps"] = "steps"
    save_steps: int | None = Field(None, ge=1)  # None: a tenth of the run
    save_total_limit: int | None = Field(None, ge=1)
    gradient_checkpointing: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    report_to: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    seed: int = 42


class ResourcesSpec(Spec):
    """What each of the workers gets. ``cpus`` None: all cores of the node it lands on."""

    num_workers: int = Field(1, ge=1)
    cpus: int | None = Field(None, ge=1)
    gpus: float = Field(0, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"


class TrainSpec(Spec):
    """Train one adapter. ``directory`` is the run's directory (see ``comps.tuning.rundir``)."""

    kind: Literal["train"] = "train"
    job_id: str
    directory: Path
    task: Literal["instruction_tuning", "pretraining"] = "instruction_tuning"
    base_model: ModelSpec
    lora: LoraSpec
    data: DataSpec
    training: OptimizationSpec
    resources: ResourcesSpec = ResourcesSpec()
    # A checkpoint directory to start from; the run's own newest good checkpoint comes first.
    resume_from: Path | None = None


class ExtractSpec(Spec):
    """Cut the sub-adapter ``version`` out of a super-adapter's directory.

    ``config`` gives one rank per group, group-major then layer, and is needed for versions that
    are not ``maximal``, ``heuristic``, ``minimal`` or ``learned``; ``search`` is the id of the search that
    has found it, if one has. ``form``: ``pattern`` keeps per-module ranks
    (stock PEFT), ``uniform`` pads with zeros to the super-adapter's rank.
    """

    kind: Literal["extract"] = "extract"
    job_id: str
    directory: Path
    super_adapter: Path
    version: str
    config: tuple[int, ...] | None = None
    form: Literal["pattern", "uniform"] = "pattern"
    output: Path
    search: str | None = None


class MergeSpec(Spec):
    """Merge an adapter directory (any rank form) into its base model; the result goes to ``output``.

    ``openvino``: write the INT4 model that a quantisation-aware adapter gives as an OpenVINO model, too, in
    ``output/openvino``.
    """

    kind: Literal["merge"] = "merge"
    job_id: str
    directory: Path
    adapter: Path
    base_model: ModelSpec
    output: Path
    openvino: bool = False


class SearchSpec(Spec):
    """Search the ranks of a super-adapter for sub-adapters that score well and cost little.

    What is scored are the questions (or records) in ``validation_file``; without one, the rows that the
    training has held out of its data: ``data``, ``task`` and ``data_seed`` are then those of the training.
    ``metric`` None: ``acc_norm`` where there are choices, else ``loss``. ``texts``: see
    ``comps.tuning.evaluation.questions``.

    ``num_evals`` are evaluations of one sub-adapter on all of the search's ``items`` (None: two thirds of
    what there is, at most 300). With ``halving`` weak ones see a quarter or half of the items only, which
    counts as a quarter or half. The ``finalists`` are scored on up to ``all_items`` in the end (None: four
    times ``items``). ``known`` are the ``evaluations.jsonl`` of earlier searches, used where they fit.
    """

    kind: Literal["search"] = "search"
    job_id: str
    directory: Path
    super_adapter: Path
    base_model: ModelSpec
    data: DataSpec
    task: Literal["instruction_tuning", "pretraining"] = "instruction_tuning"
    data_seed: int = 42
    validation_file: Path | None = None
    validation_name: str = ""
    texts: bool = False
    algorithm: Literal["nsga2", "hill_climbing", "random", "learned"] = "nsga2"
    num_evals: int = Field(50, ge=1)
    population: int = Field(20, ge=4)
    seed: int = 42
    metric: Literal["acc", "acc_norm", "loss"] | None = None
    cost: Literal["parameters", "macs"] = "parameters"
    items: int | None = Field(None, ge=4)
    all_items: int | None = Field(None, ge=4)
    finalists: int = Field(5, ge=1)
    halving: bool = True
    known: tuple[Path, ...] = ()
    resources: ResourcesSpec = ResourcesSpec()


class CalibrationSpec(Spec):
    """Records whose activations tell what matters in a base model: ``samples`` of them, drawn with ``seed``.

    ``file`` is a path, ``name`` the client's name for it. Any shape of records will do; a row has at most
    ``max_length`` tokens. The limits are those of :class:`DataSpec`.
    """

    file: Path
    name: str = ""
    samples: int = Field(128, ge=1)
    max_length: int = Field(512, ge=2)
    seed: int = 42
    max_record_bytes: int = Field(10_000_000, ge=1)
    max_records: int | None = Field(None, ge=1)


Pattern = Literal["2:4", "4:8"]


class PruneSpec(Spec):
    """Prune a base model; the new one, called ``name``, goes to ``output``.

    Either ``sparsity`` (the fraction of each output row's weights that become zero) or ``pattern`` N:M (of
    each M consecutive inputs N stay). ``wanda`` needs ``calibration``, ``magnitude`` has no use for it.
    """

    kind: Literal["prune"] = "prune"
    job_id: str
    directory: Path
    name: str
    base_model: ModelSpec
    method: Literal["wanda", "magnitude"] = "wanda"
    sparsity: float | None = Field(None, gt=0, lt=1)
    pattern: Pattern | None = None
    calibration: CalibrationSpec | None = None
    resources: ResourcesSpec = ResourcesSpec()
    output: Path

    @model_validator(mode="after")
    def _complete(self) -> PruneSpec:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("exactly one of sparsity and pattern is needed")
        if self.method == "wanda" and self.calibration is None:
            raise ValueError("wanda needs calibration data")
        return self


MetricName = Literal[
    "acc", "acc_norm", "acc_bytes", "loss", "perplexity", "token_accuracy", "exact_match", "numeric_match"
]


class QuantizeSpec(Spec):
    """Put a base model's weights on integer grids; the new one, called ``name``, goes to ``output``.

    ``nearest`` rounds each weight; ``gptq`` has the weights that come after it in its row make up for the
    error on ``calibration``. With ``openvino`` the model is also written as an OpenVINO model, in
    ``output/openvino``.
    """

    kind: Literal["quantize"] = "quantize"
    job_id: str
    directory: Path
    name: str
    base_model: ModelSpec
    method: Literal["nearest", "gptq"] = "nearest"
    grid: GridSpec = GridSpec()
    calibration: CalibrationSpec | None = None
    openvino: bool = False
    resources: ResourcesSpec = ResourcesSpec()
    output: Path

    @model_validator(mode="after")
    def _complete(self) -> QuantizeSpec:
        if self.method == "gptq" and self.calibration is None:
            raise ValueError("gptq needs calibration data")
        return self


class EvaluateSpec(Spec):
    """Evaluate a model on questions, from a ``file`` or of a built-in ``task`` (one of the two is given).

    ``adapter`` is an adapter's directory; with ``config`` it is a super-adapter, evaluated at these ranks
    (one for each group, group-major then layer), which ``version`` is a name of. Without ``metrics``, those
    that suit the questions. ``texts``: see ``comps.tuning.evaluation.questions``. ``limit`` questions are
    drawn with ``seed``. ``max_length`` is for the metrics of tokens, ``max_new_tokens`` and ``batch_size``
    for generated answers.
    """

    kind: Literal["evaluate"] = "evaluate"
    job_id: str
    directory: Path
    base_model: ModelSpec
    adapter: Path | None = None
    version: str | None = None
    config: tuple[int, ...] | None = None
    file: Path | None = None
    file_name: str = ""
    task: str | None = None
    tasks_dir: Path = Path("tasks")
    metrics: tuple[MetricName, ...] = ()
    texts: bool = False
    limit: int | None = Field(None, ge=1)
    seed: int = 42
    max_length: int = Field(2048, ge=2)
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(16, ge=1)
    max_record_bytes: int = Field(10_000_000, ge=1)
    resources: ResourcesSpec = ResourcesSpec()

    @model_validator(mode="after")
    def _one_source(self) -> EvaluateSpec:
        if (self.file is None) == (self.task is None):
            raise ValueError("exactly one of file and task is needed")
        return self


AnySpec = TrainSpec | ExtractSpec | MergeSpec | PruneSpec | QuantizeSpec | EvaluateSpec | SearchSpec
_ADAPTER: TypeAdapter[AnySpec] = TypeAdapter(Annotated[AnySpec, Field(discriminator="kind")])


def read_spec(fields: dict[str, Any]) -> AnySpec:
    """A spec from its JSON object. Raises ``pydantic.ValidationError`` for anything that is not a spec."""
    return _ADAPTER.validate_python(fields)


def load_spec(path: Path) -> AnySpec:
    """Read a spec file. Raises ``pydantic.ValidationError`` for anything that is not a spec."""
    return _ADAPTER.validate_json(path.read_bytes())
