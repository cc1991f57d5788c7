"""torchtitan's context parallelism: its attention by a handler, and its load balancer by the ``balanced`` layout.

Two classes for torchtitan's own configs, made when they are first asked for::

    from cphandler.integrations.torchtitan import BalancedCPLoadBalancer, HandlerInnerAttention

``HandlerInnerAttention`` stands where ``VarlenInnerAttention`` does (``ContextParallelTransform``'s
``inner_attention_map``) and computes by any algorithm, under any permutation. ``BalancedCPLoadBalancer`` stands where
``HeadTailCPLoadBalancer`` does. torchtitan's names for these have changed from month to month, so that its classes are
compared with the signatures that this module was written for before anything is made of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.groups import Place
from cphandler.errors import InvalidValueError, MissingPackageError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.handler.factory import get_cp_handler_cls
from cphandler.layouts.layout import Layout
from cphandler.tokens.documents import Documents, Offsets
from cphandler.tokens.masks import Causal, Full, Mask, SlidingWindow

BALANCER = "torchtitan.distributed.context_parallel"
ATTENTION = "torchtitan.models.common.attention.attention"
CP_ATTENTION = "torchtitan.models.common.attention.cp_attention"
MESHES = "torchtitan.distributed.spmd_types"
AXES = "torchtitan.distributed.parallelism_context"

SIGNATURES = {
    (BALANCER, "HeadTailCPLoadBalancer", "__init__"): ("self", "config", "seq_len", "attention_metadata"),
    (BALANCER, "ContextParallelLoadBalancer", "generate_permutation"): ("self",),
    (CP_ATTENTION, "CPAttention", "prepare_cp_metadata"): ("attention_metadata", "permutation"),
    (ATTENTION, "VarlenInnerAttention", "__init__"): ("self", "config"),
    (ATTENTION, "VarlenInnerAttention", "forward"): (
        *("self", "q_THK", "k_THK", "v_THV"),
        *("attention_metadata", "scale", "out_transform", "kwargs"),
    ),
}
"""What torchtitan's methods take, by module, class and name."""


def balanced_permutation(cu_seqlens: Offsets, cp_size: int, *, mask: Mask | str = "causal") -> Tensor:
    """The balanced layout as a permutation: cut in ``cp_size`` equal parts, part r is what rank r holds.

    Args:
        cu_seqlens: ``[D + 1]`` offsets of the packed documents.
        cp_size: ranks.
        mask: what is to be level.

    Returns:
        ``[1, T]`` int64 on the CPU, the same for the same arguments.

    Raises:
        InvalidValueError: T does not divide by ``cp_size``: torchtitan has equal shares alone.
    """
    length = Documents.from_cu_seqlens(cu_seqlens).num_tokens
    _check_shares(length, cp_size)
    tokens, parts = torch.arange(length), []
    for rank in range(cp_size):
        handler = get_cp_handler_cls("local", "p2p" if cp_size > 1 else None)(
            cp_group=Place(cp_size, rank) if cp_size > 1 else None,
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            mask=mask,
            layout="balanced" if cp_size > 1 else None,
        )
        parts.append(handler.dispatch(tokens, 0))
    return torch.cat(parts).unsqueeze(0)


def layout_of(permutation: Tensor | None, length: int, cp_size: int) -> Layout:
    """The layout that a permutation, cut in ``cp_size`` equal parts, means; None is the order as it is.

    Args:
        permutation: ``[1, T]`` of all tokens; on a device it is fetched, once for a batch.
        length: T.
        cp_size: ranks.

    Raises:
        InvalidValueError: no permutation of T tokens, or shares that are not equal.
        UnsupportedError: a permutation for each row of a batch.
    """
    _check_shares(length, cp_size)
    if permutation is None:
        order = np.arange(length)
    else:
        if permutation.dim() != 2 or permutation.shape[0] != 1:
            raise UnsupportedError(
                "rows of a batch share one permutation [1, T]", got=f"shape {list(permutation.shape)}", fix="pack them"
            )
        order = permutation[0].cpu().numpy()
    if not np.array_equal(np.sort(order), np.arange(length)):
        raise InvalidValueError(
            "a permutation names each token once", got=f"{len(order)} numbers for {length} tokens", fix="[1, T]"
        )
    spans = []
    for part in np.split(order, cp_size):
        first = np.flatnonzero(np.diff(part, prepend=-2) != 1)
        runs = np.stack([part[first], np.diff(first, append=len(part)), np.ones_like(first), first], axis=1)
        spans.append(runs[np.argsort(runs[:, 0], kind="stable")])
    return Layout("permutation", length, spans)


