"""What a batch's length must be a multiple of, when several parts of a stack have a wish."""

from __future__ import annotations

from math import lcm

from cphandler.errors import InvalidValueError
from cphandler.tokens.counts import checked_count


def length_multiple(
    *, cp_size: int = 1, tp_size: int = 1, fp8: int = 1, page: int = 1, max_multiple: int = 8192
) -> int:
    """The least number that a batch's length has to be a multiple of; for ``pack_documents(pad_to_multiple_of=...)``.

    Ranks share out the tokens, ``cp_size * tp_size`` ways where tensor parallelism splits the sequence too, and each
    rank's rows are a multiple of ``fp8``. Pages are counted over the whole batch. So it is
    ``lcm(cp_size * tp_size * fp8, page)``, which explodes where a page has little in common with the rest: one of 1170
    tokens and 16 ranks make 9360. That is refused, since up to so many tokens would be padding.

    Attention needs none of it: layouts take any length. A multiple for each document, which some engines want, is
    another thing: ``pack_documents(multiple_of=...)``.

    Args:
        cp_size: context-parallel ranks P.
        tp_size: ranks of sequence parallelism inside tensor parallelism.
        fp8: what a rank's rows are a multiple of for matrix products in float8: 16, or 128 for blockwise scales.
        page: tokens of a page, a bucket or a tile that a batch must fill.
        max_multiple: the most that is put up with.

    Raises:
        InvalidTypeError: a factor that is no int.
        InvalidValueError: a factor below 1; a multiple above ``max_multiple``, naming the factors, and the one that
            makes most of it.
    """
    named = {"cp_size": cp_size, "tp_size": tp_size, "fp8": fp8, "page": page}
    factors = {name: checked_count(name, factor, least=1) for name, factor in named.items()}
    most = checked_count("max_multiple", max_multiple, least=1)
    whole = _multiple(factors)
    if whole > most:
        left = {name: _multiple(factors | {name: 1}) for name in reversed(factors)}
        largest = min(left, key=lambda name: left[name])
        told = " * ".join(f"{name} {factors[name]}" for name in ("cp_size", "tp_size", "fp8") if factors[name] > 1)
        told += f"{' and ' if told else ''}page {page}" if factors["page"] > 1 else ""
        raise InvalidValueError(
            "the batch's length would have to be a multiple of more than max_multiple",
            got=f"{told}: {whole}, and at most {most}",
            fix=f"drop {largest}={factors[largest]}, which leaves {left[largest]}, or raise max_multiple",
        )
    return whole


def _multiple(factors: dict[str, int]) -> int:
    return lcm(factors["cp_size"] * factors["tp_size"] * factors["fp8"], factors["page"])
