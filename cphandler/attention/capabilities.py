"""What a handler class can do: one table per class, behind its checks, the documentation and the tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cphandler.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from cphandler.layouts.layout import LAYOUTS, LEVEL_LAYOUTS, Layout
from cphandler.tokens.masks import MASKS, Mask

FEATURES: dict[str, str] = {
    "softmax_scale": "a factor on the scores",
    "softcap": "capped scores",
    "sinks": "attention sinks",
    "dropout": "attention dropout",
    "return_lse": "return_lse",
    "return_max_logit": "return_max_logit",
    "value_head_dim": "values of another head dim than queries",
    "key_padding_mask": "key_padding_mask",
    "cross_attention": "cross attention",
    "own_attention": "a callable attn_mod",
    "gradient_wire_dtype": "CPConfig.gradient_wire_dtype",
    "ulysses_degree": "CPConfig.ulysses_degree",
}
"""Features by name, each as an error calls it."""

_INSTEAD: dict[str, str] = {
    "own_attention": "pass attn_mod=None or a CoreAttention, or use the ulysses backend, which has whole documents",
    "gradient_wire_dtype": "leave it None, or use the p2p or all_gather backend, where each gradient travels once",
    "ulysses_degree": "leave it None, or use the usp backend",
}

FORMATS = ("sbhd", "bshd", "thd")

COMMON = frozenset(FEATURES) - {"own_attention", "gradient_wire_dtype", "ulysses_degree"}
"""What the attention loop of the library computes, whatever moves the keys."""


@dataclass(frozen=True)
class Capabilities:
    """What a handler class serves.

    Attributes:
        layouts: names of layouts; those that callers build are tried wherever their spans have one stride. Empty for a
            class that brings its own.
        formats: values of ``qkv_format``.
        features: names out of :data:`FEATURES`.
        instead: the way out where a feature is missing, by name.
        masks: names of masks; None for all of them, a caller's own too, as it is where masks are bands: these are all
            alike.
        cross_masks: of those that ``masks`` names, the ones that are served across two streams; None for all of them.

    Raises:
        InvalidTypeError: another collection than a tuple, a tuple, a frozenset and a mapping.
        InvalidValueError: a name that means nothing.
    """

    layouts: tuple[str, ...] = LEVEL_LAYOUTS
    formats: tuple[str, ...] = FORMATS
    features: frozenset[str] = COMMON
    instead: Mapping[str, str] | None = None
    masks: tuple[str, ...] | None = None
    cross_masks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_names("layouts", self.layouts, tuple, LAYOUTS)
        _check_names("formats", self.formats, tuple, FORMATS)
        _check_names("features", self.features, frozenset, tuple(FEATURES))
        if self.instead is not None:
            _check_names("instead", self.instead, Mapping, tuple(FEATURES))
        for name, masks in (("masks", self.masks), ("cross_masks", self.cross_masks)):
            if masks is not None:
                known = tuple(mask.__name__ for mask in MASKS) if name == "masks" else self.masks or ()
                _check_names(name, masks, tuple, known)

    def serves_mask(self, mask: Mask, *, crossing: bool = False) -> bool:
        """Whether a mask is served.

        Args:
            mask: who sees whom.
            crossing: over two streams.
        """
        names = self._masks(crossing)
        return names is None or (type(mask) in MASKS and type(mask).__name__ in names)

    def _masks(self, crossing: bool) -> tuple[str, ...] | None:
        return self.masks if not crossing or self.cross_masks is None else self.cross_masks

    def require_mask(self, who: str, mask: Mask, *, crossing: bool = False) -> None:
        """Refuse a mask.

        Args:
            who: the class's name.
            mask: who sees whom.
            crossing: over two streams.

        Raises:
            UnsupportedError: one that is not served, and what is.
        """
        if not self.serves_mask(mask, crossing=crossing):
            across = " in cross attention" if crossing else ""
            raise UnsupportedError(
                f"{who} does not serve the mask {type(mask).__name__}{across}",
                fix=f"use {' or '.join(self._masks(crossing) or ())}, or a local backend (ring, p2p, all_gather, "
                "ulysses), which serves every mask",
            )

    def require(self, who: str, *features: str) -> None:
        """Refuse features that are missing.

        Args:
            who: the class's name.
            features: names out of :data:`FEATURES`.

        Raises:
            UnsupportedError: the first one that is missing, and what serves it.
        """
        for feature in features:
            if feature not in self.features:
                way_out = {**_INSTEAD, **(self.instead or {})}.get(feature, "leave it out")
                raise UnsupportedError(f"{who} does not serve {FEATURES[feature]}", fix=way_out)

    def require_format(self, who: str, qkv_format: str) -> None:
        """Refuse a format.

        Raises:
            UnsupportedError: one that is not served.
        """
        if qkv_format not in self.formats:
            raise UnsupportedError(
                f"{who} does not serve qkv_format {qkv_format!r}", fix=f"use one of {', '.join(self.formats)}"
            )

    @staticmethod
    def require_stride_one(who: str, *layouts: Layout) -> None:
        """Refuse layouts whose spans interleave, which callers may have built.

        Raises:
            UnsupportedError: a span of another stride than 1.
        """
        for layout in layouts:
            if layout.strides - {1}:
                raise UnsupportedError(
                    f"{who} needs layouts of stride 1",
                    got=repr(layout),
                    fix="use zigzag, contiguous or balanced, or the ring backend",
                )

    def require_layout(self, who: str, layout: str) -> None:
        """Refuse a layout by name.

        Raises:
            UnsupportedError: one that is not served.
        """
        if layout not in self.layouts:
            raise UnsupportedError(
                f"{who} does not serve the {layout!r} layout",
                fix="use the ulysses backend" if layout == "replicated" else f"use one of {', '.join(self.layouts)}",
            )


def _check_names(what: str, names: Any, kind: type[Any], known: tuple[str, ...]) -> None:
    if not isinstance(names, kind):
        raise InvalidTypeError(
            f"{what} must be a {kind.__name__.lower()}", got=type(names).__name__, fix=f"of {', '.join(known)}"
        )
    wrong = [name for name in names if name not in known]
    if wrong:
        raise InvalidValueError(f"no such {what}", got=repr(wrong[0]), fix=f"choose of {', '.join(known)}")
