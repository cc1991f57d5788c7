"""The law of rope on one random tensor: tables cut, the tensor turned, and turned back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cphandler.handler.contract import ContextParallelHandler
from cphandler.testing.fuzz.cases import Turn
from cphandler.testing.fuzz.facts import Truth
from cphandler.testing.fuzz.movement import Comparing
from cphandler.testing.fuzz.tensors import Rows, laid
from cphandler.testing.reference import dense_rope

HEADS = 2
CHANNELS = 12


class Turning(Comparing):
    """Rope tables and a tensor on one rank.

    With several rotary axes each pair of channels takes the angles of one of them in turn, as a model with sections
    would join them.

    Args:
        turn: what is asked.
        truth: of the case.
        handler: of this rank.
        rows: this rank's rows of each stream.
        seed: of this group's data.
    """

    def __init__(
        self, turn: Turn, truth: Truth, handler: ContextParallelHandler, rows: dict[str, Rows], seed: int
    ) -> None:
        super().__init__()
        self.turn, self.truth, self.handler = turn, truth, handler
        self.rows, self.seed = rows[turn.stream], seed
        self.num_tokens = self.rows.layout.num_tokens
        self.frequencies = 0.7 ** torch.arange(turn.rotary // 2, dtype=torch.float64)

    def run(self) -> None:
        """Turn, and turn back; nothing is sent."""
        turn, dim = self.turn, self.handler.seq_dim
        x = self._drawn()
        local = self._local_table()
        options: dict[str, Any] = {"interleaved": turn.is_interleaved, "mscale": turn.scale, "stream": turn.stream}
        turned = self.handler.rope(laid(self.rows.take(x, dim), turn.strides), local, **options)
        self.close.append(("rope", turned, self.rows.take(self._expected(x), dim)))
        again = self.handler.rope(self.rows.take(x.double(), dim), local, **options)
        back = self.handler.rope(again, local, inverse=True, **options)
        self.close.append(("rope and its inverse", back, self.rows.take(x.double(), dim)))

    def _drawn(self) -> Tensor:
        batch, rows = self.truth.base.batch, self.num_tokens
        copies = len(batch.real) if batch.real is not None else batch.rows
        lead = {"thd": (rows,), "sbhd": (rows, copies), "bshd": (copies, rows)}[self.truth.base.qkv_format]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn((*lead, HEADS, CHANNELS), generator=generator, dtype=torch.float64)
        return drawn.to(self.turn.dtype)

    def _local_table(self) -> Any:
        """This rank's rows of a table, rotary axes joined."""
        turn, named = self.turn, {"freqs_mode": self.turn.mode, "stream": self.turn.stream}
        length = self.handler.get_rotary_seq_len(**named)  # type: ignore[arg-type]
        own = self.truth.own_positions(turn.stream)
        if turn.mode == "packed":
            table, wanted = self._packed_angles(), self.num_tokens
        else:
            places = self.truth.positions(turn.stream)
            wanted = int(places.max()) + 1 if places.numel() else 0
            table = torch.arange(length)[:, None] * self.frequencies
        self.pairs.append(("rows of a rope table", torch.tensor(length), torch.tensor(wanted)))
        whole = table.repeat_interleave(2, -1) if turn.is_interleaved else torch.cat([table, table], -1)
        forms = {"angles": whole, "wide": whole[:, None, None], "pair": (whole.cos(), whole.sin())}
        local = self.handler.get_emb_on_this_cp_rank(forms[turn.form], **named)  # type: ignore[arg-type]
        if turn.mode == "packed" or own is None or "A" not in self.truth.case.positions:
            return local
        return tuple(map(self._joined, local)) if isinstance(local, tuple) else self._joined(local)

    def _packed_angles(self) -> Tensor:
        """``[T, R / 2]`` angles that no position explains, one row per packed token."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.num_tokens, len(self.frequencies), generator=generator, dtype=torch.float64)

    def _axes(self, axes: int) -> Tensor:
        """Which axis each pair of channels goes by."""
        return torch.arange(len(self.frequencies)) % axes

    def _joined(self, tables: Tensor) -> Tensor:
        """``[..., R]`` from ``[A, ..., R]``."""
        axes = self._axes(len(tables))
        of_channel = axes.repeat_interleave(2) if self.turn.is_interleaved else torch.cat([axes, axes])
        return torch.stack([tables[axis, ..., channel] for channel, axis in enumerate(of_channel.tolist())], -1)

    def _expected(self, x: Tensor) -> Tensor:
        """The whole tensor turned by the definition, row of the batch by row."""
        dim, batch_dim = self.handler.seq_dim, 1 - self.handler.seq_dim
        angles = self._angles()
        options: dict[str, Any] = {"interleaved": self.turn.is_interleaved}
        if angles.dim() == 2:
            turned = dense_rope(x.double(), angles, seq_dim=dim, **options)
        else:
            turned = x.double().clone()
            each = angles.expand(turned.shape[batch_dim], -1, -1)
            for row, angle in zip(turned.unbind(batch_dim), each, strict=True):
                row.copy_(dense_rope(row, angle, seq_dim=0, **options))
        turned[..., : self.turn.rotary] *= self.turn.scale
        return turned

    def _angles(self) -> Tensor:
        """``[S, R / 2]``, or ``[B, S, R / 2]`` where rows of the batch have positions of their own."""
        if self.turn.mode == "packed":
            return self._packed_angles()
        places, own = self.truth.positions(self.turn.stream), self.truth.own_positions(self.turn.stream)
        if own is not None and "A" in self.truth.case.positions:
            axes = self._axes(len(places))
            places = torch.stack([places[axis] for axis in axes.tolist()], -1)
            return places * self.frequencies
        return places.unsqueeze(-1) * self.frequencies
