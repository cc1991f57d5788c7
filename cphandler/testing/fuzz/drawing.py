"""Drawing a case from a seed and a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from cphandler.layouts.layout import LEVEL_LAYOUTS
from cphandler.layouts.placement import Balanced, LayoutSpec
from cphandler.testing.cases import Case
from cphandler.testing.fuzz.batches import random_batch
from cphandler.testing.fuzz.cases import Call, Look, Move, Parts, RandomCase, Step, Turn
from cphandler.testing.fuzz.chance import Chance
from cphandler.testing.fuzz.facts import rows_differ
from cphandler.testing.fuzz.layouts import own_layout
from cphandler.testing.fuzz.masks import Lengths, random_mask

BACKENDS: dict[str, float] = {
    "local": 6,
    "ulysses": 20,
    "ring": 18,
    "p2p": 18,
    "all_gather": 14,
    "usp": 10,
    "a2a+ring": 6,
    "layered": 8,
}
"""What is tried, and how often; ``"layered"`` is a list of comm types, one per layer."""

LAYERS = ("a2a", "ring", "p2p", "all_gather", "a2a+p2p", "a2a+ring")
WIRED = {"p2p", "all_gather", "usp"}
"""Backends that serve ``gradient_wire_dtype``."""

PARTS: dict[int, tuple[Parts, ...]] = {
    1: (((0,), (1,), (2,), (3,)),),
    2: (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)), ((1, 3),)),
    3: (((0, 1, 2),), ((1, 2, 3),), ((0, 1, 3),), ((0, 2, 3),)),
    4: (((0, 1, 2, 3),),),
}
"""Ways to divide the four ranks of a pool into groups of one size."""

MOVED_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
)


def random_case(seed: int, number: int, backends: Sequence[str] = ()) -> RandomCase:
    """The case of a seed and a number.

    Args:
        seed: of the run.
        number: in the run.
        backends: what to draw from: names out of :data:`BACKENDS` or ``"module:Class"``; empty for all of them.
    """
    chance = Chance(f"{seed}:{number}")
    named = chance.pick({name: BACKENDS.get(name, 10.0) for name in backends} if backends else BACKENDS)
    backend: str | tuple[str, ...] = named
    if named == "layered":
        backend = tuple(chance.choice(LAYERS) for _ in range(chance.randint(2, 3)))
    cp_size = 1 if named == "local" else chance.pick({1: 4, 2: 36, 3: 26, 4: 34})
    qkv_format = chance.pick({"thd": 55, "sbhd": 22, "bshd": 23})
    batch = random_batch(chance, qkv_format, is_cross=chance.happens(0.25))
    lengths = Lengths.of(batch, qkv_format)
    described = {"backend": backend, "cp_size": cp_size, "qkv_format": qkv_format, "batch": batch}
    base = Case(**described, mask=random_mask(chance, lengths), kernel=_kernel(chance))  # type: ignore[arg-type]
    base = replace(base, layout=_layout(chance, base, lengths), dtype=_dtype(chance), config=_config(chance, base))
    if named in WIRED and base.dtype != torch.float64 and chance.happens(0.3):
        base = replace(base, config=(*base.config, ("gradient_wire_dtype", "float32")))
    lengths = lengths.of_known_rows(rows_differ(base))
    return RandomCase(
        seed,
        number,
        chance.choice(PARTS[cp_size]),
        base,
        _steps(chance, base, lengths),
        backward=chance.choice(("at once", "same", "reverse", "together")),
        group=_group(chance, base),
        second=chance.pick({"": 86, "copy": 6, "twin": 8}),
        positions=_positions(chance, base) if chance.happens(0.15) else "",
        given_as=chance.pick({"tensor": 55, "wide tensor": 15, "array": 15, "list": 15}),
    )


def _group(chance: Chance, base: Case) -> str:
    """What the handler is given as its group; a mesh of two dims holds all four ranks."""
    if base.cp_size == 1:
        return chance.choice(("none", "group"))
    if base.cp_size == 4 and any("+" in name for name in _comm_types(base)) and chance.happens(0.25):
        return "group" if dict(base.config).get("ulysses_degree", 2) != 2 else "mesh of two dims"
    return "mesh" if chance.happens(0.06) else "group"


def _positions(chance: Chance, base: Case) -> str:
    """A shape of positions of the caller's own."""
    if base.qkv_format == "thd":
        return chance.choice(("S", "1S", "AS", "A1S"))
    forms = ["S", "1S", "A1S"]
    if base.batch.rows and (base.batch.real is None or len(base.batch.real)):
        forms += ["BS", "ABS", "BS"]
    return chance.choice(forms)