def _check_shares(length: int, cp_size: int) -> None:
    if length % cp_size:
        raise InvalidValueError(
            "torchtitan's ranks hold equal shares", got=f"{length} tokens for {cp_size} ranks", fix="pad the batch"
        )


@dataclass
class HandlerMetadata:
    """What :class:`HandlerInnerAttention` is given of a batch in place of ``VarlenAttentionMetadata``.

    Attributes:
        cu_seqlens: global offsets of the documents.
        layout: what the ranks hold.
        group: they.
        handlers: the batch's handlers, by backend.
    """

    cu_seqlens: Tensor
    layout: Layout
    group: Any
    handlers: dict[str, ContextParallelHandler] = field(default_factory=dict)

    def handler(self, backend: str) -> ContextParallelHandler:
        """The batch's handler; all layers of a backend share one."""
        if backend not in self.handlers:
            self.handlers[backend] = get_cp_handler_cls(backend)(
                cp_group=self.group, qkv_format="thd", cu_seqlens_q=self.cu_seqlens, layout=self.layout
            )
        return self.handlers[backend]


def attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    metadata: HandlerMetadata,
    backend: str,
    window: tuple[int, int],
    *,
    scale: float | None = None,
    out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of local rows ``[T, H, K]``, as torchtitan's inner attentions give it.

    Args:
        tensors: queries, keys and values.
        metadata: the batch's.
        backend: a name that :func:`cphandler.get_cp_handler_cls` takes alone: ``"ring"``, ``"p2p"``, ``"ulysses"``, ...
        window: torchtitan's ``(left, right)``, -1 for no bound.
        scale: factor on the scores.
        out_transform: given the output and the log-sum-exp ``[T, H]``; its result is returned.
    """
    options: dict[str, Any] = {"mask": mask_of(window)}
    if scale is not None:
        options["softmax_scale"] = scale
    handler = metadata.handler(backend)
    if out_transform is None:
        alone: Tensor = handler.core_attn(None, *tensors, **options)
        return alone
    result = handler.core_attn(None, *tensors, return_lse=True, **options)
    return out_transform(result.out, result.lse)


def mask_of(window: tuple[int, int]) -> Mask:
    """Torchtitan's window as a mask."""
    left, right = window
    if left < 0 and right <= 0:
        return Causal() if right == 0 else Full()
    unbounded = 1 << 40
    return SlidingWindow(unbounded if left < 0 else left, unbounded if right < 0 else right)


def check_signatures() -> None:
    """Compare torchtitan's classes with those that this module was written for.

    Raises:
        MissingPackageError: torchtitan, or one of its modules, is missing.
        UnsupportedError: a class is missing, or a method takes something else, named.
    """
    for (module, cls, method), expected in SIGNATURES.items():
        found = getattr(getattr(_imported(module), cls, None), method, None)
        taken = None if found is None else tuple(inspect.signature(found).parameters)
        if taken != expected:
            raise UnsupportedError(
                f"{module}.{cls}.{method} is not the one that this integration was written for",
                got="nothing of that name" if taken is None else f"({', '.join(taken)})",
                fix=f"it takes ({', '.join(expected)}); use layout_of and attend in a class of your own",
            )


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a package that is half installed may raise anything
        raise MissingPackageError(
            f"this integration needs {module}, which cannot be imported",
            got=f"{type(error).__name__}: {error}",
            fix="install torchtitan from its sources, at a commit that tests/data/torchtitan.json names",
        ) from error


def _group() -> Any:
    """Torchtitan's context-parallel group.

    Raises:
        InvalidValueError: no mesh with such an axis is active.
    """
    group = _imported(MESHES).spmd_mesh_group(_imported(AXES).MeshAxisName.CP)
    if group is None:
        raise InvalidValueError("no context-parallel mesh axis is active", fix="set context_parallel_degree above 1")
    return group


