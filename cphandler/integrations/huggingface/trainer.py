"""transformers' Trainer where the ranks of a group share each batch: data, counts and metrics as on one rank."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cphandler.comm.groups import CPGroup
from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.integrations.huggingface.package import stack_module, transformers_module
from cphandler.integrations.huggingface.parallelism import parallel_forward, parallelize

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Trainer as _Base
else:
    _Base = object


class ContextParallelTrainerMixin(_Base):  # type: ignore[misc]
    """Makes a Trainer of transformers, or of a package built on it, train a parallelized model as one rank would.

    Put it first among the bases: ``class SFT(ContextParallelTrainerMixin, SFTTrainer): ...``. TRL's Trainer takes its
    metrics from whole logits, and its default loss replaces the model's forward pass: it needs
    ``parallelize(..., gather_logits="always")`` and ``SFTConfig(loss_type="nll")``. The ranks of a group see
    the same batches, and groups see different ones, as ranks do without context parallelism. Whatever counts batches
    counts those of a group once: ``num_items_in_batch``, losses, predictions, metrics, tokens seen.

    The model must be parallelized with ``gradient="mean"``, since DDP and FSDP average gradients over all ranks; a
    model that is not is parallelized here where ``args.parallelism_config`` has a "cp" dim.

    Raises:
        InvalidValueError: a model that is not parallelized, or for gradients that are summed.
        UnsupportedError: settings of the Trainer that cannot be served, by name.
    """

    _counts_labels = False

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **settings: Any) -> None:
        config = getattr(args, "parallelism_config", None)
        if model is not None and config is not None and getattr(config, "cp_size", 1) > 1:
            self._check_mesh(config)
            if not _is_parallelized(model):
                parallelize(model, config)
        if model is None:
            raise UnsupportedError(
                "the model must be there when the Trainer is made",
                got="model=None",
                fix="parallelize a model and pass it; model_init makes one that is not parallelized",
            )
        self._cp = parallel_forward(model).settings
        self._check_settings(args, settings)
        super().__init__(model, args, *others, **settings)
        self._dp_rank, self._leaders = _data_ranks(self._cp.ranks, self.args.world_size)

    @staticmethod
    def _check_mesh(config: Any) -> None:
        if getattr(config, "tp_size", 1) > 1 or getattr(config, "sp_size", 1) > 1:
            raise UnsupportedError(
                "context parallelism of this Trainer goes with data parallelism alone",
                got=repr(config),
                fix="leave tp_size and sp_size at 1",
            )

    def _check_settings(self, args: Any, settings: dict[str, Any]) -> None:
        if self._cp.gradient != "mean":
            raise InvalidValueError(
                "the Trainer averages gradients over ranks",
                got=f"a model parallelized with gradient={self._cp.gradient!r}",
                fix='parallelize(model, group, gradient="mean")',
            )
        smooths = bool(getattr(args, "label_smoothing_factor", 0))
        if (smooths or settings.get("compute_loss_func") is not None) and self._cp.gather_logits != "always":
            raise UnsupportedError(
                "a loss of the Trainer's own needs the logits of the whole batch",
                got="label_smoothing_factor" if smooths else "compute_loss_func",
                fix='parallelize(model, group, gather_logits="always"), or leave it out',
            )
        if getattr(args, "train_sampling_strategy", "") == "batch_rebalance":
            raise UnsupportedError(
                "batch_rebalance gives each rank batches of its own",
                got='train_sampling_strategy="batch_rebalance"',
                fix='take "random" and layout="balanced", which levels the work inside each batch',
            )
        if getattr(args, "eval_use_gather_object", False):
            raise UnsupportedError(
                "predictions are gathered as tensors", got="eval_use_gather_object=True", fix="leave it out"
            )
        if getattr(args, "deepspeed", None):
            raise UnsupportedError("DeepSpeed keeps its own loop", got="deepspeed=", fix="take DDP or FSDP")

    def _build_accelerator_args(self, **settings: Any) -> dict[str, Any]:
        """What cuts batches in accelerate is left out: it would cut them once more, and drop their masks."""
        found: dict[str, Any] = super()._build_accelerator_args(**settings)
        if getattr(found.get("parallelism_config"), "cp_size", 1) > 1:
            found.pop("parallelism_config")
        return found

    def get_cp_size(self) -> int:
        """Ranks that share each batch."""
        return 1 if self._counts_labels else self._cp.ranks.size

    def _prepare_context_parallel_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model cuts its batch itself."""
        del model
        return nullcontext, inputs

    def _get_dataloader(self, *args: Any, **settings: Any) -> Any:
        """The loader of this rank's group: the same on all its ranks."""
        with self._loading_by_group():
            return super()._get_dataloader(*args, **settings)

    @contextmanager
    def _loading_by_group(self) -> Iterator[None]:
        """While it is open, accelerate prepares loaders for a rank among groups in place of one among all ranks."""
        data_loader = stack_module("accelerate.data_loader")
        accelerator, prepare = self.accelerator, self.accelerator.prepare_data_loader
        config = accelerator.dataloader_config

        def prepared(loader: Any, *_: Any, **__: Any) -> Any:
            if config.dispatch_batches:
                raise UnsupportedError(
                    "dispatch_batches reads on one rank for all", got="dispatch_batches=True", fix="leave it None"
                )
            made = data_loader.prepare_data_loader(
                loader,
                accelerator.device,
                num_processes=len(self._leaders),
                process_index=self._dp_rank,
                split_batches=config.split_batches,
                put_on_device=accelerator.device_placement,
                rng_types=list(accelerator.rng_types or ()),
                dispatch_batches=False,
                even_batches=config.even_batches,
                use_seedable_sampler=config.use_seedable_sampler,
                data_seed=config.data_seed,
                non_blocking=config.non_blocking,
                use_stateful_dataloader=config.use_stateful_dataloader,
            )
            accelerator._dataloaders.append(made)
            return made

        accelerator.prepare_data_loader = prepared
        try:
            yield
        finally:
            accelerator.prepare_data_loader = prepare

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """The labels of the step's batches, those of each group once."""
        self._counts_labels = True  # releases differ in whether they divide by the ranks of a group: here none does
        try:
            found = super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self._counts_labels = False
        summed = self.args.average_tokens_across_devices and self.args.world_size > 1
        return found / self.get_cp_size() if summed and found is not None else found

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **settings: Any
    ) -> Any:
        """The loss of a batch, scaled so that the mean of gradients over all ranks is the step's."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **settings)
        loss = found[0] if return_outputs else found
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func
        if self.args.average_tokens_across_devices and counts and num_items_in_batch is not None:
            loss = loss / self.get_cp_size()  # it was multiplied by all ranks, of which groups share a batch
        return (loss, found[1]) if return_outputs else loss

    def create_accelerator_and_postprocess(self) -> None:
        """Losses, predictions and labels are gathered once from each group, all of whose ranks have them."""
        super().create_accelerator_and_postprocess()
        self.accelerator.gather_for_metrics = partial(self._gather_from_groups, self.accelerator.gather_for_metrics)
        self.gather_function = self.accelerator.gather_for_metrics

    def _gather_from_groups(self, gather_for_metrics: Any, values: Any) -> Any:
        gather, ranks = self.accelerator.gather, self.args.world_size
        if ranks == 1:
            return gather_for_metrics(values)
        self.accelerator.gather = lambda x: _chosen(gather(x), ranks, self._leaders)
        try:
            return gather_for_metrics(values)
        finally:
            del self.accelerator.gather

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_cp_size()

    def floating_point_ops(self, inputs: Any) -> float:
        """A rank's part of those of a batch."""
        found: float = super().floating_point_ops(inputs)
        return found / self.get_cp_size()


