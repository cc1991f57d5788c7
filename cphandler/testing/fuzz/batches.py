"""Random batches: documents of all lengths with padding, and dense rows with holes."""

from __future__ import annotations

from cphandler.testing.cases import Batch
from cphandler.testing.fuzz.chance import Chance

KINDS = {"mixed": 30, "short": 15, "single": 8, "one": 15, "long": 15, "few": 12, "empty": 3, "none": 2}
"""Ways in which documents fill a pack, and how often."""


def random_batch(chance: Chance, qkv_format: str, *, is_cross: bool) -> Batch:
    """A batch for a format, with a key stream of its own or without."""
    return _packed(chance, is_cross) if qkv_format == "thd" else _dense(chance, is_cross)


def random_lengths(chance: Chance) -> tuple[int, ...]:
    """Lengths of a pack's documents; some tens of tokens in all."""
    kind = chance.pick(KINDS)
    total = chance.pick({chance.randint(1, 12): 30, chance.randint(8, 40): 55, chance.randint(40, 90): 15})
    if kind == "short":
        lengths = [chance.randint(0, 4) for _ in range(chance.randint(1, 12))]
    elif kind == "single":
        lengths = [1] * chance.randint(1, 9)
    elif kind == "long":
        lengths = [total, *(chance.randint(0, 3) for _ in range(chance.randint(0, 4)))]
        chance.shuffle(lengths)
    elif kind == "few":
        lengths = [chance.randint(1, 3) for _ in range(chance.randint(1, 3))]
    elif kind == "mixed":
        lengths = chance.cuts(total, chance.randint(1, 6))
    else:
        lengths = {"one": [total], "empty": [0] * chance.randint(1, 3), "none": []}[kind]
    return tuple(lengths)


def _packed(chance: Chance, is_cross: bool) -> Batch:
    lengths = random_lengths(chance)
    padded = _padded(chance, lengths)
    if not is_cross:
        return Batch(lengths, padded=padded)
    if chance.happens(0.2):
        keys = tuple(lengths)
    else:
        total = chance.randint(0, 40)
        keys = tuple(chance.cuts(total, len(lengths))) if lengths else ()
    return Batch(lengths, padded=padded, keys=keys, keys_padded=_padded(chance, keys))


def _padded(chance: Chance, lengths: tuple[int, ...]) -> tuple[int, ...] | None:
    """Physical lengths, or None for no padding: rounded up to a multiple, or anything."""
    if chance.happens(0.6):
        return None
    if chance.happens(0.5):
        multiple = chance.choice((2, 4, 8))
        return tuple(-(-length // multiple) * multiple for length in lengths)
    return tuple(length + chance.choice((0, 0, 1, 2, 5)) for length in lengths)


def _dense(chance: Chance, is_cross: bool) -> Batch:
    queries = chance.pick({0: 2, 1: 8, chance.randint(2, 6): 20, chance.randint(5, 30): 70})
    keys = queries if chance.happens(0.15) else chance.pick({0: 4, 1: 8, chance.randint(2, 30): 88})
    columns = keys if is_cross else queries
    rows = chance.pick({0: 2, 1: 30, 2: 48, 3: 20})
    real = None
    if rows and columns and chance.happens(0.45):
        real = tuple(_real(chance, columns) for _ in range(rows))
    return Batch((queries,), real=real, rows=rows, keys=(keys,) if is_cross else None)


def _real(chance: Chance, columns: int) -> str:
    """Which tokens of a row are real: all, none, padding on one side, or holes."""
    kind = chance.pick({"full": 20, "left": 20, "right": 20, "both": 10, "holes": 25, "none": 5})
    first, last = sorted(chance.randint(0, columns) for _ in range(2))
    if kind == "holes":
        return "".join(chance.choice("xx.") for _ in range(columns))
    start = first if kind in ("left", "both") else 0
    stop = last if kind in ("right", "both") else columns
    if kind == "none":
        stop = start
    return "".join("x" if start <= i < stop else "." for i in range(columns))
