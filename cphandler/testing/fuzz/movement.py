"""The laws of dispatch, combine, roll, rope and the facts, on one random tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cphandler.handler.contract import ContextParallelHandler
from cphandler.layouts.layout import LEVEL_LAYOUTS
from cphandler.testing.cases import Case, documents_of, valid_tokens
from cphandler.testing.fuzz.cases import Move
from cphandler.testing.fuzz.tensors import RARE, Rows, laid
from cphandler.testing.laws import rolled_reference, same_bits
from cphandler.testing.reference import dense_rope
from cphandler.testing.tolerance import assert_close


class Moving:
    """One move on one rank: :meth:`run` communicates, :meth:`complaints` compares.

    Args:
        move: what is asked.
        case: the handler's.
        handler: of this rank.
        rows: this rank's rows of each stream.
        seed: of this group's data.
    """

    def __init__(
        self, move: Move, case: Case, handler: ContextParallelHandler, rows: dict[str, Rows], seed: int
    ) -> None:
        self.move, self.case, self.handler, self.seed = move, case, handler, seed
        self.rows = rows[move.stream]
        self.documents = documents_of(case, move.stream)
        self.num_tokens = self.documents.num_tokens
        self.dim = move.dim
        self.told = move.dim - len(move.shape) - 1 if move.is_negative else move.dim
        self.pairs: list[tuple[str, Tensor, Tensor]] = []
        self.close: list[tuple[str, Tensor, Tensor]] = []

    def run(self) -> None:
        """Make the call."""
        getattr(self, f"_{self.move.kind}")()

    def complaints(self) -> Iterator[str]:
        """What is wrong, in words."""
        for name, actual, wanted in self.pairs:
            if (actual.dtype, actual.shape) != (wanted.dtype, wanted.shape):
                got = f"{actual.dtype} {list(actual.shape)}"
                yield f"{name}: {got} in place of {wanted.dtype} {list(wanted.shape)}"
            elif not same_bits(actual.detach(), wanted):
                yield f"{name}: other bits"
        for name, actual, wanted in self.close:
            try:
                assert_close(actual, wanted, what=name)
            except AssertionError as error:
                yield str(error)

    def drawn(self, number: int = 0, *, rank: int = 0) -> Tensor:
        """A global tensor, the same on every rank of the group."""
        generator = torch.Generator().manual_seed(self.seed + 7919 * number + 104729 * rank)
        shape, dtype = (*self.move.shape[: self.dim], self.num_tokens, *self.move.shape[self.dim :]), self.move.dtype
        if dtype in RARE or dtype == torch.bool or not (dtype.is_floating_point or dtype.is_complex):
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

    def put(self, x: Tensor) -> Tensor:
        """A leaf of these values that lies as the move says."""
        return laid(x, self.move.strides).detach().requires_grad_(bool(self.move.grad))

    def _dispatch(self) -> None:
        move, x = self.move, self.drawn()
        leaf = self.put(x)
        local = self.handler.dispatch(leaf, self.told, pad_value=move.fill, stream=move.stream)
        self.pairs.append(("dispatch", local, self.taken(x, move.fill)))
        if move.grad:
            grad = self.drawn(1)
            local.backward(laid(self.taken(grad, float("nan")), move.strides))
            whole = grad if self.handler.sequence_sharded or self.handler.cp_size == 1 else self.taken(grad)
            self._has_gradient("gradient of dispatch", leaf, whole)

    def _combine(self) -> None:
        move, x = self.move, self.drawn()
        leaf = self.put(self.taken(x, 0 if x.dtype == torch.bool else 1))
        mode: Any = move.grad or "replicated"
        whole = self.handler.combine(leaf, self.told, grad=mode, stream=move.stream)
        self.pairs.append(("combine", whole, x))
        if not move.grad:
            return
        ranks = range(self.handler.cp_size)
        parts = [self.drawn(1, rank=rank if mode == "sum" else 0) for rank in ranks]
        mine = parts[self.handler.cp_rank]
        whole.backward(laid(mine, move.strides))
        if mode == "sum" and self.handler.sequence_sharded:
            total = self.taken(torch.stack(parts).sum(0))
            self.close.append(("gradient of combine, sum", self._gradient(leaf), total))
        else:
            factor = self.handler.effective_cp_size if mode == "scaled" else 1
            self._has_gradient(f"gradient of combine, {mode}", leaf, self.taken(mine * factor))

    def _roll(self) -> None:
        move, x = self.move, self.drawn()
        leaf = self.put(self.taken(x, 1))
        rolled, total = self.handler.roll_tensor(
            leaf, move.shift, self.told, fill_value=move.fill, return_sum=not self._is_unsummed, stream=move.stream
        )
        assert rolled is not None, "a roll of a tensor gives nothing"
        self.pairs.append(("roll", rolled, self.taken(self._rolled(x, move.shift, move.fill), move.fill)))
        if total is not None:
            self.pairs.append(("sum of a roll", total, rolled.detach().sum()))
        if move.grad:
            grad = self.drawn(1)
            rolled.backward(laid(self.taken(grad), move.strides))
            self._has_gradient("gradient of a roll", leaf, self.taken(self._rolled(grad, -move.shift, 0)))

    @property
    def _is_unsummed(self) -> bool:
        """Whether torch has no sum of the dtype, or one that a NaN's bits do not outlive."""
        return self.move.dtype in RARE or bool(self.seed % 3 == 0)

    def _rolled(self, x: Tensor, shift: int, fill: float) -> Tensor:
        """The global tensor rolled by the definition."""
        valid = valid_tokens(self.case, self.move.stream)
        if self.move.dtype in RARE:  # values below 100 survive the way through a wider dtype
            wide = rolled_reference(self.case, x.float(), shift, self.dim, fill, self.documents, valid)
            return wide.to(x.dtype)
        return rolled_reference(self.case, x, shift, self.dim, fill, self.documents, valid)

    def _rope(self) -> None:
        rotary, interleaved, scale, mode, form = self.move.rope
        heads, batch = 2, len(self.case.batch.real) if self.case.batch.real is not None else self.case.batch.rows
        lead = {"thd": (self.num_tokens,), "sbhd": (self.num_tokens, batch), "bshd": (batch, self.num_tokens)}
        shape, dim = (*lead[self.case.qkv_format], heads, 12), self.handler.seq_dim
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.move.dtype)
        frequencies = 0.7 ** torch.arange(rotary // 2, dtype=torch.float64)
        positions = [torch.arange(n) for n in self.documents.lengths.tolist()]
        angles = torch.cat([*positions, torch.arange(0)])[:, None] * frequencies
        stream, named = self.move.stream, {"freqs_mode": mode, "stream": self.move.stream}
        length = self.handler.get_rotary_seq_len(**named)  # type: ignore[arg-type]
        table = angles if mode == "packed" else torch.arange(length)[:, None] * frequencies
        assert len(table) == length, f"a rope table of {length} rows in place of {len(table)}"
        freqs: Any = table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)
        freqs = {"angles": freqs, "wide": freqs[:, None, None], "pair": (freqs.cos(), freqs.sin())}[form]
        local = self.handler.get_emb_on_this_cp_rank(freqs, **named)  # type: ignore[arg-type]
        options: dict[str, Any] = {"interleaved": interleaved, "mscale": scale, "stream": stream}
        turned = self.handler.rope(laid(self.rows.take(x, dim), self.move.strides), local, **options)
        expected = dense_rope(x.double(), angles, seq_dim=dim, interleaved=interleaved)
        expected[..., :rotary] *= scale
        self.close.append(("rope", turned, self.rows.take(expected, dim)))
        back = self.handler.rope(turned.double(), local, inverse=True, **options)
        self.close.append(("rope and its inverse", back.to(x.dtype), self.rows.take(x, dim)))

    def _facts(self) -> None:
        handler, case, stream = self.handler, self.case, self.move.stream
        assert (handler.cp_size, handler.cp_rank) == (
            case.cp_size,
            dist.get_rank(handler.group) if handler.group else 0,
        )
        positions = torch.cat([*(torch.arange(n) for n in self.documents.lengths.tolist()), torch.arange(0)])
        valid, prefix = valid_tokens(case, stream), "" if stream == "q" else "kv_"
        self.pairs.append(("position_ids", getattr(handler, f"{prefix}position_ids"), self.rows.take(positions, 0)))
        wanted = self.rows.take(valid, valid.dim() - 1, 0)
        self.pairs.append(("valid_mask", getattr(handler, f"{prefix}valid_mask"), wanted))
        layout = self.rows.layout
        count = torch.zeros(self.num_tokens, dtype=torch.int64)
        for rank in range(case.cp_size):
            other = Rows(layout, rank)
            count.index_add_(0, other.tokens[other.held], torch.ones_like(other.held))
        copies = 1 if handler.sequence_sharded else case.cp_size
        self.pairs.append(("ranks that hold each token", count, torch.full_like(count, copies)))
        if case.layout_of(stream) in LEVEL_LAYOUTS:
            assert layout.num_local_tokens == -(-self.num_tokens // case.cp_size), "shares are not level"

    def _gradient(self, leaf: Tensor) -> Tensor:
        assert leaf.grad is not None, "no gradient"
        return leaf.grad

    def _has_gradient(self, name: str, leaf: Tensor, wanted: Tensor) -> None:
        self.pairs.append((name, self._gradient(leaf) + 0.0, wanted + 0.0))
