"""The laws of dispatch, combine and roll on one random tensor, and their derivatives; and a look at the facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.handler.contract import ContextParallelHandler
from cphandler.layouts.layout import LEVEL_LAYOUTS
from cphandler.testing.cases import documents_of
from cphandler.testing.fuzz.cases import Look, Move
from cphandler.testing.fuzz.facts import Truth
from cphandler.testing.fuzz.tensors import RARE, Rows, laid
from cphandler.testing.laws import rolled_reference, same_bits
from cphandler.testing.tolerance import assert_close


class Comparing:
    """Pairs of what came and what should have come, compared once nothing communicates any more."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, Tensor, Tensor]] = []
        self.close: list[tuple[str, Tensor, Tensor]] = []

    def complaints(self) -> Iterator[str]:
        """What is wrong, in words."""
        for name, actual, wanted in self.pairs:
            if (actual.dtype, actual.shape) != (wanted.dtype, wanted.shape):
                got = f"{actual.dtype} {list(actual.shape)}"
                yield f"{name}: {got} in place of {wanted.dtype} {list(wanted.shape)}"
            elif not same_bits(actual.detach(), wanted.detach()):
                yield f"{name}: other bits"
        for name, actual, wanted in self.close:
            try:
                assert_close(actual, wanted, what=name)
            except AssertionError as error:
                yield str(error)


