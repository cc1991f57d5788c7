"""A model's global arguments, as a handler of the batch and this rank's part of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cphandler.comm.consistency import digest
from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.handler.contract import ContextParallelHandler
from cphandler.integrations.huggingface.settings import Settings
from cphandler.tokens.documents import checked_offsets
from cphandler.tokens.intervals import Table, offsets_of
from cphandler.training.labels import IGNORED, shift_labels

ROWS = ("input_ids", "inputs_embeds")
"""What a batch has tokens by: one of the two."""

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What says where documents begin; the handler keeps it, and no layer sees it."""

CUT = (*ROWS, "token_type_ids", "position_ids", "attention_mask", "labels", "shift_labels")
"""Tensors with one entry for each token."""


@dataclass(frozen=True)
class BatchOnRank:
    """One batch as a rank's layers see it; travels to each of them as a keyword argument.

    Attributes:
        handler: the batch's.
        shape: (B, S) of the global batch.
        device: of its tensors.
        called: names of the layers whose attention was computed with it.
    """

    handler: ContextParallelHandler
    shape: tuple[int, int]
    device: torch.device
    called: set[str] = field(default_factory=set)

    @property
    def packed(self) -> bool:
        """Whether the rows of the batch lie one behind the other, as documents of one stream."""
        return self.handler.qkv_format == "thd"

    @cached_property
    def columns(self) -> Tensor:
        """``[L]`` of each local token, its number in its row of the batch."""
        rows, length = self.shape
        numbers = torch.arange(length, device=self.device).repeat(rows if self.packed else 1)
        return self.handler.dispatch(numbers, 0)

    @cached_property
    def real(self) -> Tensor:
        """``[B, L]``, packed ``[1, L]``, bool: True for a real token."""
        valid = self.handler.valid_mask.to(self.device)
        rows = 1 if self.packed else self.shape[0]
        return valid if valid.dim() == 2 else valid.expand(rows, -1)

    def flat(self, x: Tensor, dim: int = 0) -> Tensor:
        """Packed: rows of the batch, dims ``dim`` and the next, one behind the other: ``[1, B * S]``; else as it is."""
        return x.flatten(dim, dim + 1).unsqueeze(dim) if self.packed else x

    def cut(self, x: Tensor, dim: int = 0, *, pad_value: float = 0) -> Tensor:
        """This rank's rows of a global ``[..., B, S, ...]`` whose batch is in ``dim``; gradients add up over ranks."""
        grad = "partial" if x.requires_grad else "full"
        return self.handler.dispatch(self.flat(x, dim), dim + 1, pad_value=pad_value, grad=grad)  # type: ignore[arg-type]

    def whole(self, x: Tensor) -> Tensor:
        """The global ``[B, S, ...]`` of local rows ``[B, L, ...]``, on every rank."""
        combined = self.handler.combine(x, 1)
        return combined.unflatten(1, self.shape).squeeze(0) if self.packed else combined


