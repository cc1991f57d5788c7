"""Whether the ranks of a context-parallel group really hold one batch, number by number."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Number
from typing import Any

from torch import Tensor

from cphandler.comm.consistency import Consistency
from cphandler.comm.groups import GroupSource, resolve_group
from cphandler.config import CPConfig
from cphandler.data.manifest import checksum_of
from cphandler.errors import InvalidTypeError, InvalidValueError
from cphandler.plan.batch_plan import BatchPlan
from cphandler.tensors import check_plain


def check_same_batch(batch: Mapping[str, Any], group: GroupSource) -> None:
    """Compare a global batch over the ranks that will share it; one message of a kilobyte per pair of ranks.

    Handlers compare lengths, layouts and masks. This compares what the tensors hold as well: a data set that draws by
    chance (a crop, a mask, dropout of words) gives ranks of one group batches that differ in nothing else. Every rank
    reads all of its batch for it, so that it is for the first steps of a run, or for every hundredth.

    Args:
        batch: tensors, numbers, strings, None and a :class:`BatchPlan` by name, before it is cut.
        group: the context-parallel group, as handlers take it; nothing happens on one rank.

    Raises:
        RankMismatchError: entries that differ, by name, or another rank's error; on every rank alike.
        InvalidTypeError: a batch that is no mapping, or an entry that cannot be compared.
        InvalidValueError: a group that can only say who it is.
    """
    ranks = resolve_group(group, two_level=True)
    if ranks.size > 1 and not ranks.name:
        raise InvalidValueError(
            "the ranks of this group cannot reach each other", got=type(group).__name__, fix="pass a process group"
        )
    check = Consistency(ranks, CPConfig())
    try:
        facts = _facts(batch)
    except Exception as error:
        check.settle({}, error)
        raise
    check.settle(facts)


def _facts(batch: object) -> dict[str, str]:
    if not isinstance(batch, Mapping):
        raise InvalidTypeError("batch must be a mapping", got=type(batch).__name__, fix="pass {'tokens': ids}, say")
    return {f"batch[{name!r}]": _told(name, batch[name]) for name in sorted(batch, key=repr)}


def _told(name: object, value: object) -> str:
    if isinstance(value, Tensor):
        check_plain(value, f"batch[{name!r}]")
        if value.device.type == "meta":
            raise InvalidTypeError(f"batch[{name!r}] must hold numbers", got="a tensor on meta", fix="leave it out")
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} #{checksum_of({'': value})[:12]}"
    if isinstance(value, BatchPlan):
        return f"{value.layout.name} of {value.cp_size} ranks #{value.layout.fingerprint.hex()[:12]}"
    if value is None or isinstance(value, (Number, str, bytes)):
        return repr(value)
    raise InvalidTypeError(
        f"batch[{name!r}] cannot be compared", got=type(value).__name__, fix="make it a tensor, or leave it out"
    )
