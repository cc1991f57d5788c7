"""A model whose forward pass takes the global batch on every rank and computes a part of it on each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, TypeVar

import torch
from torch import Tensor

from cphandler.config import CPConfig
from cphandler.errors import InvalidValueError, UnsupportedError
from cphandler.handler.contract import AskedLayout
from cphandler.integrations.huggingface.attention_function import BATCH, LAYER, NAME, register
from cphandler.integrations.huggingface.batch import CUT, PACKING, BatchOnRank, GlobalBatch
from cphandler.integrations.huggingface.inspection import attention_layers, base_of, counting_layer
from cphandler.integrations.huggingface.loss import (
    check_loss_function,
    next_token_loss,
    router_loss,
    with_gradient_times,
)
from cphandler.integrations.huggingface.rotary import RotaryForward, rotary_forwards
from cphandler.integrations.huggingface.settings import GatherLogits, Gradient, Settings, checked_settings
from cphandler.tracing import untraced

ModelT = TypeVar("ModelT")

_OF_TOKENS = ("logits", "last_hidden_state")

_PLACE = "_cp_forward"
"""Attribute of a parallelized model that holds its forward pass, whoever wraps it later."""

_OWN = ("labels", "shift_labels", "num_items_in_batch", "return_dict", "logits_to_keep", "use_cache", *PACKING)
"""Arguments that no layer sees: the forward pass around the model keeps them."""


def parallelize(
    model: ModelT,
    cp_group: Any,
    *,
    backend: str = "ring",
    cp_comm_type: str | Sequence[str] | None = None,
    layout: AskedLayout = None,
    config: CPConfig | None = None,
    gather_logits: GatherLogits = "eval",
    gradient: Gradient = "mean",
) -> ModelT:
    """Let the ranks of a group share each batch of a decoder of transformers; the model is changed in place.

    From then on every rank calls the model with the same global batch, and the model cuts it, attends across ranks, and
    gives the loss of the whole batch on each. Parameters, ``state_dict`` and ``save_pretrained`` stay as they are.

    A batch has ``input_ids`` or ``inputs_embeds`` ``[B, S]``. Documents packed in its rows are told by ``position_ids``
    that restart, by ``cu_seq_lens_q`` or ``seq_idx``, and never see each other; padding by a two-dim
    ``attention_mask``, left, right or with holes. ``labels`` are not shifted, as ever in transformers.

    Args:
        model: a ``PreTrainedModel`` with attention of the usual kind in all layers, or a peft model around one; before
            it is wrapped by DDP. A model without a head returns hidden states where others return logits.
        cp_group: the ranks that share batches: a process group, a device mesh (its "cp" dim where it has several), an
            accelerate ``ParallelismConfig``, or None for one rank.
        backend: as in :func:`cphandler.get_cp_handler_cls`.
        cp_comm_type: the same; a list has one for each layer.
        layout: which rank holds which tokens; None for the backend's default.
        config: settings of the handlers.
        gather_logits: ``"eval"``, logits (and hidden states) come back whole where the model is not training, and are
            a rank's own rows in training; ``"always"``, or ``"never"``.
        gradient: what is done with parameter gradients over the ranks of the group: ``"mean"``, as DDP, FSDP and the
            Trainer do, or ``"sum"``.

    Returns:
        The same model.

    Raises:
        MissingPackageError: transformers cannot be imported.
        InvalidTypeError: no model of transformers, or no group.
        InvalidValueError: names that mean nothing, a model that is parallelized already.
        UnsupportedError: a layer that context parallelism would change without a word, by its name.
    """
    base = base_of(model)
    if _PLACE in vars(base):
        raise InvalidValueError("the model is parallelized already", fix="unparallelize(model) first")
    layers = attention_layers(base)
    comm_type = list(cp_comm_type) if isinstance(cp_comm_type, (list, tuple)) else cp_comm_type
    settings = checked_settings(cp_group, (backend, comm_type), layout, config, gather_logits, gradient)  # type: ignore[arg-type]
    register()
    for name, layer in layers.items():
        setattr(layer, LAYER, name)
    base.forward = ParallelForward(base, settings, tuple(layers))
    setattr(base, _PLACE, base.forward)
    if hasattr(base, "generate"):
        base.generate = WholeCall(base, base.generate)
    return model


def unparallelize(model: ModelT) -> ModelT:
    """Undo :func:`parallelize`, in place.

    Raises:
        InvalidValueError: a model that is not parallelized, or whose forward was wrapped again.
    """
    forward = parallel_forward(model)
    base = forward.model
    if vars(base).get("forward") is not forward:
        raise InvalidValueError(
            "another package has wrapped the parallelized forward",
            got=repr(vars(base).get("forward")),
            fix="undo that first: accelerator.unwrap_model(model, keep_fp32_wrapper=False), say",
        )
    forward.restore()
    for name in ("forward", "generate", _PLACE):
        vars(base).pop(name, None)
    for module in base.modules():
        module.__dict__.pop(LAYER, None)
        if isinstance(module.__dict__.get("forward"), RotaryForward):
            del module.forward
    return model


def parallel_forward(model: Any) -> ParallelForward:
    """The forward pass of a parallelized model, adapters or wrappers around it left aside.

    Raises:
        InvalidValueError: a model that is not parallelized.
    """
    for module in model.modules():
        if _PLACE in vars(module):
            forward: ParallelForward = vars(module)[_PLACE]
            return forward
    raise InvalidValueError(
        "the model is not parallelized", got=type(model).__name__, fix="parallelize(model, cp_group)"
    )


class ParallelForward:
    """The forward pass of one model: cuts its batch, calls what was there before, and puts its outputs together.

    It stands in the model's ``__dict__`` in front of the class's own, so that whoever calls ``model.forward`` in place
    of the model, as adapters do, comes here too.

    Args:
        model: of transformers.
        settings: how batches are shared.
        layers: names of its attention layers.
    """

    def __init__(self, model: Any, settings: Settings, layers: tuple[str, ...]) -> None:
        self.model, self.settings, self.layers = model, settings, layers
        self.inner: Callable[..., Any] = model.forward
        self.signature = inspect.signature(model.forward)
        self.active = True
        self.counts = counting_layer(model)
        self.rotaries = rotary_forwards(model)
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        self.before = [(config, config._attn_implementation) for config in configs.values()]
        self._switch(on=True)
        update_wrapper(self, self.inner)

    def _switch(self, *, on: bool) -> None:
        for config, implementation in self.before:
            config._attn_implementation = NAME if on else implementation

    def restore(self) -> None:
        """Give the model the attention that it had."""
        self._switch(on=False)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it is open, the model computes all of what it is given, on every rank."""
        self._switch(on=False)
        self.active = False
        try:
            yield
        finally:
            self.active = True
            self._switch(on=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See :func:`parallelize`."""
        if not self.active:
            return self.inner(*args, **kwargs)
        batch, given, local = self.cut(args, kwargs)
        try:
            output = self.inner(**local)
        finally:
            for rotary in self.rotaries:
                rotary.largest = None
        return self.settle(output, batch, given)

    @untraced
    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BatchOnRank, GlobalBatch, dict[str, Any]]:
        """A call's arguments: the batch, the same globally, and what this rank calls the model with."""
        given = GlobalBatch.checked(self._named(args, kwargs))
        self._check(given)
        batch = given.on_rank(self.settings)
        if self.settings.compares:
            batch.handler.agree(f"forward of {given.digest()}")
        local = {name: value for name, value in given.arguments.items() if name not in (*CUT, *_OWN)}
        for name in ("input_ids", "inputs_embeds", "token_type_ids"):
            if name in given.arguments:
                local[name] = batch.cut(given.arguments[name])
        local["position_ids"] = self._positions(given, batch)
        if given.real is not None:
            local["attention_mask"] = batch.real.to(given.arguments["attention_mask"].dtype)
        if "use_cache" in self.signature.parameters:
            local["use_cache"] = False
        return batch, given, {**local, BATCH: batch, "return_dict": True}

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.signature.bind_partial(*args, **kwargs).arguments
        rest = next((p.name for p in self.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        bound |= bound.pop(rest, {})
        return {name: value for name, value in bound.items() if value is not None}

    def _check(self, given: GlobalBatch) -> None:
        """What only the model can tell."""
        if given.arguments.get("output_attentions", getattr(self.model.config, "output_attentions", False)):
            raise UnsupportedError(
                "attention weights are never all in one place", got="output_attentions=True", fix="leave it out"
            )
        keep = given.arguments.get("logits_to_keep", 0)
        if isinstance(keep, Tensor) or (keep and not self._gathers()):
            raise UnsupportedError(
                "logits_to_keep counts tokens of the whole batch, and logits are a rank's own",
                got=f"logits_to_keep={keep}",
                fix='leave it out, or pass gather_logits="always" and a number',
            )
        if "labels" in given.arguments or "shift_labels" in given.arguments:
            check_loss_function(self.model)
            if self.model.get_output_embeddings() is None:
                raise UnsupportedError(
                    f"{type(self.model).__name__} has no logits to compare with labels",
                    got="labels=",
                    fix="leave them out, or parallelize the model with its language-model head",
                )

    def _positions(self, given: GlobalBatch, batch: BatchOnRank) -> Tensor:
        positions = given.positions
        if positions is None:
            if self.counts:
                raise InvalidValueError(
                    f"{self.counts} makes positions from all tokens of a row, and a rank has a part of them",
                    got="no position_ids",
                    fix="pass the position_ids that it would make",
                )
            numbers = torch.arange(given.shape[1], device=given.device).unsqueeze(0)
            positions = numbers.expand(given.shape) if batch.packed else numbers
        for rotary in self.rotaries:
            rotary.largest = positions.max()
        return batch.cut(positions, positions.dim() - 2)

    def _gathers(self) -> bool:
        wish = self.settings.gather_logits
        return wish == "always" or (wish == "eval" and not self.model.training)

    @untraced
    def settle(self, output: Any, batch: BatchOnRank, given: GlobalBatch) -> Any:
        """The model's output, of the whole batch where it should be."""
        self._check_called(batch)
        values = {name: value for name, value in output.items() if value is not None}
        values |= self._losses(values, batch, given)
        if self._gathers():
            values |= self._gathered(values, batch, given.arguments.get("logits_to_keep", 0))
        made = type(output)(**values)
        named = given.arguments.get("return_dict", getattr(self.model.config, "return_dict", True))
        return made if named else made.to_tuple()

    def _check_called(self, batch: BatchOnRank) -> None:
        missing = [name for name in self.layers if name not in batch.called]
        if missing:
            raise UnsupportedError(
                f"{', '.join(missing[:4])} computed no attention across ranks",
                got=f"{len(batch.called)} of {len(self.layers)} attention layers called",
                fix="another package has replaced the layer's forward, or set another attention implementation: "
                "parallelize after it, or without it",
            )

    def _losses(self, values: dict[str, Any], batch: BatchOnRank, given: GlobalBatch) -> dict[str, Tensor]:
        labels, factor = given.labels(), self.settings.factor(batch.handler)
        losses = {}
        if labels is not None:
            losses["loss"] = next_token_loss(values["logits"], labels, batch, given.arguments.get("num_items_in_batch"))
        if "aux_loss" in values:
            losses["aux_loss"] = router_loss(self.model, values["router_logits"], batch)
            if labels is not None:
                losses["loss"] = losses["loss"] + self.model.router_aux_loss_coef * losses["aux_loss"]
        return {name: with_gradient_times(loss, factor) for name, loss in losses.items()}

    def _gathered(self, values: dict[str, Any], batch: BatchOnRank, keep: int) -> dict[str, Any]:
        factor, rows = self.settings.factor(batch.handler), batch.real.shape[0]

        def whole(x: Tensor) -> Tensor:
            return with_gradient_times(batch.whole(x), factor)

        found: dict[str, Any] = {name: whole(values[name]) for name in _OF_TOKENS if name in values}
        if keep:
            found["logits"] = found["logits"][:, -keep:]
        if "hidden_states" in values:
            found["hidden_states"] = tuple(whole(x) for x in values["hidden_states"])
        if "router_logits" in values:
            by_row = (x.unflatten(0, (rows, -1)) for x in values["router_logits"])
            found["router_logits"] = tuple(whole(x).flatten(0, 1) for x in by_row)
        return found


class WholeCall:
    """A method of a parallelized model that computes with the whole model on every rank, such as ``generate``.

    Args:
        model: of transformers.
        method: as it was.
    """

    def __init__(self, model: Any, method: Callable[..., Any]) -> None:
        self.model, self.method = model, method
        update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns."""
        with parallel_forward(self.model).whole():
            return self.method(*args, **kwargs)
