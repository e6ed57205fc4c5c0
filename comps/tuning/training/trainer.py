"""transformers' Trainer with our batches and our validation loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from comps.tuning.data.batching import LengthGroupedSampler
from comps.tuning.elastic.model import ElasticController
from comps.tuning.fused import Fusion, fuse
from comps.tuning.training.estimate import packed_work, step_work
from comps.tuning.training.loss import keeps_positions, labelled_only, mean_loss
from comps.tuning.training.packing import pack, packed_loss, packs
from comps.tuning.training.statistics import Statistics


class RankBatches(Sampler[list[int]]):
    """This worker's rows of every global micro-batch.

    ``order`` gives row indices; each run of ``global_batch`` of them is one micro-batch of all workers, and
    worker ``rank`` of ``world`` takes every ``world``-th row of it. So one worker and several see the
    same global batches. The last batch is smaller when the rows don't divide; it is dropped when it
    has fewer rows than there are workers, since each needs one.
    """

    def __init__(self, order: LengthGroupedSampler, global_batch: int, rank: int, world: int) -> None:
        self._order, self._rank, self._world = order, rank, world
        self.rows = global_batch

    def set_epoch(self, epoch: int) -> None:
        self._order.set_epoch(epoch)

    def order(self, epoch: int | None = None) -> list[int]:
        """All rows as they come in ``epoch``, or in the present one."""
        return self._order.rows(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order()
        for start in range(0, len(rows), self.rows):
            batch = rows[start : start + self.rows]
            if len(batch) >= self._world:
                yield batch[self._rank :: self._world]

    def __len__(self) -> int:
        full, rest = divmod(len(self._order), self.rows)
        return full + (rest >= self._world)


class _EpochSetter(TrainerCallback):  # type: ignore[misc]
    """Tells our batches which epoch begins: the Trainer only tells samplers that accelerate has wrapped."""

    def __init__(self, batches: RankBatches) -> None:
        self._batches = batches

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._batches.set_epoch(int(state.epoch or 0))


class TuningTrainer(Trainer):  # type: ignore[misc]
    """``train_dataset`` and ``eval_dataset`` are :class:`TokenRows`.

    ``controller``: the elastic ranks, or ``None``; validation runs at the maximal configuration.
    ``statistics``: told the loss of every micro-batch, or ``None``.
    ``packed``: whether the model takes batches without padding; ``fusion``: what of it is fused then.
    """

    def __init__(
        self,
        *,
        controller: ElasticController | None,
        statistics: Statistics | None = None,
        shuffle: bool,
        **kwargs: Any,
    ) -> None:
        args: TrainingArguments = kwargs["args"]
        model, sets = kwargs["model"].get_base_model(), (kwargs["train_dataset"], kwargs["eval_dataset"])
        model.eval()  # for the trials; PEFT's new adapters have their dropout on
        longest = max(max(rows.lengths) for rows in sets if rows)
        # How a batch becomes the model's inputs, and their outputs a loss; without, the model has its own.
        self._inputs: Callable[[dict[str, torch.Tensor]], dict[str, Any]] | None = None
        loss: Callable[..., torch.Tensor] | None = None
        self.packed = packs(model, longest)
        self.fusion: Fusion | None = None
        if self.packed:
            self._inputs, loss = pack, packed_loss
            if model.device.type == "cpu" and not (args.bf16 or args.fp16):
                self.fusion = fuse(model)
                loss = self.fusion.loss
        elif keeps_positions(model):
            self._inputs, loss = labelled_only, mean_loss
        super().__init__(compute_loss_func=loss, **kwargs)
        self._controller, self._statistics = controller, statistics
        self._flops_per_token: int | None = None
        rows = args.per_device_train_batch_size * args.world_size
        order = LengthGroupedSampler(
            self.train_dataset.lengths, rows * args.gradient_accumulation_steps, args.seed, shuffle
        )
        self._lengths: list[int] = self.train_dataset.lengths
        self._common = self.train_dataset.common_beginning()
        self._batches = RankBatches(order, rows, args.process_index, args.world_size)
        self.add_callback(_EpochSetter(self._batches))

    def describe(self) -> str:
        """How batches are computed, in a sentence."""
        if not self.packed:
            return "This architecture's batches are padded: its attention cannot do without"
        found = ["no padding, and what all rows of a batch begin with only once"]
        if self.fusion and self.fusion.layers:
            found.append(f"{self.fusion.layers} fused layers")
        if self.fusion and self.fusion.head:
            found.append("no logits but those of a few labels at a time")
        return f"Computing with {'; '.join(found)}"

    def work(self, epoch: int) -> list[int]:
        """Tokens that each optimizer step of an epoch computes on."""
        rows = self._batches.rows * self.args.gradient_accumulation_steps
        lengths, order = self.train_dataset.lengths, self._batches.order(epoch)
        if self.packed:
            batches = self.args.world_size * self.args.gradient_accumulation_steps
            return packed_work(lengths, order, rows, self._common, batches)
        return step_work(lengths, order, rows, self.data_collator.length or 0)

    def micro_batches(self) -> list[list[int]]:
        """The rows of this worker's micro-batches in the first epoch."""
        self._batches.set_epoch(0)
        return list(self._batches)

    def batch_work(self, rows: list[int]) -> int:
        """Tokens that one micro-batch computes on."""
        lengths = [self._lengths[row] for row in rows]
        if self.packed:
            return sum(lengths) - int(self._common) * (len(rows) - 1)
        longest: int = max(*lengths, self.data_collator.length or 0)
        return longest * len(rows)

    def try_batch(self, rows: list[int]) -> float:
        """Forward and backward on a micro-batch without a consequence; its seconds."""
        began = time.perf_counter()
        self.model.train()
        batch = self.data_collator([self.train_dataset[row] for row in rows])
        batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, batch)
        loss.backward()
        self.model.zero_grad()
        return time.perf_counter() - began

    def recompute_activations(self) -> bool:
        """Turn gradient checkpointing on; false for a model that cannot do it."""
        if not self.model.get_base_model().supports_gradient_checkpointing:
            return False
        self.args.activation_checkpointing = True
        self.args.activation_checkpointing_kwargs = {"use_reentrant": False}
        self.model.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        return True

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self._batches, collate_fn=self.data_collator)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the Trainer's, which goes through all modules to count their weights at each step."""
        if self._flops_per_token is None:
            self._flops_per_token = 6 * int(self.model.num_parameters(exclude_embeddings=True))
        return self._flops_per_token * int(inputs["input_ids"].numel())

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, which it leaves the rest to."""
        if self._inputs:
            inputs = self._inputs(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As the Trainer's, and the loss is noted."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._statistics:
            self._statistics.add(loss, num_items_in_batch)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss of one label token over the whole validation set, exact also for uneven batches
        and several workers."""
        if self._controller is None:
            loss = self._validation_loss()
        else:
            with self._controller.at(self._controller.space.maximal):
                loss = self._validation_loss()
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def _validation_loss(self) -> float:
        rows = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        by_length = sorted(rows, key=self.eval_dataset.lengths.__getitem__)
        size = self.args.per_device_eval_batch_size
        sums = torch.zeros(2, dtype=torch.float64)
        self.model.eval()
        for start in range(0, len(by_length), size):
            batch = self.data_collator([self.eval_dataset[row] for row in by_length[start : start + size]])
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            if tokens:
                batch = {name: tensor.to(self.args.device) for name, tensor in batch.items()}
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, batch)
                sums += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
        self.model.train()
        if self.args.world_size > 1:
            sums = sums.to(self.args.device)
            torch.distributed.all_reduce(sums)
        return float(sums[0] / sums[1])