def _kernel(chance: Chance) -> str:
    return chance.pick({"auto": 75, "reference": 18, "torch": 7})


def _dtype(chance: Chance) -> torch.dtype:
    return chance.pick({torch.float64: 76, torch.float32: 10, torch.bfloat16: 7, torch.float16: 7})


def _comm_types(base: Case) -> set[str]:
    """Which algorithms a handler has."""
    short = {"ulysses": "a2a", "usp": "a2a+p2p"}
    names = [base.backend] if isinstance(base.backend, str) else base.backend
    return {short.get(name, name) for name in names}


def _config(chance: Chance, base: Case) -> tuple[tuple[str, Any], ...]:
    """Settings that change no result."""
    config: list[tuple[str, Any]] = []
    if chance.happens(0.3):
        config.append(("check_consistency", chance.choice(("first", "never", "each_call"))))
    if chance.happens(0.1):
        config.append(("deterministic", True))
    if chance.happens(0.1):
        config.append(("tile", chance.choice((2, 16))))
    if any("+" in name for name in _comm_types(base)) and chance.happens(0.4):
        degrees = [n for n in range(1, base.cp_size + 1) if base.cp_size % n == 0]
        config.append(("ulysses_degree", chance.choice(degrees)))
    return tuple(config)


def _layout(chance: Chance, base: Case, lengths: Lengths) -> Any:
    """A layout that the backend serves: its default, one by name, a mix or a caller's own; a pair for two streams."""
    if base.cp_size == 1:
        return None
    named = [name for name in LEVEL_LAYOUTS if name != "striped" or not any("+" in x for x in _comm_types(base))]
    if _comm_types(base) == {"a2a"}:
        named.append("replicated")
    streams = [sum(lengths.queries), sum(lengths.keys)] if lengths.is_cross else [sum(lengths.queries)]

    def one(tokens: int) -> LayoutSpec | None:
        kind = chance.pick({"default": 15, "name": 40, "mix": 5, "own": 40})
        if kind == "own":
            uneven = any("+" in name for name in _comm_types(base))
            return own_layout(chance, tokens, base.cp_size, may_stride=not uneven and not lengths.is_cross)
        if kind == "mix":
            known = lengths.of_known_rows(rows_differ(base))
            return Balanced({random_mask(chance, known): chance.randint(1, 3), base.mask: 2})
        return chance.choice(named) if kind == "name" else None

    first = one(streams[0])
    if not lengths.is_cross or (not hasattr(first, "spans") and chance.happens(0.4)):
        return first
    second = one(streams[1])
    if "replicated" in (first, second):
        return "replicated"
    return ("zigzag" if first is None else first, "contiguous" if second is None else second)


def _steps(chance: Chance, base: Case, lengths: Lengths) -> tuple[Step, ...]:
    """Calls of attention, and moves between them; sometimes moves alone."""
    calls = chance.pick({0: 12, 1: 46, 2: 32, 3: 10})
    steps: list[Step] = [_call(chance, base, lengths, first=not i) for i in range(calls)]
    moves = chance.randint(3, 6) if not calls else chance.pick({0: 50, 1: 30, 2: 20})
    for _ in range(moves):
        steps.insert(chance.randint(0, len(steps)), _other(chance, base))
    return tuple(steps)


def _call(chance: Chance, base: Case, lengths: Lengths, *, first: bool) -> Call:
    is_own_mask = chance.happens(0.15 if first else 0.7)
    case = replace(base, mask=random_mask(chance, lengths)) if is_own_mask else base
    case = replace(
        case, heads=_heads(chance, base), head_dim=chance.pick({8: 45, 16: 15, 1: 6, 2: 6, 3: 8, 5: 6, 64: 4})
    )
    if isinstance(base.backend, tuple):
        case = replace(case, layer=chance.randint(1, len(base.backend)))
    elif chance.happens(0.3):
        case = replace(case, layer=chance.randint(1, 5))
    own = _comm_types(base) <= {"local", "a2a"} and not rows_differ(case) and chance.happens(0.08)
    if own and not (base.batch.padded or base.batch.keys_padded):
        return Call(replace(case, own=True, lse=False), is_own_mask, garbage="nan", strides=_strides(chance))
    case = _with_options(chance, case)
    needs = chance.pick({"qkv": 75, "q": 5, "kv": 8, "v": 4, "qk": 4, "": 6})
    roots = "out"
    if case.lse and chance.happens(0.8):
        roots = "lse" if chance.happens(0.12) and needs not in ("v", "") else "both"
    return Call(
        case,
        is_own_mask,
        needs=needs,
        roots=roots,
        checkpoint=chance.pick({"": 70, "reentrant": 12, "saved": 18}) if needs else "",
        as_module=chance.happens(0.2),
        garbage=chance.pick({"nan": 50, "inf": 15, "-inf": 10, "mixed": 25}),
        strides=_strides(chance),
        again=chance.happens(0.08),
        is_inference=not needs and chance.happens(0.5),
    )


