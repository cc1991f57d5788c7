"""Packages that bring kernels: missing, broken, of another version, without a GPU; and what explains the choice."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cphandler import (
    Attention,
    Availability,
    ContextParallelHandler,
    CPConfig,
    InvalidValueError,
    LayoutHandler,
    MissingPackageError,
    SlidingWindow,
    UnsupportedError,
    available_cp_handlers,
    get_cp_handler_cls,
    register_kernel,
)
from cphandler.handler import factory
from cphandler.kernels import Asked, candidates, flash_attn_2, flash_attn_3, flash_attn_4, packages, select_kernel
from cphandler.kernels.packages import Package
from cphandler.kernels.reference import ReferenceKernel
from cphandler.testing import assert_close, relative_error
from tests.doubles.packages import MODULES, Modules, flash_attn_3_module, flash_attn_3_older_module, kernels_on_cpu

ROOT = Path(__file__).parent.parent
KERNELS = {"flash_attn_2": flash_attn_2, "flash_attn_3": flash_attn_3, "flash_attn_4": flash_attn_4}
ORDER = ("flash_attn_3", "flash_attn_4", "flash_attn_2", "torch")
"""As ``auto`` tries them."""


def handler(kernel: str = "auto", **settings: Any) -> ContextParallelHandler:
    config = CPConfig(kernel=kernel, **settings)
    return get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 5, 12], config=config)


def attended(kernel: str, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(12, heads, 16, generator=generator).bfloat16() for heads in (4, 2, 2))
    out = handler(kernel).core_attn(None, q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    return out


def without(module: str, function: str) -> Callable[[], dict[str, Any]]:
    """The functions of a module but one."""
    return lambda: {name: call for name, call in MODULES[module][2]().items() if name != function}


def with_other(module: str, function: str, call: Any) -> Callable[[], dict[str, Any]]:
    return lambda: MODULES[module][2]() | {function: call}


def without_keyword(module: str, function: str) -> Callable[[], dict[str, Any]]:
    """The functions of a module, one of them without ``deterministic``."""
    call = MODULES[module][2]()[function]

    def older(*args: Any, **options: Any) -> Any:
        return call(*args, **options)

    known = inspect.signature(call)
    kept = [parameter for name, parameter in known.parameters.items() if name != "deterministic"]
    older.__signature__ = known.replace(parameters=kept)  # type: ignore[attr-defined]
    return with_other(module, function, older)


FAULTS: dict[str, tuple[Callable[[Package, str, str], Any], str]] = {
    "missing": (lambda package, version, call: None, "is not installed"),
    "too old": (lambda package, version, call: ("1.9", MODULES[package.module][2]), "1.9: only versions from"),
    "too new": (lambda package, version, call: ("9.0.1", MODULES[package.module][2]), "9.0.1: only versions from"),
    "no version": (lambda package, version, call: ("", MODULES[package.module][2]), "of no version: only versions"),
    "raises": (
        lambda package, version, call: (version, RuntimeError("built for another CUDA")),
        r"cannot be imported \(RuntimeError: built for another CUDA\)",
    ),
    "a CPU-only build": (
        lambda package, version, call: (version, ModuleNotFoundError("No module named 'flash_attn_2_cuda'")),
        "cannot be imported .*flash_attn_2_cuda",
    ),
    "a library is missing": (
        lambda package, version, call: (version, OSError("libcudart.so.12: cannot open shared object file")),
        "cannot be imported .*libcudart",
    ),
    "ends the program": (lambda package, version, call: (version, SystemExit(3)), "cannot be imported .SystemExit: 3"),
    "a function is missing": (
        lambda package, version, call: (version, without(package.module, call)),
        "{module} has no {call}; ",
    ),
    "a keyword is missing": (
        lambda package, version, call: (version, without_keyword(package.module, call)),
        "{module}.{call} has no deterministic; ",
    ),
    "a function without a signature": (
        lambda package, version, call: (version, with_other(package.module, call, dict.__init_subclass__)),
        "{module}.{call} (cannot be read|has no softmax_scale)",
    ),
}
"""What a package is replaced by, as version and functions, and what is said of it."""


def installed(fault: str, name: str) -> tuple[Modules, str]:
    """All packages, one of them at fault, and what must be said of that."""
    package, call = KERNELS[name].PACKAGE, list(KERNELS[name].NEEDS)[-1]
    make, told = FAULTS[fault]
    found = make(package, MODULES[package.module][1], call)
    modules: Modules = {path: entry for path, entry in MODULES.items() if path != package.module}
    if found is not None:
        modules[package.module] = (package.distributions[0], *found)
    return modules, told.replace("{module}", package.module).replace("{call}", call)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_package_at_fault(fault: str, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Named, it is refused with its package and the line that installs it; ``auto`` goes on without a word."""
    modules, told = installed(fault, name)
    package = KERNELS[name].PACKAGE
    others = [other for other in ORDER if other != name]
    x = torch.empty(1, 4, 2, 16, dtype=torch.bfloat16)
    with kernels_on_cpu(modules=modules, as_they_are=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnsupportedError, match=told) as caught:
            attended(name)
        assert re.search("|".join((*package.distributions, re.escape(package.module))), str(caught.value))
        assert package.install in str(caught.value)
        assert package.install in str(caught.value.fix)
        assert select_kernel("auto", x, x, x) == others[0]
        explained = handler().explain()
        assert explained.kernel == others[0]
        (broken,) = (one for one in explained.candidates if one.name == name)
        assert re.search(told.removesuffix("; "), str(broken.refusal))
        assert broken.fix == package.install
        assert package.install in str(explained)
        taken = attended("auto")
    assert_close(taken, attended("reference"))
    assert capfd.readouterr() == ("", "")