class Moving(Comparing):
    """One move on one rank.

    Args:
        move: what is asked.
        truth: of the case.
        handler: of this rank.
        rows: this rank's rows of each stream.
        seed: of this group's data.
    """

    def __init__(
        self, move: Move, truth: Truth, handler: ContextParallelHandler, rows: dict[str, Rows], seed: int
    ) -> None:
        super().__init__()
        self.move, self.truth, self.handler, self.seed = move, truth, handler, seed
        self.rows, self.dim = rows[move.stream], move.dim
        self.num_tokens = self.rows.layout.num_tokens
        self.told = move.dim - len(move.shape) - 1 if move.is_negative else move.dim
        self.is_cut = handler.sequence_sharded

    def run(self) -> None:
        """Make the call."""
        {"dispatch": self._dispatch, "combine": self._combine, "roll": self._roll}[self.move.kind]()

    def drawn(self, number: int = 0, *, rank: int = 0) -> Tensor:
        """A global tensor, the same on every rank of the group."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * number + 104729 * rank)
        shape, dtype = (*self.move.shape[: self.dim], self.num_tokens, *self.move.shape[self.dim :]), self.move.dtype
        if dtype in RARE or not (dtype.is_floating_point or dtype.is_complex):
            return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        if not self.move.grad:
            drawn.view(-1)[::7] = float("nan")
            drawn.view(-1)[1::5] = -0.0
            drawn.view(-1)[2::11] = float("inf")
        return drawn.to(dtype)

    def taken(self, x: Tensor, fill: float = 0) -> Tensor:
        """This rank's rows."""
        return self.rows.take(x, self.dim, fill)

    def alone(self, x: Tensor) -> Tensor:
        """A global tensor with zeros in place of all rows but this rank's."""
        kept = torch.zeros_like(x)
        mine = self.rows.tokens[self.rows.held]
        return kept.index_copy(self.dim, mine, x.index_select(self.dim, mine))

    def put(self, x: Tensor) -> Tensor:
        """A leaf of these values that lies as the move says."""
        return laid(x, self.move.strides).detach().requires_grad_(bool(self.move.grad))

    def pulled(self, result: Tensor, leaf: Tensor, grad: Tensor, again: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The gradient of a move; and what the gradient's own gradient ``again`` becomes on the way back."""
        pull = laid(grad, self.move.strides).detach().requires_grad_(again is not None)
        (got,) = torch.autograd.grad(result, leaf, pull, create_graph=again is not None)
        if again is None:
            return got, None
        (back,) = torch.autograd.grad(got, pull, laid(again, self.move.strides))
        return got.detach(), back

    def _dispatch(self) -> None:
        move, x = self.move, self.drawn()
        leaf, mode = self.put(x), {"grad": move.grad} if move.grad else {}
        local = self.handler.dispatch(leaf, self.told, pad_value=move.fill, stream=move.stream, **mode)  # type: ignore[arg-type]
        self.pairs.append(("dispatch", local, self.taken(x, move.fill)))
        if not move.grad:
            return
        grad, rank = self.drawn(1), self.handler.cp_rank
        again = self.drawn(2, rank=rank if move.grad == "partial" else 0) if move.is_twice else None
        got, back = self.pulled(local, leaf, self.taken(grad, float("nan") if self.is_cut else 0), again)
        wanted = (grad if move.grad == "full" else self.alone(grad)) if self.is_cut else self.taken(grad)
        self.same(f"gradient of dispatch, {move.grad}", got, wanted)
        if again is not None and back is not None:
            self.same(f"second gradient of dispatch, {move.grad}", back, self.taken(again))

    def _combine(self) -> None:
        move, x = self.move, self.drawn()
        leaf, mode = self.put(self.taken(x, 0 if x.dtype == torch.bool else 1)), move.grad or "replicated"
        whole = self.handler.combine(leaf, self.told, grad=mode, stream=move.stream)  # type: ignore[arg-type]
        self.pairs.append(("combine", whole, x))
        if not move.grad:
            return
        parts = [self.drawn(1, rank=rank if mode == "sum" else 0) for rank in range(self.handler.cp_size)]
        mine, again = parts[self.handler.cp_rank], self.drawn(2) if move.is_twice else None
        got, back = self.pulled(whole, leaf, mine, None if again is None else self.taken(again))
        if mode == "sum" and self.is_cut:
            self.close.append(("gradient of combine, sum", got, self.taken(torch.stack(parts).sum(0))))
        else:
            self.same(f"gradient of combine, {mode}", got, self.taken(mine * self.factor))
        if again is not None and back is not None:
            self.same(f"second gradient of combine, {mode}", back, again)

    @property
    def factor(self) -> int:
        """What gradients of a combined tensor are scaled by."""
        return self.handler.effective_cp_size if self.move.grad == "scaled" else 1

    def _roll(self) -> None:
        move, x = self.move, self.drawn()
        leaf = self.put(self.taken(x, 1))
        rolled, total = self.handler.roll_tensor(
            leaf, move.shift, self.told, fill_value=move.fill, return_sum=not self.is_unsummed, stream=move.stream
        )
        assert rolled is not None, "a roll of a tensor gives nothing"
        self.pairs.append(("roll", rolled, self.taken(self.rolled(x, move.shift, move.fill), move.fill)))
        if total is not None:
            self.pairs.append(("sum of a roll", total, rolled.detach().sum()))
        if not move.grad:
            return
        grad, again = self.drawn(1), self.drawn(2) if move.is_twice else None
        got, back = self.pulled(rolled, leaf, self.taken(grad), None if again is None else self.taken(again))
        self.same("gradient of a roll", got, self.taken(self.rolled(grad, -move.shift, 0)))
        if again is not None and back is not None:
            self.same("second gradient of a roll", back, self.taken(self.rolled(again, move.shift, 0)))

    @property
    def is_unsummed(self) -> bool:
        """Whether torch has no sum of the dtype, or none is asked for."""
        return self.move.dtype in RARE or self.seed % 3 == 0

    def rolled(self, x: Tensor, shift: int, fill: float) -> Tensor:
        """The global tensor rolled by the definition."""
        documents, valid = documents_of(self.truth.base, self.move.stream), self.truth.valid(self.move.stream)
        wide = x.float() if self.move.dtype in RARE else x  # values below 100 survive the way through a wider dtype
        return rolled_reference(self.truth.base, wide, shift, self.dim, fill, documents, valid).to(x.dtype)

    def same(self, name: str, actual: Tensor, wanted: Tensor) -> None:
        """Note a pair that must be equal, but for the sign of zeros."""
        self.pairs.append((name, actual.detach() + 0.0, wanted + 0.0))


class Looking(Comparing):
    """A look at the facts of one stream on one rank.

    Args:
        look: at which.
        truth: of the case.
        handler: of this rank.
        rows: this rank's rows of each stream.
    """

    def __init__(self, look: Look, truth: Truth, handler: ContextParallelHandler, rows: dict[str, Rows]) -> None:
        super().__init__()
        self.stream, self.truth, self.handler, self.rows = look.stream, truth, handler, rows[look.stream]

    def run(self) -> None:
        """Ask, and write to what was handed out, which must change nothing."""
        handler, base, prefix = self.handler, self.truth.base, "" if self.stream == "q" else "kv_"
        rank = dist.get_rank(handler.group) if handler.group else 0
        ours, theirs = (base.cp_size, rank), (handler.cp_size, handler.cp_rank)
        self.pairs.append(("cp_size and cp_rank", torch.tensor(theirs), torch.tensor(ours)))
        for name, whole in (
            ("position_ids", self.truth.positions(self.stream)),
            ("valid_mask", self.truth.valid(self.stream)),
        ):
            for _ in range(2):
                fact: Any = getattr(handler, f"{prefix}{name}")
                self.pairs.append((name, fact.clone(), self.rows.take(whole, whole.dim() - 1)))
                fact.fill_(1)
        self._count(base.layout_of(self.stream) in LEVEL_LAYOUTS)

    def _count(self, is_level: bool) -> None:
        """Each token is on one rank, or on all of them, and named layouts give ranks as many rows as they can."""
        layout = self.rows.layout
        held = torch.zeros(layout.num_tokens, dtype=torch.int64)
        for rank in range(layout.cp_size):
            other = Rows(layout, rank)
            held.index_add_(0, other.tokens[other.held], torch.ones_like(other.held))
        copies = 1 if self.handler.sequence_sharded else layout.cp_size
        self.pairs.append(("ranks that hold each token", held, torch.full_like(held, copies)))
        if is_level:
            rows = torch.tensor(-(-layout.num_tokens // layout.cp_size))
            self.pairs.append(("rows of a level layout", torch.tensor(layout.num_local_tokens), rows))
