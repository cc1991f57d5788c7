"""Real ranks that share one GPU over gloo: attention against float64, a training run against one rank's."""

from __future__ import annotations

import torch
import torch.distributed as dist

from benchmarks.gpu.rows import OK, WRONG, Record, Row
from cphandler import get_cp_handler_cls
from cphandler.demo.corpus import packed_batches
from cphandler.demo.training import RunSettings, train
from cphandler.testing import RankPool, dense_attention, partition_group

BACKENDS = ("ring", "p2p", "all_gather", "ulysses", "usp")
LENGTHS = (300, 37, 1, 512, 174)
LIMIT = 300.0


def check_ranks(record: Record, device: torch.device, *, small: bool) -> None:
    """Every backend on 2 and 4 ranks."""
    for size in (2,) if small else (2, 4):
        with RankPool(size, timeout=LIMIT) as pool:
            for backend in BACKENDS:
                if backend == "usp" and size < 4:
                    continue
                for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)):
                    worst = max(pool.run(attention_error, backend, size, dtype, device.type))
                    what = f"{backend} {str(dtype)[6:]} on {size} ranks of one device"
                    record.add(Row("ranks", what, OK if worst <= bound else WRONG, worst))


def attention_error(backend: str, size: int, dtype: torch.dtype, kind: str) -> float:
    """The largest relative L2 error of this rank's output and gradients."""
    group = partition_group((tuple(range(size)),))
    device, rows = torch.device(kind), sum(LENGTHS)
    offsets = [sum(LENGTHS[:i]) for i in range(len(LENGTHS) + 1)]
    handler = get_cp_handler_cls(backend)(cp_group=group, qkv_format="thd", cu_seqlens_q=torch.tensor(offsets))
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randn(rows, n, 64, generator=generator).to(dtype) for n in (8, 4, 4, 8)]
    leaves = [handler.dispatch(x.to(device), 0).detach().requires_grad_() for x in drawn[:3]]
    out = handler.core_attn(None, *leaves)
    grads = torch.autograd.grad(out, leaves, handler.dispatch(drawn[3].to(device), 0))
    q, k, v = (x.double().requires_grad_() for x in drawn[:3])
    whole = dense_attention(q, k, v, _visible(offsets), qkv_format="thd")[0]
    expected = [whole.detach(), *torch.autograd.grad(whole, (q, k, v), drawn[3].double())]
    return max(
        float((a.double().cpu() - handler.dispatch(e, 0)).norm() / handler.dispatch(e, 0).norm().clamp_min(1e-12))
        for a, e in zip([out.detach(), *grads], expected, strict=True)
    )


def _visible(offsets: list[int]) -> torch.Tensor:
    rows = torch.arange(offsets[-1])
    document = torch.searchsorted(torch.tensor(offsets[1:]), rows, right=True)
    return (document[:, None] == document[None]) & (rows[:, None] >= rows[None])


def check_demo(record: Record, device: torch.device, *, small: bool) -> None:
    """The demo's model trained on packed real documents, two ranks beside one."""
    steps, tokens = (3, 241) if small else (10, 2048)
    kind = device.type
    with RankPool(2, timeout=LIMIT) as pool:
        for backend in ("ring", "ulysses"):
            losses, gradient = pool.run(demo_differences, backend, steps, tokens, kind)[0]
            verdict = OK if losses <= 1e-4 and gradient <= 1e-5 else WRONG
            note = f"losses differ by {losses:.1e}, the first gradient by {gradient:.1e}"
            record.add(Row("demo", f"{backend} on 2 ranks, {steps} steps of {tokens}", verdict, gradient, note=note))


def demo_differences(backend: str, steps: int, tokens: int, kind: str) -> tuple[float, float]:
    """Largest difference of the losses, and relative difference of the first gradient, to one rank."""
    batches = packed_batches(steps, tokens)
    one = train(RunSettings(dtype="float32"), batches, device=kind)
    settings = RunSettings(backend=backend, cp_size=dist.get_world_size(), dtype="float32")
    many = train(settings, batches, group=partition_group((tuple(range(dist.get_world_size())),)), device=kind)
    losses = max(abs(a - b) for a, b in zip(one.losses, many.losses, strict=True))
    first = one.first_gradient.double()
    return losses, float((many.first_gradient.double() - first).norm() / first.norm())
