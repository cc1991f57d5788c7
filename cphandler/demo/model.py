"""A small GPT: rope, grouped-query attention, RMSNorm, SwiGLU. Written for one rank; the handler does the rest.

T tokens of this rank, N query heads, G key heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cphandler import ContextParallelHandler, CoreAttention


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; ``mtp_depth`` more layers predict as many further tokens."""

    vocabulary: int = 256
    layers: int = 4
    width: int = 128
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 352
    rope_base: float = 10000.0
    mtp_depth: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.width // self.heads


class Attention(nn.Module):
    """Grouped-query attention over whatever rows this rank has."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.core_attention = CoreAttention()

    def forward(self, x: Tensor, freqs: Tensor, cp_handler: ContextParallelHandler) -> Tensor:
        """``[T, width]`` to ``[T, width]``."""
        q = self.query(x).view(len(x), self.config.heads, -1)
        k = self.key(x).view(len(x), self.config.kv_heads, -1)
        v = self.value(x).view(len(x), self.config.kv_heads, -1)
        q, k = cp_handler.rope(q, freqs), cp_handler.rope(k, freqs)
        out = cp_handler.core_attn(self.core_attention, q, k, v)
        projected: Tensor = self.output(out.flatten(1))
        return projected


class SwiGLU(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, width]`` to ``[T, width]``."""
        result: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return result


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.feed_forward = SwiGLU(config)

    def forward(self, x: Tensor, freqs: Tensor, cp_handler: ContextParallelHandler) -> Tensor:
        """``[T, width]`` to ``[T, width]``."""
        x = x + self.attention(self.attention_norm(x), freqs, cp_handler)
        result: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return result


class FurtherToken(nn.Module):
    """One depth of multi-token prediction (DeepSeek-V3, section 2.2): what is known of a row, and the token ahead."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.state_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.token_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.joined = nn.Linear(2 * config.width, config.width, bias=False)
        self.layer = Layer(config)

    def forward(self, x: Tensor, ahead: Tensor, freqs: Tensor, cp_handler: ContextParallelHandler) -> Tensor:
        """``[T, width]`` and the embeddings of the tokens ahead to ``[T, width]``."""
        both = torch.cat([self.state_norm(x), self.token_norm(ahead)], dim=-1)
        result: Tensor = self.layer(self.joined(both), freqs, cp_handler)
        return result


class GPT(nn.Module):
    """A decoder over bytes."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.further = nn.ModuleList(FurtherToken(config) for _ in range(config.mtp_depth))

    def rotary(self, rows: int, device: torch.device) -> Tensor:
        """``[rows, D]`` angles of positions 0 to rows - 1, both halves."""
        channels = torch.arange(0, self.config.head_dim, 2, device=device, dtype=torch.float64)
        inverse_frequencies = self.config.rope_base ** (-channels / self.config.head_dim)
        angles = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * inverse_frequencies
        return torch.cat([angles, angles], dim=-1)

    def forward(self, tokens: Tensor, cp_handler: ContextParallelHandler, labels: Tensor | None = None) -> Tensor:
        """Local tokens ``[T]`` to local logits.

        Args:
            tokens: ``[T]``.
            cp_handler: the batch's.
            labels: ``[1 + depths, T]`` the tokens ahead, for the further depths.

        Returns:
            ``[T, vocabulary]``, or with labels ``[1 + depths, T, vocabulary]``.
        """
        x = self.embedding(tokens)
        table = self.rotary(cp_handler.get_rotary_seq_len(), x.device)
        freqs = cp_handler.get_emb_on_this_cp_rank(table)
        for layer in self.layers:
            x = layer(x, freqs, cp_handler)
        if labels is None:
            logits: Tensor = self.head(self.norm(x))
            return logits
        states = [x]
        for depth, predicted in zip(self.further, labels, strict=False):
            ahead = self.embedding(predicted.clamp(min=0)) * (predicted >= 0).unsqueeze(-1)
            states.append(depth(states[-1], ahead, freqs, cp_handler))
        return torch.stack([self.head(self.norm(state)) for state in states])
