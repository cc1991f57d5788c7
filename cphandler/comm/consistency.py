"""The check that all ranks of a group hold one batch and make one call: a tiny collective instead of a hang."""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.collectives import agree
from cphandler.comm.groups import CPGroup
from cphandler.comm.journal import Journal, journal_of
from cphandler.comm.membership import members
from cphandler.config import CPConfig
from cphandler.errors import RankMismatchError
from cphandler.tokens.intervals import Table

PAYLOAD_BYTES = 1024
"""What each rank contributes: a digest of all facts, then as many of them in words as fit."""

_DIGEST_BYTES = 16
_settled_groups: WeakSet[object] = WeakSet()


def digest(content: bytes) -> str:
    """A few characters that differ where contents differ."""
    return f"#{hashlib.blake2b(content, digest_size=4).hexdigest()}"


def shown(values: Table, most: int = 6) -> str:
    """The first few integers of an array and a digest of all, so that any difference shows."""
    head = ", ".join(str(int(value)) for value in values.reshape(-1)[:most])
    more = ", ..." if values.size > most else ""
    return f"[{head}{more}] {digest(np.ascontiguousarray(values).tobytes())}"


class Consistency:
    """Compares what the ranks of a group hold and do: once for a handler, or before each of its calls.

    Between two comparisons each rank keeps a journal of its calls and of their backward passes; the next comparison, of
    whatever handler, includes it at no further cost.

    Args:
        group: the group.
        config: says when to compare (``check_consistency``); how long to wait is in the group's name.
    """

    def __init__(self, group: CPGroup, config: CPConfig) -> None:
        self._group = group
        mode = config.check_consistency
        connected = group.size > 1 and bool(group.name)
        self.active = connected and mode != "never" and not (mode == "first" and group.source in _settled_groups)
        self._keeps_journal = self.active and mode != "first"
        self._each_call = mode == "each_call"
        self.pending = self.active

    @property
    def _journal(self) -> Journal:
        return journal_of(members(self._group.name).group)

    def note(self, call: str) -> None:
        """Remember a call that is not compared before it is made.

        Args:
            call: what this rank is about to do, in words that must be the same on all ranks.
        """
        if self._keeps_journal:
            self._journal.note(call)

    def watched(self, x: Tensor) -> Tensor:
        """``x`` itself; its backward pass is a call of its own, which the journal holds and ``each_call`` compares.

        Args:
            x: what the operator of the call that was noted last gave back. Operators run backward on every rank where
                they do on one; a rank's own gradient of ``x`` may be undefined, so that a hook on ``x`` might not.
        """
        if torch.compiler.is_compiling() or not self._keeps_journal or x.grad_fn is None:
            return x
        call = f"backward of call {self._journal.calls}, {self._journal.last}"

        def noted(_: object) -> None:
            if self._each_call:
                self.settle({"call": call})
            self.note(call)

        x.grad_fn.register_prehook(noted)
        return x

    def settle(self, facts: dict[str, str], error: Exception | None = None) -> None:
        """Exchange facts; every rank raises alike where they differ or where a rank refused the call.

        Args:
            facts: what must be the same on every rank, in words.
            error: why this rank is about to raise, None where all is well. This rank then joins and returns.

        Raises:
            RankMismatchError: facts differ, or another rank refused.
        """
        if not self.active:
            return
        status = "" if error is None else f"{type(error).__name__}: {error}"
        facts = {**facts, "calls before": str(self._journal)} if self._keeps_journal else facts
        answers = [_unpacked(payload) for payload in agree(_packed(facts, status), self._group.name)]
        if error is not None:
            return
        refused = {rank: words["refused"] for rank, (_, words) in enumerate(answers) if words.get("refused")}
        if refused:
            raise RankMismatchError(
                "another rank of the context-parallel group refused this call",
                got="; ".join(f"rank {rank}: {why}" for rank, why in refused.items()),
                fix="mend what that rank was given",
            )
        if len({whole for whole, _ in answers}) > 1:
            raise RankMismatchError(
                "the ranks of the context-parallel group do not hold the same batch, or have not made the same calls",
                got=_differences([words for _, words in answers]),
                fix="give every rank of the group the same global batch, handler arguments and order of calls; "
                'check_consistency="each_call" says which call was the first to differ',
            )
        self.pending = self._each_call  # only now: what failed is compared again
        _settled_groups.add(self._group.source)
        if self._keeps_journal:
            self._journal.start_afresh()


def shortened(text: str, most: int = 200) -> str:
    """The beginning of a text and a digest of all of it, where it is long."""
    if len(text) <= most:
        return text
    return f"{text[: most - 14]}... {digest(text.encode())}"


def _packed(facts: dict[str, str], status: str) -> bytes:
    facts = {name: shortened(value) for name, value in facts.items()}
    text = "\n".join(f"{name}={value}".replace("\n", " ") for name, value in facts.items())
    words = f"refused={status}\n{text}".replace("\r", " ") if status else text
    whole = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
    return (whole + words.encode()[: PAYLOAD_BYTES - _DIGEST_BYTES]).ljust(PAYLOAD_BYTES, b"\0")


def _unpacked(payload: bytes) -> tuple[bytes, dict[str, str]]:
    lines = payload[_DIGEST_BYTES:].rstrip(b"\0").decode(errors="ignore").split("\n")
    return payload[:_DIGEST_BYTES], dict(line.partition("=")[::2] for line in lines if "=" in line)


def _differences(answers: list[dict[str, str]]) -> str:
    """Which facts differ, and each rank's value."""
    parts = []
    for name in answers[0]:
        values: dict[str, list[int]] = {}
        for rank, words in enumerate(answers):
            values.setdefault(words.get(name, "(cut off)"), []).append(rank)
        if len(values) > 1:
            held = ", ".join(f"rank {' and '.join(map(str, ranks))} has {value}" for value, ranks in values.items())
            parts.append(f"{name}: {held}")
    return "; ".join(parts) or "facts too long to print"


def kind_of(x: Any) -> str:
    """A tensor's dtype, shape and whether it needs a gradient, in a few words."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    grad = " grad" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}{grad}"