def _offsets(metadata: Any, what: str) -> Tensor:
    """Offsets of a batch from ``VarlenAttentionMetadata``.

    Raises:
        UnsupportedError: other metadata, or keys that are not the queries'.
    """
    offsets, keys = (getattr(metadata, name, None) for name in ("cu_seq_q", "cu_seq_k"))
    if keys is offsets and isinstance(offsets, Tensor):
        return offsets
    raise UnsupportedError(
        f"{what} takes VarlenAttentionMetadata of self attention",
        got=type(metadata).__name__,
        fix="let the inner attention be HandlerInnerAttention or VarlenInnerAttention",
    )


class _HandlerAttention:
    """What is this library's own of ``HandlerInnerAttention``."""

    backend: str
    window_size: tuple[int, int]

    @staticmethod
    def prepare_cp_metadata(attention_metadata: Any, *, permutation: Tensor | None) -> HandlerMetadata:
        """The batch's documents, layout and ranks, from ``VarlenAttentionMetadata`` and a permutation ``[1, T]``."""
        offsets, group = _offsets(attention_metadata, "HandlerInnerAttention"), _group()
        layout = layout_of(permutation, Documents.from_cu_seqlens(offsets).num_tokens, group.size())
        return HandlerMetadata(offsets, layout, group)

    def forward(
        self,
        q_THK: Tensor,  # noqa: N803 (torchtitan's names)
        k_THK: Tensor,  # noqa: N803
        v_THV: Tensor,  # noqa: N803
        *,
        attention_metadata: Any,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[Tensor, Tensor], Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        """Attention of local rows, as ``VarlenInnerAttention.forward``, in the dtype of the queries."""
        if others or not isinstance(attention_metadata, HandlerMetadata):
            raise UnsupportedError(
                "HandlerInnerAttention takes what its prepare_cp_metadata made, and no further options",
                got=", ".join(others) or type(attention_metadata).__name__,
                fix="leave them out; with one rank use VarlenInnerAttention",
            )
        if q_THK.shape[1] != k_THK.shape[1] and not enable_gqa:
            raise InvalidValueError("queries have more heads than keys", got="enable_gqa=False", fix="pass True")
        tensors, window = (q_THK, k_THK, v_THV), self.window_size
        return attend(tensors, attention_metadata, self.backend, window, scale=scale, out_transform=out_transform)


@cache
def _attention_cls() -> type:
    check_signatures()
    varlen, capability = _imported(ATTENTION).VarlenInnerAttention, _imported(CP_ATTENTION).CPAttention

    @dataclass(kw_only=True, slots=True)
    class Config(capability.Config, varlen.Config):  # type: ignore[misc, name-defined]
        backend: str = "ring"

    def initialize(self: Any, config: Any) -> None:
        varlen.__init__(self, config)
        self.backend = config.backend

    body = {"Config": Config, "__init__": initialize}
    return type("HandlerInnerAttention", (_HandlerAttention, capability, varlen), body)


@cache
def _balancer_cls() -> type:
    check_signatures()
    base = _imported(BALANCER).ContextParallelLoadBalancer

    @dataclass(kw_only=True, slots=True)
    class Config(base.Config):  # type: ignore[misc, name-defined]
        """Settings of the balanced layout: none."""

    def initialize(self: Any, config: Any, *, seq_len: int, attention_metadata: Any) -> None:
        del config
        self.offsets, self.cp_size = _offsets(attention_metadata, "BalancedCPLoadBalancer"), _group().size()
        documents = Documents.from_cu_seqlens(self.offsets).num_tokens
        if documents != seq_len:
            raise InvalidValueError(
                "the documents must be all tokens", got=f"{documents} of {seq_len}", fix="give padding a document"
            )

    def generate_permutation(self: Any) -> Tensor:
        return balanced_permutation(self.offsets, self.cp_size).to(self.offsets.device)

    body = {"Config": Config, "__init__": initialize, "generate_permutation": generate_permutation}
    return type("BalancedCPLoadBalancer", (base,), body)


_MADE = {"HandlerInnerAttention": _attention_cls, "BalancedCPLoadBalancer": _balancer_cls}


def __getattr__(name: str) -> Any:
    if name in _MADE:
        return _MADE[name]()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
