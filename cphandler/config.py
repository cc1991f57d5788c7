"""Everything about context parallelism that does not change from batch to batch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class CPConfig(BaseModel):
    """Settings of a handler; frozen, validated, the same on every rank.

    What is wrong with a setting is told as pydantic does, by a ``ValidationError``, which is a ``ValueError``: a model
    of the caller's own that has this one as a field then tells where in it. Nothing is converted: ``True`` is no number
    of rows, and ``"yes"`` is not ``True``.

    Attributes:
        kernel: what computes attention: ``"auto"`` (the fastest one for the device and dtype),
            ``"torch"`` (the flash kernels inside torch), ``"reference"`` (dense arithmetic), or a name
            registered with :func:`cphandler.register_kernel`.
        deterministic: use only kernels whose results have the same bits in two runs. The CPU kernels always do;
            torch's CUDA kernels do not in their backward pass.
        check_consistency: when to compare across ranks: ``"always"``, before the first exchange of every handler, with
            what the ranks have done since the last comparison; ``"first"``, for the first handler of a group;
            ``"never"``; ``"each_call"``, before each call and each backward pass, for debugging.
        timeout: seconds, a millisecond at least, that the check and each exchange wait for the slowest rank; None
            leaves it to the process group's own limit. Exchanges over NCCL always leave it to the group's.
        ulysses_degree: ranks of the inner group under ``a2a+p2p`` and ``a2a+ring`` over a flat group; None takes the
            smallest divisor of the group's size that is at least its square root.
        tile: rows of the attention kernel's tile, 128 say. The ``balanced`` layout then counts a task's area in whole
            tiles, which is what many short documents cost a GPU; None counts pairs.
        kernel_cost: what a task costs the kernel beside its own pairs, said in pairs: a launch, what it does once. The
            ``balanced`` layout then counts it for every document, so that a rank with many short ones has less else to
            do. ``make blocks`` shows it for this machine; 0 counts nothing.
        gradient_wire_dtype: dtype in which key and value gradients travel where each contribution travels once (p2p,
            all_gather, a2a+p2p); sums stay in the accumulator's, which is also what None sends.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kernel: str = "auto"
    deterministic: bool = False
    check_consistency: Literal["always", "first", "never", "each_call"] = "always"
    timeout: float | None = Field(default=None, ge=1e-3, le=1e9)
    ulysses_degree: int | None = Field(default=None, ge=1)
    tile: int | None = Field(default=None, ge=1)
    kernel_cost: int = Field(default=0, ge=0, le=1 << 40)
    gradient_wire_dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        unknown = [name for name in given if name not in cls.model_fields] if isinstance(given, dict) else []
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"no setting is called {names}; choose among {', '.join(cls.model_fields)}")
        return given

    @field_validator("kernel")
    @classmethod
    def _check_kernel(cls, kernel: str) -> str:
        if not kernel.strip():
            raise ValueError("a kernel has a name; leave it at 'auto' for the fastest one")
        return kernel
