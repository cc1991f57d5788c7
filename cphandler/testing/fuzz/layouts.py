"""Random layouts: the library's by name, mixes, and such as a caller may bring."""

from __future__ import annotations

from cphandler.layouts.layout import Layout
from cphandler.testing.fuzz.chance import Chance

Span = tuple[int, int, int]
"""First token, tokens, stride."""


def own_layout(chance: Chance, num_tokens: int, cp_size: int, *, may_stride: bool) -> Layout:
    """A layout of a caller's own: any cuts, ranks with nothing, pad rows anywhere, more rows than tokens.

    Args:
        chance: random choices.
        num_tokens: global tokens.
        cp_size: ranks.
        may_stride: whether spans may have a stride above 1, all of them the same.
    """
    stride = chance.randint(2, 4) if may_stride and chance.happens(0.3) else 1
    weights = [chance.choice((0, 1, 1, 2)) for _ in range(cp_size)]
    if not any(weights):
        weights[chance.randrange(cp_size)] = 1
    held: list[list[Span]] = [[] for _ in range(cp_size)]
    start = 0
    for length in chance.cuts(num_tokens, chance.randint(1, 3 * cp_size)):
        for first in range(min(stride, length)):
            span = (start + first, -(-(length - first) // stride), stride)
            held[chance.choices(range(cp_size), weights)[0]].append(span)
        start += length
    most = max(sum(length for _, length, _ in spans) for spans in held)
    rows = most + chance.choice((0, 0, 0, 1, 3, num_tokens))
    spans = [_placed(chance, sorted(spans), rows) for spans in held]
    return Layout("own", num_tokens, spans, num_local_tokens=rows)


def _placed(chance: Chance, spans: list[Span], rows: int) -> list[tuple[int, int, int, int]]:
    """Spans with their first local rows: in any order, with pad rows between them."""
    order = list(range(len(spans)))
    if chance.happens(0.4):
        chance.shuffle(order)
    gaps = chance.cuts(rows - sum(length for _, length, _ in spans), len(spans) + 1)
    if chance.happens(0.4):
        gaps = [0] * len(spans) + [sum(gaps)]
    local, placed = 0, {}
    for gap, which in zip(gaps, order, strict=False):
        placed[which] = local + gap
        local += gap + spans[which][1]
    return [(*span, placed[i]) for i, span in enumerate(spans)]


def shown_layout(layout: object) -> str:
    """A layout in a few words; one of a caller's own with its spans and their rows."""
    if isinstance(layout, tuple):
        return " / ".join(map(shown_layout, layout))
    if not isinstance(layout, Layout):
        return str(layout or "default layout")
    shares = [
        " ".join(f"{start}+{length}{f'/{stride}' if stride > 1 else ''}@{local}" for start, length, stride, local in s)
        for s in (spans.tolist() for spans in layout.spans)
    ]
    return f"own layout of {layout.num_local_tokens} rows [{' | '.join(shares)}]"