def test_nothing_is_at_fault() -> None:
    """The negative control of the above: the same packages whole are taken, one after the other."""
    x = torch.empty(1, 4, 2, 16, dtype=torch.bfloat16)
    for i, name in enumerate(ORDER[:3]):
        left = {KERNELS[other].PACKAGE.module for other in ORDER[i:3]}
        with kernels_on_cpu(modules={path: MODULES[path] for path in left}, as_they_are=True):
            assert select_kernel("auto", x, x, x) == name
            assert select_kernel(name, x, x, x) == name
            assert handler().explain().kernel == handler(name).explain().kernel == name
            assert_close(attended("auto"), attended("reference"))


@pytest.mark.parametrize("capability", [None, 75, 130])
@pytest.mark.parametrize("name", KERNELS)
def test_no_gpu_for_a_package(name: str, capability: int | None) -> None:
    """Whole packages without a GPU, or with another one; installing anything again would not help."""
    x = torch.empty(1, 4, 2, 16, dtype=torch.bfloat16)
    with kernels_on_cpu(capability, as_they_are=True):
        told = f"{name.replace('_attn_', '-attn ')} (needs a CUDA device|runs on compute capability)"
        with pytest.raises(UnsupportedError, match=told) as caught:
            attended(name)
        assert ("run where there is one" if capability is None else "use another device") in str(caught.value.fix)
        assert select_kernel("auto", x, x, x) == "torch"
        assert "pip" not in str(handler(name).explain())


def test_signatures_that_cannot_be_read() -> None:
    """Compiled code tells no signature, and a module may raise when a name of it is asked for."""
    made: Modules = {**MODULES}
    path = "flash_attn_interface"
    made[path] = ("flash_attn_3", "3.0.0", with_other(path, "_flash_attn_backward", type))
    with kernels_on_cpu(modules=made, as_they_are=True):
        assert "_flash_attn_backward cannot be read (ValueError" in handler().explain().reason("flash_attn_3")

    def raising(name: str) -> Any:
        raise RuntimeError(f"no {name} without a licence")

    made[path] = ("flash_attn_3", "3.0.0", lambda: {"__getattr__": raising})
    with kernels_on_cpu(modules=made, as_they_are=True):
        assert "without a licence" in handler().explain().reason("flash_attn_3")
        assert handler().explain().kernel == "flash_attn_4"