def _is_parallelized(model: Any) -> bool:
    try:
        parallel_forward(model)
    except InvalidValueError:
        return False
    return True


def _data_ranks(ranks: CPGroup, world_size: int) -> tuple[int, list[int]]:
    """This rank's group among all groups, and the first rank of each; to be called by every rank."""
    if world_size == 1:
        return 0, [0]
    source = ranks.source
    own = [dist.get_rank()] if source is None else dist.get_process_group_ranks(_flat(source))
    everyone = stack_module("accelerate.utils").gather_object([min(own)])
    leaders = sorted(set(everyone))
    return leaders.index(min(own)), leaders


def _flat(source: Any) -> Any:
    """The process group of a mesh."""
    if hasattr(source, "mesh_dim_names"):
        return source.get_group() if source.ndim == 1 else source._flatten().get_group()
    return source


def _chosen(values: Any, ranks: int, leaders: list[int]) -> Any:
    """Of tensors gathered from all ranks, the rows of some."""
    if isinstance(values, (list, tuple)):
        return type(values)(_chosen(value, ranks, leaders) for value in values)
    if isinstance(values, dict):
        return type(values)({name: _chosen(value, ranks, leaders) for name, value in values.items()})
    if not isinstance(values, torch.Tensor):
        return values
    return values.unflatten(0, (ranks, -1))[leaders].flatten(0, 1)


class Trainer(ContextParallelTrainerMixin, transformers_module().Trainer):  # type: ignore[misc]
    """transformers' Trainer for a parallelized model; see :class:`ContextParallelTrainerMixin`."""
