"""What the attention kernel takes of a pass: a clock around torch's CPU operators, whoever calls them.

The two operators are registered anew in the process that measures, with functions that read the thread's CPU clock and
call the kernels that were there. So a call from C++, which ``scaled_dot_product_attention`` and autograd make, counts
as one from Python does, for this library as for others. A call costs some 10 us more by it, outside of what it counts.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
OPERATORS = (FORWARD, f"{FORWARD}_backward")


class KernelClock:
    """Counts the CPU seconds of the kernel's calls in this process.

    Attributes:
        seconds: CPU seconds of the calls so far, of the threads that made them.
        calls: how many.
        listener: is told of each call, ahead of it: the operator's name, and the arguments, by place and by name.
    """

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        self.listener: Callable[[str, tuple[Any, ...], dict[str, Any]], None] | None = None
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is replaced, which is what is asked for
            for name in OPERATORS:
                operator = getattr(torch.ops.aten, name).default
                timed = self._timed(name, torch.library.get_kernel(operator, "CPU"))
                self._library.impl(name, timed, "CPU", with_keyset=True, allow_override=True)

    def _timed(self, name: str, kernel: Any) -> Callable[..., Any]:
        def timed(keys: Any, *args: Any, **kwargs: Any) -> Any:
            if self.listener is not None:
                self.listener(name, args, kwargs)
            started = time.thread_time()
            results = kernel.call_boxed(keys, *args, **kwargs)
            self.seconds += time.thread_time() - started
            self.calls += 1
            return results

        return timed


@lru_cache(maxsize=1)
def kernel_clock() -> KernelClock:
    """This process's clock, set up by the first call."""
    return KernelClock()