def test_metadata_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise KeyError("Version")

    monkeypatch.setattr(packages, "version", version)
    packages.installed.cache_clear()
    packages.missing.cache_clear()
    try:
        assert "of metadata that cannot be read (KeyError)" in str(packages.missing(flash_attn_2.PACKAGE))
    finally:
        packages.installed.cache_clear()
        packages.missing.cache_clear()


def test_why_the_others_are_not_taken() -> None:
    """Every reason at once: dtype, head dim, softcap, dropout, bits, preference, package, device."""
    with kernels_on_cpu(as_they_are=True):
        explained = handler().explain()
        assert explained.kernel == "flash_attn_3"
        assert "highest preference, 28" in explained.why
        assert explained.reason("flash_attn_2") == "takes the call too; its preference is lower, 24"
        assert handler("torch").explain().reason("flash_attn_2").endswith("CPConfig.kernel names another one")
        assert "CPConfig.kernel names it" in handler("torch").explain().why
        single = handler().explain(dtype=torch.float32)
        assert single.kernel == "torch"
        assert single.reason("flash_attn_4").startswith("refuses: dtype torch.float32; it takes torch.float16")
        assert "refuses: head dim 264: at most 256" in handler().explain(head_dim=64, value_head_dim=264).reason(
            "flash_attn_3"
        )
        assert handler().explain(softcap=True).reason("torch") == "refuses: softcap"
        assert handler().explain(dropout=True).reason("flash_attn_3").startswith("refuses: dropout: its generator")
        assert handler().explain(dropout=True).kernel == "reference"
        strict = handler(deterministic=True).explain()
        assert "torch.use_deterministic_algorithms" in strict.reason("double_torch_flash")
        assert "deterministic=True" in str(strict)
        refused = handler("flash_attn_2").explain(dropout=True)
        assert refused.kernel is None
        assert "flash_attn_2 refuses: dropout" in refused.why
    plain_one = handler().explain()
    assert plain_one.kernel == "torch"
    assert "LocalHandler, comm type none, 1 rank: layout contiguous, exchange none" in str(plain_one)
    assert "bfloat16 on cpu, 8 heads of 128, under" in str(plain_one)
    assert "8 over 2 heads of 64 and 32, softcap" in str(
        handler().explain(kv_heads=2, head_dim=64, value_head_dim=32, softcap=True)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is without a GPU")
def test_a_device_that_is_not_here() -> None:
    explained = handler().explain(device="cuda")
    assert explained.kernel is None
    assert "sees no cuda device; run where there is one" in explained.why
    assert {one.name for one in explained.candidates} >= {"torch", "torch_flash", "flash_attn_2", "reference"}
    assert all(one.refusal for one in explained.candidates)
    assert handler().explain(device="meta").kernel == "reference"
    with pytest.raises(InvalidValueError, match="no kernel 'flash_attn_2' for cpu tensors"):
        handler("flash_attn_2").explain()


def test_what_explain_says_is_what_core_attn_does() -> None:
    """Over dtypes, head dims and options: the kernel that runs is the one that was told."""
    ran: list[str] = []

    def recorded(cls: type[Any]) -> type[Any]:
        def forward(self: Any, *args: Any) -> None:
            ran.append(self.name)
            super(made, self).forward(*args)

        made = type(cls.__name__, (cls,), {"forward": forward})
        return made

    with kernels_on_cpu(as_they_are=True):
        for preference, name in ((50, "first"), (40, "second")):
            cls = type(name, (recorded(ReferenceKernel),), {"name": name, "refuses": {"softcap": "softcap"}})
            cls.misfit = lambda self, q, k, v: "odd" if self.name == "first" and q.shape[-1] != 8 else None
            register_kernel(name, "cpu", cls, preference=preference)
        for head_dim, softcap, expected in ((8, False, "first"), (16, False, "second"), (8, True, "flash_attn_3")):
            ran.clear()
            x = torch.randn(12, 2, head_dim).bfloat16()
            handler().core_attn(None, x, x, x, softcap=3.0 if softcap else None)
            assert handler().explain(heads=2, head_dim=head_dim, softcap=softcap).kernel == expected
            assert ran == ([expected] if expected in ("first", "second") else [])


def test_a_kernel_that_raises_when_it_is_asked() -> None:
    """What a registered kernel raises is raised by the call, and told by what explains it."""

    class Broken(ReferenceKernel):
        def unusable(self) -> str | None:
            raise OSError("a driver is missing")

    class Unhappy(ReferenceKernel):
        def unusable(self) -> str | None:
            return "no licence is installed; ask its vendor"

    with kernels_on_cpu():
        register_kernel("broken", "cpu", Broken, preference=99)
        register_kernel("unhappy", "cpu", Unhappy, preference=98)
        register_kernel("nowhere", "cpu", "no_such_package:Kernel", preference=3)
        with pytest.raises(OSError, match="a driver is missing"):
            attended("auto")
        explained = handler().explain()
        assert explained.kernel is None
        assert explained.why == "a call raises OSError: a driver is missing"
        assert explained.reason("unhappy") == "no licence is installed"
        assert "to have it: ask its vendor" in str(explained)
        assert "MissingPackageError" in explained.reason("nowhere")
        assert "install the package that holds 'no_such_package'" in str(explained)
        assert all(one.error is None for one in explained.candidates), "an explanation keeps no frames alive"


def test_candidates_are_asked_in_order_and_no_more_than_needed() -> None:
    asked: list[str] = []

    class First(ReferenceKernel):
        def unusable(self) -> str | None:
            asked.append("first")
            return None

    class Second(ReferenceKernel):
        def unusable(self) -> str | None:
            asked.append("second")
            return None

    x = torch.empty(1, 4, 2, 16)
    with kernels_on_cpu():
        register_kernel("second", "cpu", Second, preference=98)
        register_kernel("first", "cpu", First, preference=99)
        assert select_kernel("auto", x, x, x) == "first"
        assert asked == ["first"]
        assert [one.name for one in candidates("cpu", Asked(x, x, x))][:2] == asked[1:] == ["first", "second"]


def test_what_a_caller_does_to_an_explanation_changes_nothing() -> None:
    one = handler()
    explained = one.explain()
    before = str(explained)
    with pytest.raises(dataclasses.FrozenInstanceError):
        explained.kernel = "mine"  # type: ignore[misc]
    object.__setattr__(explained, "kernel", "mine")
    object.__setattr__(explained, "candidates", ())
    assert str(one.explain()) == before
    assert one.explain() == one.explain()
    with pytest.raises(InvalidValueError, match="no kernel of this name is passed over"):
        one.explain().reason("torch")


class Seat:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


class EngineAttention(Attention):
    engine = "the engine"


class EngineHandler(LayoutHandler):
    attention_cls = EngineAttention


class OwnHandler(LayoutHandler):
    def core_attn(self, attn_mod: Any, query: Any, key: Any, value: Any, **options: Any) -> Any:
        return query


def test_the_algorithm_is_told() -> None:
    batch: dict[str, Any] = {"qkv_format": "thd", "cu_seqlens_q": [0, 4, 8], "cp_group": Seat()}
    told = {name: get_cp_handler_cls(name)(**batch).explain().algorithm[:5] for name in ("ring", "ulysses", "p2p")}
    assert told == {
        "ring": ("RingHandler", "ring", 2, "zigzag", "ring"),
        "ulysses": ("UlyssesHandler", "a2a", 2, "contiguous", "none"),
        "p2p": ("P2PHandler", "p2p", 2, "zigzag", "p2p"),
    }
    layers = get_cp_handler_cls("local", ["p2p", "a2a", "ring", "p2p"])(**batch).explain().algorithm
    assert layers.exchange == "p2p, none, ring"
    assert layers.backend == "LayeredHandler P2PHandler UlyssesHandler RingHandler P2PHandler"
    crossed = get_cp_handler_cls("p2p")(
        **batch, cu_seqlens_kv=[0, 4, 8], cross_attention=True, layout=("zigzag", "contiguous")
    )
    assert crossed.explain().algorithm.layout == "zigzag, contiguous"
    for cls, name in ((EngineHandler, "the engine"), (OwnHandler, "OwnHandler")):
        explained = cls(qkv_format="thd", cu_seqlens_q=[0, 4]).explain()
        assert explained.kernel is None
        assert not explained.candidates
        assert explained.why.startswith(f"{name} computes attention")


def test_backends_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module that raises, one that ends the program, one that needs a package, one that says how to get it."""
    (tmp_path / "raising.py").write_text("raise RuntimeError('built for another CUDA')")
    (tmp_path / "ending.py").write_text("import sys; sys.exit('no licence')")
    (tmp_path / "needing.py").write_text("import no_such_engine")
    (tmp_path / "telling.py").write_text(
        "from cphandler import MissingPackageError as E\nraise E('an engine is missing', got='nothing', fix='get it')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(factory, "_HANDLERS", factory._HANDLERS.__class__("backend", lambda: ContextParallelHandler, {
        ("local", None): "cphandler.backends.local:LocalHandler",
        **{(name, None): f"{name}:Handler" for name in ("raising", "ending", "needing", "telling")},
    }))  # fmt: skip
    found = {one.backend: one for one in available_cp_handlers(explain=True)}
    assert found.keys() >= {"local", "raising", "ending", "needing", "telling"}
    assert found["local"] == Availability("local", None)
    assert found["local"].usable
    assert not found["raising"].usable
    assert "RuntimeError: built for another CUDA" in str(found["raising"])
    assert "SystemExit: no licence" in str(found["ending"].reason)
    assert "no_such_engine" in str(found["needing"].fix)
    assert found["telling"] == Availability("telling", None, "an engine is missing; got nothing", "get it")
    assert all(one.fix for one in found.values() if not one.usable)
    assert [(one.backend, one.comm_type) for one in found.values()] == available_cp_handlers()
    with pytest.raises(MissingPackageError):
        get_cp_handler_cls("needing")


def test_a_release_comes_after_its_pre_releases() -> None:
    ordered = ["2.7.0", "2.8.3", "2.8.4", "4.0.0b9", "4.0.0b36", "4.0.0", "4.1.0"]
    assert sorted(ordered, key=packages.numbers) == ordered
    assert packages.numbers("2.8.3.post2") == packages.numbers("2.8.3+cu13")
    assert packages.numbers("4.0.0") >= flash_attn_4.PACKAGE.oldest
    assert packages.shown(flash_attn_4.PACKAGE.oldest) == "4.0.0b36"


@pytest.mark.parametrize("module", [flash_attn_3_module, flash_attn_3_older_module])
def test_states_of_flash_attn_3(module: Any) -> None:
    """An older one asks for all that it knows, most of which is nothing here."""
    generator = torch.Generator().manual_seed(5)
    q, k, v, grad = (torch.randn(40, n, 16, generator=generator).bfloat16() for n in (4, 2, 2, 4))
    results = []
    with kernels_on_cpu(90, {**MODULES, "flash_attn_interface": ("flash_attn_3", "3.0.0", module)}):
        for kernel in ("double_flash_attn_3", "reference"):
            made = get_cp_handler_cls("local")(
                qkv_format="thd", cu_seqlens_q=[0, 11, 40], mask=SlidingWindow(7), config=CPConfig(kernel=kernel)
            )
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = made.core_attn(None, *leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found.double(), expected.double()) < 0.01
