"""A random case: one handler, and what is asked of it call by call. A pure function of a seed and a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from cphandler.testing.cases import Case
from cphandler.testing.fuzz.layouts import shown_layout

Parts: TypeAlias = "tuple[tuple[int, ...], ...]"
"""Groups of ranks."""


@dataclass(frozen=True)
class Call:
    """One call of ``core_attn``, forward and backward.

    Attributes:
        case: the mask, the sizes and the options.
        is_own_mask: whether the mask is passed with the call; otherwise it is the handler's.
        needs: which of ``q``, ``k`` and ``v`` need a gradient.
        roots: what has a gradient: ``"out"``, ``"lse"`` or ``"both"``.
        checkpoint: ``"reentrant"``, ``"saved"`` (the other kind) or empty for none.
        as_module: whether options come in a :class:`CoreAttention`.
        garbage: what padding and pad rows hold: ``"nan"``, ``"inf"``, ``"-inf"`` or ``"mixed"``.
        strides: how inputs and gradients lie in memory.
        again: whether a second call must have the same bits.
        is_inference: whether the call is made in inference mode.
    """

    case: Case
    is_own_mask: bool = False
    needs: str = "qkv"
    roots: str = "out"
    checkpoint: str = ""
    as_module: bool = False
    garbage: str = "nan"
    strides: str = "plain"
    again: bool = False
    is_inference: bool = False

    def __str__(self) -> str:
        case = self.case
        asked: dict[str, Any] = {
            "mask": case.mask if self.is_own_mask else None,
            "D_v": case.value_dim,
            "scale": case.scale,
            "softcap": case.softcap,
            "sinks": case.sinks,
            "dropout": case.dropout_p,
            "lse": case.lse,
            "max_logit": case.max_logit,
            "layer": case.layer_number,
            "own": case.own,
            "checkpoint": self.checkpoint,
            "module": self.as_module,
            "again": self.again,
            "inference": self.is_inference,
        }
        options = "".join(f" {name}={value}" for name, value in asked.items() if value)
        kind = f"{case.heads[0]}/{case.heads[1]} heads of {case.head_dim} {_short(case.dtype)}"
        return f"attend {kind}{options} d({self.roots})/d({self.needs}) pads {self.garbage} strides {self.strides}"


@dataclass(frozen=True)
class Move:
    """One call of ``dispatch``, ``combine`` or ``roll_tensor``.

    Attributes:
        kind: ``"dispatch"``, ``"combine"`` or ``"roll"``.
        stream: ``"q"`` or ``"kv"``.
        dtype: of the tensor.
        shape: its other dims.
        dim: where the sequence is among them.
        is_negative: whether the dim is counted from the end.
        strides: how the tensor lies in memory.
        fill: ``pad_value`` or ``fill_value``.
        shift: ``shifts`` of a roll.
        grad: what gradients mean, ``"full"`` or ``"partial"`` before a cut, ``"replicated"``, ``"sum"`` or ``"scaled"``
            of a combined tensor; empty for no gradient at all.
        is_twice: whether the gradient is differentiated again.
    """

    kind: str
    stream: str = "q"
    dtype: torch.dtype = torch.float64
    shape: tuple[int, ...] = ()
    dim: int = 0
    is_negative: bool = False
    strides: str = "plain"
    fill: float = 0
    shift: int = -1
    grad: str = ""
    is_twice: bool = False

    def __str__(self) -> str:
        dims = ", ".join(map(str, [*self.shape[: self.dim], "S", *self.shape[self.dim :]]))
        told = {"roll": f" by {self.shift} fill {self.fill}", "dispatch": f" pad {self.fill}"}.get(self.kind, "")
        how = f"{' negative dim' if self.is_negative else ''} strides {self.strides}"
        grad = f"{' d' if self.grad else ''}{' twice' if self.is_twice else ''} {self.grad}".rstrip()
        return f"{self.kind}({self.stream}) {_short(self.dtype)} [{dims}]{told}{how}{grad}"


@dataclass(frozen=True)
class Turn:
    """Rope tables cut and a tensor turned by them, and turned back.

    Attributes:
        stream: ``"q"`` or ``"kv"``.
        dtype: of the tensor.
        strides: how it lies in memory.
        rotary: channels that turn, of 12.
        is_interleaved: which channels are pairs.
        scale: ``mscale``.
        mode: ``freqs_mode``.
        form: ``"angles"``, ``"wide"`` (with two dims of size 1) or ``"pair"`` (cos and sin).
    """

    stream: str = "q"
    dtype: torch.dtype = torch.float64
    strides: str = "plain"
    rotary: int = 12
    is_interleaved: bool = False
    scale: float = 1.0
    mode: str = "per_document"
    form: str = "angles"

    def __str__(self) -> str:
        pairs = "interleaved" if self.is_interleaved else "halves"
        how = f"{self.rotary} of 12 {pairs} x{self.scale} {self.mode} {self.form}"
        return f"rope({self.stream}) {_short(self.dtype)} {how} strides {self.strides}"


@dataclass(frozen=True)
class Look:
    """A look at the facts of a stream.

    Attributes:
        stream: ``"q"`` or ``"kv"``.
    """

    stream: str = "q"

    def __str__(self) -> str:
        return f"facts({self.stream})"


Step: TypeAlias = "Call | Move | Turn | Look"
"""What may be asked of a handler."""


@dataclass(frozen=True)
class RandomCase:
    """A handler and what is asked of it.

    Attributes:
        seed: of the run.
        number: in the run.
        parts: groups of ranks, all of one size; each has data of its own.
        base: the handler: backend, batch, layout, mask and settings.
        steps: calls in order.
        backward: when backward runs: ``"at once"`` after each call, in the ``"same"`` order after all, in
            ``"reverse"``, or all ``"together"``.
        group: ``"group"``, ``"mesh"``, ``"mesh of two dims"``, or ``"none"`` for one rank without a group.
        second: ``"copy"``, a deep copy of the handler that does every other step; ``"twin"``, another handler over the
            same batch; or empty.
        positions: shape of ``position_ids``, such as ``"BS"``; empty where they follow from the batch.
        given_as: what offsets, positions and padding masks are given as: ``"tensor"``, ``"wide tensor"`` (int64),
            ``"array"`` or ``"list"``.
    """

    seed: int
    number: int
    parts: Parts
    base: Case
    steps: tuple[Step, ...]
    backward: str = "reverse"
    group: str = "group"
    second: str = ""
    positions: str = ""
    given_as: str = "tensor"

    @property
    def name(self) -> str:
        """What repeats it."""
        return f"{self.seed}:{self.number}"

    def __str__(self) -> str:
        base = self.base
        backend = base.backend if isinstance(base.backend, str) else "+".join(f"[{x}]" for x in base.backend)
        groups = " ".join("".join(map(str, part)) for part in self.parts)
        groups = {"group": groups, "none": "no group"}.get(self.group, f"{groups} ({self.group})")
        rows = f" x{base.batch.rows}" if base.qkv_format != "thd" and base.batch.real is None else ""
        batch = f"{base.qkv_format} {base.batch}{rows}"
        if base.batch.keys_padded:
            batch += f" in {list(base.batch.keys_padded)}"
        told = {"kernel": base.kernel, **dict(base.config), "second": self.second or None}
        told |= {"positions": f"[{self.positions}]" if self.positions else None}
        told |= {"given": None if self.given_as == "tensor" else self.given_as}
        settings = " ".join(f"{name}={value}" for name, value in told.items() if value not in ("auto", None))
        head = (
            f"{self.name} {backend} on {groups}, {batch}, {shown_layout(base.layout)}, {base.mask} {settings}".strip()
        )
        steps = "; ".join(f"({i + 1}) {step}" for i, step in enumerate(self.steps))
        order = f", backward {self.backward}" if sum(isinstance(step, Call) for step in self.steps) > 1 else ""
        return f"{head}{order}: {steps}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
