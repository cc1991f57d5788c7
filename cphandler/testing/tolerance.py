"""How close is close enough, by dtype."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1.5e-3,
}
"""Largest relative L2 error of a result computed in a dtype, against float64. For 16-bit dtypes this is twice the
rounding of one matrix product; comparisons of error with one rank's are tighter."""

WORST_ELEMENT = 30.0
"""How far the worst element may be off, in tolerances, relative to the largest expected element."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; the norm of ``actual`` where nothing is expected."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    size = expected.detach().double().norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_close(actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, what: str = "result") -> None:
    """Fail unless two tensors agree to the tolerance of a dtype, as a whole and in the worst element.

    Args:
        actual: what was computed.
        expected: what is right, usually float64.
        dtype: dtype the computation ran in; None takes ``actual``'s.
        what: name in the error message.

    Raises:
        AssertionError: another shape, a NaN or infinity that is not expected, or too large an error.
    """
    tolerance = TOLERANCES[actual.dtype if dtype is None else dtype]
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    a, e = actual.detach().double(), expected.detach().double()
    special = ~torch.isfinite(e)
    same = (a == e) | (a.isnan() & e.isnan())
    assert bool(same[special].all()), f"{what}: infinities or NaN differ"
    a, e = a[~special], e[~special]
    assert bool(torch.isfinite(a).all()), f"{what}: not finite where it should be"
    error = relative_error(a, e)
    assert error <= tolerance, f"{what}: relative L2 error {error:.2e} above {tolerance:.0e}"
    if e.numel():
        worst = float((a - e).abs().max())
        bound = WORST_ELEMENT * tolerance * max(float(e.abs().max()), 1e-300)
        assert worst <= bound or float(e.abs().max()) == 0, (
            f"{what}: worst element off by {worst:.2e}, above {bound:.2e}"
        )
