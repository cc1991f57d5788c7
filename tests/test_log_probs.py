"""Log-probabilities of labels against a float64 softmax over all columns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cphandler import InvalidTypeError, InvalidValueError, TokenLogProbs, token_log_probs
from cphandler.testing import RankPool, partition_group
from cphandler.testing.tolerance import assert_close
from cphandler.training.log_probs import CHUNK_BYTES

SPLIT = {2: ((0, 2), (1, 3)), 3: ((1, 2, 3),), 4: ((0, 1, 2, 3),)}
TOKENS, COLUMNS, REAL = 23, 24, 19


def drawn(dtype: torch.dtype, columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels with some ignored, and the gradients of both results."""
    generator = torch.Generator().manual_seed(3)
    logits = (4 * torch.randn(TOKENS, columns, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, REAL, (TOKENS,), generator=generator)
    labels[[0, 7, 22]] = torch.tensor([-100, -1, -100])
    grads = (torch.randn(TOKENS, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits, labels, *grads


def truth(
    logits: Tensor, labels: Tensor, grads: tuple[Tensor, Tensor], temperature: float, real: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, entropy, likeliest token, and the gradient of the logits, in float64."""
    leaf = logits.double().requires_grad_()
    log_p = torch.log_softmax(leaf[:, :real] / temperature, dim=-1)
    kept = labels >= 0
    chosen = log_p.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1) * kept
    entropy = -(log_p.exp() * log_p).sum(-1) * kept
    (grad,) = torch.autograd.grad((chosen * grads[0] + entropy * grads[1]).sum(), leaf)
    return chosen.detach(), entropy.detach(), logits[:, :real].argmax(-1), grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 100])
def test_one_rank(dtype: torch.dtype, chunk_size: int | None) -> None:
    logits, labels, *grads = drawn(dtype)
    leaf = logits.clone().requires_grad_()
    result = token_log_probs(
        leaf, labels, temperature=1.7, chunk_size=chunk_size, vocab_size=REAL, return_entropy=True, return_top1=True
    )
    assert isinstance(result, TokenLogProbs)
    assert result.entropy is not None
    total = (result.log_probs * grads[0].to(result.log_probs.dtype)).sum()
    total = total + (result.entropy * grads[1].to(result.entropy.dtype)).sum()
    (grad,) = torch.autograd.grad(total, leaf)
    log_probs, entropy, top1, expected = truth(logits, labels, (grads[0], grads[1]), 1.7, REAL)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(result.log_probs, log_probs, dtype=exact, what="log-probabilities")
    assert_close(result.entropy, entropy, dtype=exact, what="entropy")
    assert_close(grad, expected, dtype=dtype, what="gradient")
    assert grad.dtype == dtype
    assert torch.equal(result.top1, top1)
    assert (grad[labels < 0] == 0).all()
    assert (grad[:, REAL:] == 0).all()


def test_the_bits_do_not_depend_on_the_chunks() -> None:
    logits, labels, *_ = drawn(torch.bfloat16)
    whole = token_log_probs(logits, labels)
    assert torch.equal(whole, token_log_probs(logits, labels, chunk_size=1))
    assert torch.equal(whole.view(1, TOKENS), token_log_probs(logits.unsqueeze(0), labels.unsqueeze(0), chunk_size=4))


def test_what_is_ignored_may_hold_anything() -> None:
    logits, labels, *_ = drawn(torch.float32)
    logits[labels < 0] = float("nan")
    leaf = logits.clone().requires_grad_()
    result = token_log_probs(leaf, labels, return_entropy=True)
    assert torch.isfinite(result.log_probs).all()
    assert torch.isfinite(result.entropy).all()
    result.log_probs.sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    assert (leaf.grad[labels < 0] == 0).all()


def test_no_tokens() -> None:
    leaf = torch.empty(0, 9, requires_grad=True)
    result = token_log_probs(leaf, torch.empty(0, dtype=torch.int64))
    assert result.shape == (0,)
    result.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 9)


def split(size: int, dtype: torch.dtype, *, exact: bool) -> None:
    group = partition_group(SPLIT[size])
    if group is None:
        return
    rank = dist.get_rank(group)
    logits, labels, *grads = drawn(dtype)
    own = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    options: dict[str, Any] = {"temperature": 0.6, "vocab_size": REAL, "return_entropy": True, "return_top1": True}
    result = token_log_probs(own, labels, tp_group=group, chunk_size=4, exact=exact, **options)
    kind = result.log_probs.dtype
    total = (result.log_probs * grads[0].to(kind)).sum() + (result.entropy * grads[1].to(kind)).sum()
    (grad,) = torch.autograd.grad(total, own)
    log_probs, entropy, top1, expected = truth(logits, labels, (grads[0], grads[1]), 0.6, REAL)
    close = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(result.log_probs, log_probs, dtype=close, what="log-probabilities")
    assert_close(result.entropy, entropy, dtype=close, what="entropy")
    assert torch.equal(result.top1, top1)
    assert_close(grad, expected.chunk(size, dim=-1)[rank], dtype=dtype, what="gradient")
    alone = token_log_probs(logits, labels, **options)
    if exact:
        assert torch.equal(result.log_probs, alone.log_probs), "one rank's bits"
        assert torch.equal(result.entropy, alone.entropy)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_split_vocabulary(ranks: RankPool, size: int, *, exact: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ranks.run(split_, size, dtype, exact)


def split_(size: int, dtype: torch.dtype, exact: bool) -> None:
    split(size, dtype, exact=exact)


def test_no_copy_of_all_logits_in_float32() -> None:
    """What autograd keeps is the logits and three numbers a token; a chunk has 64 MiB at most."""
    leaf = torch.zeros(512, 2048, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_log_probs(leaf, torch.zeros(512, dtype=torch.int64), chunk_size=8)
    assert sum(x.nbytes for x in kept if x.data_ptr() != leaf.data_ptr()) < 0.01 * leaf.nbytes * 2
    assert CHUNK_BYTES == 64 * 2**20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"logits": torch.zeros(3, 4, dtype=torch.int64)},
            InvalidTypeError,
            "logits must be floating point; got torch.int64",
        ),
        ({"labels": torch.zeros(3)}, InvalidTypeError, "labels must be integers; got torch.float32"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, InvalidValueError, "labels [2], logits [3, 4]"),
        ({"temperature": 0.0}, InvalidValueError, "temperature must be above 0 and finite; got 0.0"),
        ({"chunk_size": 0}, InvalidValueError, "chunk_size must be at least 1; got 0"),
        ({"vocab_size": 5}, InvalidValueError, "got 5 of 4 columns"),
        ({"labels": torch.tensor([0, 4, 1])}, InvalidValueError, "labels must be below the vocabulary's size"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"logits": torch.zeros(3, 4), "labels": torch.zeros(3, dtype=torch.int64), **options}
    with pytest.raises(error, match=re.escape(message)):
        token_log_probs(**given)
