"""Whether a step waits for the device where it need not."""

from __future__ import annotations

import torch

from benchmarks.gpu.rows import ABSENT, OK, WRONG, Record, Row
from cphandler import Causal, Mask, SlidingWindow, get_cp_handler_cls


def check_waits(record: Record, device: torch.device, *, small: bool) -> None:
    """A step of one rank under ``torch.cuda.set_sync_debug_mode``: the first plans, the second must not wait."""
    masks: tuple[Mask, ...] = (Causal(), SlidingWindow(100))
    for mask in masks:
        if device.type != "cuda":
            record.add(Row("waits", str(mask), ABSENT, note="torch tells of waits on CUDA devices only"))
            continue
        offsets = torch.tensor([0, 300, 337, 338, 1024])
        handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=offsets, mask=mask)
        q, k, v = (torch.randn(1024, n, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for n in (8, 4, 4))
        grad = torch.randn(1024, 8, 64, dtype=torch.bfloat16, device=device)
        torch.autograd.grad(handler.core_attn(None, q, k, v), (q, k, v), grad)
        torch.cuda.set_sync_debug_mode("error")
        try:
            rotated = handler.core_attn(None, q, k, v)
            torch.autograd.grad(rotated, (q, k, v), grad)
            record.add(Row("waits", f"a step under {mask}", OK))
        except RuntimeError as error:
            record.add(Row("waits", f"a step under {mask}", WRONG, note=str(error).splitlines()[0]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