def _heads(chance: Chance, base: Case) -> tuple[int, int]:
    """Query and key heads: any, and often such that ranks that split them have equal shares."""
    heads = chance.randint(1, 7)
    if any("a2a" in name for name in _comm_types(base)) and chance.happens(0.4):
        heads = base.cp_size * chance.randint(1, max(1, 6 // base.cp_size))
    return heads, chance.choice([n for n in range(1, heads + 1) if heads % n == 0])


def _with_options(chance: Chance, case: Case) -> Case:
    """Options of one call; the kernels inside torch refuse two of them."""
    plain = case.kernel == "torch"
    options: dict[str, Any] = {"lse": chance.happens(0.6), "max_logit": chance.happens(0.15)}
    if chance.happens(0.3):
        options["scale"] = round(chance.uniform(0.3, 2.0) * case.head_dim**-0.5, 3)
    if chance.happens(0.25):
        options["value_dim"] = chance.choice((1, 2, 4, 7, 8, 12))
    options["sinks"] = chance.happens(0.2)
    if not plain and chance.happens(0.15):
        options["softcap"] = round(chance.uniform(0.5, 20.0), 2)
    if not plain and chance.happens(0.2):
        options["dropout_p"] = round(chance.uniform(0.02, 0.8), 3)
    return replace(case, **options)


STRIDES = {"plain": 50, "wide": 12, "stacked": 10, "stepped": 10, "permuted": 12, "shifted": 6}
"""How tensors lie in memory; see :func:`cphandler.testing.fuzz.tensors.laid`."""


def _strides(chance: Chance) -> str:
    return chance.pick(STRIDES)


def _other(chance: Chance, base: Case) -> Step:
    """What is no attention."""
    stream = chance.choice(base.streams)
    kind = chance.pick({"dispatch": 25, "combine": 20, "roll": 33, "turn": 14, "look": 8})
    if kind == "look":
        return Look(stream)
    if kind != "turn":
        return _move(chance, base, kind, stream)
    return Turn(
        stream,
        chance.pick({torch.float64: 70, torch.float32: 20, torch.bfloat16: 10}),
        _strides(chance),
        rotary=chance.choice((12, 8, 2)),
        is_interleaved=chance.happens(0.5),
        scale=chance.choice((1.0, 1.0, 1.3)),
        mode=chance.pick({"per_document": 70, "packed": 30}),
        form=chance.choice(("angles", "wide", "pair")),
    )


GRADS = {"dispatch": ("full", "partial"), "combine": ("replicated", "sum", "scaled"), "roll": ("moved",)}
"""What gradients of moves may mean."""


def _move(chance: Chance, base: Case, kind: str, stream: str) -> Move:
    grad = chance.choice(GRADS[kind]) if chance.happens(0.45) else ""
    dtype = torch.float64 if grad else chance.choice(MOVED_DTYPES)
    shape, dim = _shape(chance, base, kind)
    return Move(
        kind,
        stream,
        dtype,
        shape,
        dim,
        is_negative=chance.happens(0.4),
        strides=_strides(chance),
        fill=_fill(chance, dtype),
        shift=chance.choice((-1, -1, 1, -2, 2, 0, 5, -7, 1000)),
        grad=grad,
        is_twice=grad not in ("", "scaled") and chance.happens(0.25),
    )


def _shape(chance: Chance, base: Case, kind: str) -> tuple[tuple[int, ...], int]:
    """The other dims of a tensor, and where the sequence is; a roll over rows that differ must name the batch."""
    if kind == "roll" and (rows := rows_differ(base)) is not None:
        rest = [chance.choice((1, 2, 3)) for _ in range(chance.randint(0, 2))]
        return (rows, *rest), chance.randint(0, 1)
    sizes = (1, 1, 2, 3, 0) if chance.happens(0.1) else (1, 1, 2, 3)
    shape = [chance.choice(sizes) for _ in range(chance.randint(0, 3))]
    return tuple(shape), chance.randint(0, len(shape))


def _fill(chance: Chance, dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return chance.choice((0, 1))
    if dtype.is_floating_point or dtype.is_complex:
        return chance.choice((0, 0, -1.5, float("nan")))
    return chance.choice((0, 0, 7)) if dtype in (torch.uint8, torch.uint16, torch.uint32) else chance.choice((0, -100))
