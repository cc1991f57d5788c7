"""Why attention will be computed as it will: the algorithm, and the kernel of each that could compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cphandler.config import CPConfig
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.kernels import Asked, Candidate, candidates, choose
from cphandler.kernels.packages import has_device
from cphandler.precision import ATTENTION_DTYPES
from cphandler.registry import normal
from cphandler.tokens.counts import checked_count, checked_flag


class Algorithm(NamedTuple):
    """How a handler computes attention, in names.

    Attributes:
        backend: the handler's class; with one algorithm per layer all of them.
        comm_type: as in :func:`cphandler.get_cp_handler_cls`.
        ranks: of its group.
        layout: of its queries, and where keys have another one, of both.
        exchange: what brings keys to queries.
        engine: what computes attention in place of the library's kernels; empty for these.
    """

    backend: str
    comm_type: str
    ranks: int
    layout: str
    exchange: str
    engine: str


class Sample(NamedTuple):
    """The tensors and options of a call that has not been made.

    Attributes:
        dtype: of queries, keys and values.
        device: where they are.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: of queries and keys.
        value_head_dim: of values.
        softcap: whether scores are capped.
        dropout: whether weights are dropped.
    """

    dtype: torch.dtype
    device: torch.device
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    softcap: bool
    dropout: bool

    @classmethod
    def checked(cls, *, dtype: Any, device: Any, softcap: Any, dropout: Any, **counts: Any) -> Sample:
        """A sample of what a caller names; see :meth:`ContextParallelHandler.explain`.

        Raises:
            InvalidTypeError: a dtype that attention does not compute in, counts that are none, flags that are none.
            InvalidValueError: a device that torch does not know, or counts that do not go together.
        """
        if dtype not in ATTENTION_DTYPES:
            served = ", ".join(str(one) for one in ATTENTION_DTYPES)
            raise InvalidTypeError("attention does not compute in this dtype", got=repr(dtype), fix=f"pass {served}")
        numbers = {name: checked_count(name, count, least=1) for name, count in counts.items()}
        if numbers["heads"] % numbers["kv_heads"]:
            raise InvalidValueError(
                "the query heads must be a multiple of the key heads",
                got=f"{numbers['heads']} and {numbers['kv_heads']}",
                fix="query head n uses key head n // (N // G)",
            )
        flags = checked_flag("softcap", softcap), checked_flag("dropout", dropout)
        heads, kv_heads, *dims = (numbers[name] for name in ("heads", "kv_heads", "head_dim", "value_head_dim"))
        return cls(dtype, _checked_device(device), heads, kv_heads, dims[0], dims[1], *flags)

    def asked(self, config: CPConfig) -> Asked:
        """What the call asks of a kernel: tensors without rows, which stand on no device where there is none.

        Args:
            config: says whether two runs must give the same bits.
        """
        where = self.device if has_device(self.device.type) else torch.device("meta")
        sizes = (self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, self.value_head_dim)
        q, k, v = (torch.empty(1, 0, *size, dtype=self.dtype, device=where) for size in sizes)
        return Asked(q, k, v, config.deterministic, self.softcap, self.dropout)

    def __str__(self) -> str:
        """``bfloat16 on cuda, 8 heads of 128, softcap``."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads} over {self.kv_heads}"
        dims = (
            f"{self.head_dim}" if self.head_dim == self.value_head_dim else f"{self.head_dim} and {self.value_head_dim}"
        )
        options = [name for name in ("softcap", "dropout") if getattr(self, name)]
        return ", ".join([f"{str(self.dtype)[6:]} on {self.device}", f"{heads} heads of {dims}", *options])


def _checked_device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        kind = InvalidValueError if isinstance(device, str) else InvalidTypeError
        raise kind("torch knows no such device", got=repr(device), fix='pass "cuda" or "cpu", say') from error
    count = torch.cuda.device_count() if found.type == "cuda" and has_device("cuda") else None
    if count is not None and (found.index or 0) >= count:
        raise InvalidValueError("torch sees no such device", got=repr(device), fix=f"there are {count}, from 0")
    return found


@dataclass(frozen=True)
class Explanation:
    """How a handler will compute attention, and why; prints as plain text.

    Attributes:
        algorithm: backend, comm type, layout, exchange.
        sample: the call that was asked about.
        asked_for: ``CPConfig.kernel``.
        deterministic: ``CPConfig.deterministic``.
        kernel: the kernel that a call will take; None where an engine chooses, or where none takes it.
        why: why this one, or why none.
        candidates: the kernels for the device, in order of preference, each with what it has against the call.
    """

    algorithm: Algorithm
    sample: Sample
    asked_for: str
    deterministic: bool
    kernel: str | None
    why: str
    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, algorithm: Algorithm, sample: Sample, config: CPConfig) -> Explanation:
        """Ask every kernel for the sample's device.

        Args:
            algorithm: the handler's.
            sample: the call.
            config: the handler's.

        Raises:
            InvalidValueError: no kernel for this device has the name asked for.
        """
        if algorithm.engine:
            why = f"{algorithm.engine} computes attention, and chooses among kernels of its own"
            return cls(algorithm, sample, config.kernel, config.deterministic, None, why, ())
        asked, device_type = sample.asked(config), sample.device.type
        one = choose(config.kernel, device_type, asked)
        takes = one.refusal is None
        if one.error is not None:
            why = f"a call raises {one.refusal}"
        elif not takes:
            why = f"{one.refusal}; {one.fix}" if one.fix else f"{one.name} refuses: {one.refusal}"
        elif normal(config.kernel) == "auto":
            why = f"of the kernels that take the call it has the highest preference, {one.preference}"
        else:
            why = "CPConfig.kernel names it, and it takes the call"
        listed = tuple(other._replace(error=None) for other in candidates(device_type, asked))
        return cls(algorithm, sample, config.kernel, config.deterministic, one.name if takes else None, why, listed)

    def reason(self, name: str) -> str:
        """Why a kernel will not compute the call.

        Args:
            name: of one of the candidates.

        Raises:
            InvalidValueError: it is none, or the one that is taken.
        """
        others = {one.name: one for one in self.candidates if one.name != self.kernel}
        if name not in others:
            raise InvalidValueError(
                "no kernel of this name is passed over", got=repr(name), fix=f"choose of {', '.join(others) or 'none'}"
            )
        one = others[name]
        if one.refusal is not None:
            return one.refusal if one.fix else f"refuses: {one.refusal}"
        lower = f"its preference is lower, {one.preference}"
        return (
            f"takes the call too; {lower if normal(self.asked_for) == 'auto' else 'CPConfig.kernel names another one'}"
        )

    def __str__(self) -> str:
        """One line on the algorithm, one on the call, one on the kernel, and one for each of the others."""
        name, comm_type, ranks, layout, exchange, _ = self.algorithm
        ask = f"kernel={self.asked_for!r}" + (", deterministic=True" if self.deterministic else "")
        lines = [
            f"{name}, comm type {comm_type}, {ranks} rank{'s' * (ranks != 1)}: layout {layout}, exchange {exchange}",
            f"a call in {self.sample}, under CPConfig({ask})",
            f"takes {self.kernel}: {self.why}" if self.kernel else f"takes no kernel of the library: {self.why}",
        ]
        width = max((len(one.name) for one in self.candidates), default=0)
        for one in self.candidates:
            if one.name != self.kernel:
                lines.append(f"  not {one.name:{width}}  {self.reason(one.name)}")
                lines += [f"      {'':{width}}  to have it: {one.fix}"] if one.fix else []
        return "\n".join(lines)