@dataclass(frozen=True)
class GlobalBatch:
    """What a caller gave a model, the same on every rank.

    Attributes:
        arguments: by the names of the model's parameters, none of them None.
        shape: (B, S).
    """

    arguments: Mapping[str, Any]
    shape: tuple[int, int]

    @classmethod
    def checked(cls, arguments: Mapping[str, Any]) -> GlobalBatch:
        """The arguments of a call, where ranks can share it.

        Raises:
            InvalidTypeError: neither tokens nor embeddings, or both.
            InvalidValueError: tensors of other shapes than the tokens'.
            UnsupportedError: what belongs to no decoder on a whole batch: a cache, a four-dim mask, other tensors.
        """
        named = [name for name in ROWS if name in arguments]
        if len(named) != 1 or not isinstance(arguments[named[0]], Tensor):
            raise InvalidTypeError(
                "a parallelized model takes input_ids or inputs_embeds, as a tensor",
                got=" and ".join(named) or "neither",
                fix="pass the global batch, the same on every rank",
            )
        rows = arguments[named[0]]
        if rows.dim() < 2:
            raise InvalidValueError(f"{named[0]} must be [B, S]", got=f"shape {list(rows.shape)}", fix="unsqueeze(0)")
        batch = cls(arguments, (rows.shape[0], rows.shape[1]))
        batch._check()
        return batch

    def _check(self) -> None:
        for name in ("cache", "past_key_values"):
            if name in self.arguments:
                raise UnsupportedError(
                    "a parallelized model has no cache of keys and values",
                    got=f"{name}=",
                    fix="leave it out; model.generate computes with the whole model on every rank",
                )
        if self.arguments.get("use_cache"):
            raise UnsupportedError(
                "a parallelized model has no cache of keys and values", got="use_cache=True", fix="leave it out"
            )
        for name, value in self.arguments.items():
            if name in CUT and not isinstance(value, Tensor):
                raise InvalidTypeError(
                    f"{name} must be a tensor of the whole batch", got=type(value).__name__, fix="pass [B, S]"
                )
            if not isinstance(value, Tensor) or name in PACKING or name in ("num_items_in_batch", "logits_to_keep"):
                continue
            if name not in CUT:
                raise UnsupportedError(
                    f"{name} is a tensor, and how to cut it is not known",
                    got=f"shape {list(value.shape)}",
                    fix=f"tensors that are cut are {', '.join(CUT)}",
                )
            self._check_shape(name, value)

    def _check_shape(self, name: str, x: Tensor) -> None:
        rows, length = self.shape
        lead = x.shape[-2:] if name == "position_ids" else x.shape[:2]
        fits = tuple(lead) == self.shape or (name == "position_ids" and tuple(lead) in ((1, length), (length,)))
        if name == "attention_mask" and x.dim() != 2:
            raise UnsupportedError(
                "attention_mask must say which tokens are real, [B, S]",
                got=f"shape {list(x.shape)}",
                fix="the handler and the model's own layers say who sees whom; leave the mask out of a packed batch",
            )
        if not fits:
            raise InvalidValueError(
                f"{name} must be of the batch, [{rows}, {length}]",
                got=f"shape {list(x.shape)}",
                fix="pass global tensors, the same on every rank; the model cuts them itself",
            )

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        rows: Tensor = next(self.arguments[name] for name in ROWS if name in self.arguments)
        return rows.device

    def digest(self) -> str:
        """A few characters for each tensor of numbers, which differ where it differs: all ranks hold the same."""
        tensors = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor) and name in CUT}
        return ", ".join(
            f"{name} {digest(x.cpu().contiguous().numpy().tobytes())}"
            for name, x in tensors.items()
            if not x.is_floating_point()
        )

    @cached_property
    def positions(self) -> Tensor | None:
        """``[B, S]`` or, of A rotary axes, ``[A, B, S]``; None where the caller gave none."""
        given: Tensor | None = self.arguments.get("position_ids")
        if given is None:
            return None
        given = given.unsqueeze(0) if given.dim() == 1 else given
        return given.expand(*given.shape[:-2], *self.shape)

    @cached_property
    def real(self) -> Tensor | None:
        """``[B, S]`` bool of a padded batch; None where every token is real."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        if mask is None or bool((mask != 0).all()):
            return None
        return mask != 0

    @cached_property
    def offsets(self) -> Table | None:
        """``[D + 1]`` offsets of documents in the rows laid end to end; None where each row is one.

        Raises:
            InvalidValueError: descriptions that contradict each other.
        """
        rows, length = self.shape
        found = self._described()
        ends = np.arange(rows + 1, dtype=np.int64) * length
        if all(np.array_equal(table, ends) for table in found.values()):
            return None
        if "attention_mask" in self.arguments:
            raise InvalidValueError(
                f"{' and '.join(found)} put several documents in a row, and there is an attention_mask",
                got=f"{len(next(iter(found.values()))) - 1} documents in {rows} rows",
                fix="leave attention_mask out of packed rows, where transformers lets documents see each other; or "
                "pass position_ids that count through each row",
            )
        tables = list(found.values())
        if any(not np.array_equal(table, tables[0]) for table in tables[1:]):
            raise InvalidValueError(
                f"{', '.join(found)} name different documents",
                got=", ".join(f"{len(table) - 1}" for table in tables) + " documents",
                fix="pass one of them, or let them agree",
            )
        return tables[0]

    def _described(self) -> dict[str, Table]:
        """Offsets by what says so."""
        rows, length = self.shape
        found: dict[str, Table] = {}
        for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if name in self.arguments:
                table = checked_offsets(torch.as_tensor(self.arguments[name]).reshape(-1), name)
                if table[-1] != rows * length:
                    raise InvalidValueError(
                        f"{name} must end at the number of tokens",
                        got=f"{table[-1]} for {rows} x {length}",
                        fix="pass offsets of the whole batch",
                    )
                found[name] = np.unique(table)
        if "seq_idx" in self.arguments:
            numbers = torch.as_tensor(self.arguments["seq_idx"]).reshape(rows, length).cpu().numpy()
            found["seq_idx"] = _starting(numbers[:, 1:] != numbers[:, :-1])
        found |= self._by_positions(named=bool(found))
        return found

    def _by_positions(self, *, named: bool) -> dict[str, Table]:
        """Documents where positions restart: as transformers reads them, at every step that is not one up."""
        positions = self.positions
        if positions is None or (positions.dim() == 3 and positions.shape[0] != 4):
            return {}
        numbers = (positions[0] if positions.dim() == 3 else positions).cpu().numpy()
        jumps = numbers[:, 1:] != numbers[:, :-1] + 1
        if "attention_mask" in self.arguments:  # around padding positions are anyone's
            real = (self.arguments["attention_mask"] != 0).cpu().numpy()
            jumps &= real[:, 1:] & real[:, :-1]
        return {} if named and not jumps.any() else {"position_ids": _starting(jumps)}

    def on_rank(self, settings: Settings) -> BatchOnRank:
        """This rank's handler of it."""
        length = self.shape[1]
        facts: dict[str, Any] = {"qkv_format": "bshd", "max_seqlen_q": length, "key_padding_mask": self.real}
        if self.offsets is not None:
            facts = {"qkv_format": "thd", "cu_seqlens_q": self.offsets}
        return BatchOnRank(settings.handler(**facts), self.shape, self.device)

    def labels(self) -> Tensor | None:
        """``[B, S]`` the label of what each token predicts; None where the caller gave none.

        As transformers shifts them, along each row: to leave out the first token of a document, its label is -100.
        """
        shifted: Tensor | None = self.arguments.get("shift_labels")
        if shifted is not None:
            return shifted
        given: Tensor | None = self.arguments.get("labels")
        return None if given is None else shift_labels(given, ignore_index=IGNORED)


def _starting(jumps: Any) -> Table:
    """``[D + 1]`` offsets of documents that begin with each row and after each jump ``[B, S - 1]``."""
    starts = np.ones((jumps.shape[0], jumps.shape[1] + 1), dtype=bool)
    starts[:, 1:] = jumps
    at = np.flatnonzero(starts)
    return offsets_of(np.diff(np.append(at, starts.size)))
