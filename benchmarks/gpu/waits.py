"""Whether a step waits for the device where it need not."""

from __future__ import annotations

import torch

from benchmarks.gpu.rows import ABSENT, OK, WRONG, Record, Row
from cphandler import Causal, Mask, SlidingWindow, get_cp_handler_cls


def check_waits(record: Record, device: torch.device, *, small: bool) -> None:
    """Steps of one rank under ``torch.cuda.set_sync_debug_mode``: the batch of the first again, then a new one."""
    masks: tuple[Mask, ...] = (Causal(), SlidingWindow(100))
    for mask in masks:
        if device.type != "cuda":
            record.add(Row("waits", str(mask), ABSENT, note="torch tells of waits on CUDA devices only"))
            continue
        step([0, 300, 337, 338, 1024], mask, device)  # loads what a process loads once
        for name, offsets in (("the same batch", [0, 300, 337, 338, 1024]), ("a new batch", [0, 12, 500, 1024])):
            waited = _waited(offsets, mask, device)
            record.add(Row("waits", f"{name} under {mask}", WRONG if waited else OK, note=waited))


def _waited(offsets: list[int], mask: Mask, device: torch.device) -> str:
    """What torch says of a step that waits; empty where it does not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(offsets, mask, device)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def step(offsets: list[int], mask: Mask, device: torch.device) -> None:
    """A batch is planned, its rows are turned, and attention runs forward and backward."""
    handler = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=offsets, mask=mask)
    q, k, v = (torch.randn(1024, n, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for n in (8, 4, 4))
    table = handler.get_emb_on_this_cp_rank(torch.randn(1024, 1, 1, 64, device=device))
    out = handler.core_attn(None, handler.rope(q, table), handler.rope(k, table), v)
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
