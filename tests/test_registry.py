"""Backends, exchanges and kernels by name: three registries that behave alike, and what is registered is used."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from cphandler import (
    CPConfig,
    CPError,
    Exchange,
    InvalidTypeError,
    InvalidValueError,
    LayoutHandler,
    MissingPackageError,
    available_cp_handlers,
    get_cp_handler_cls,
    register_cp_handler,
    register_exchange,
    register_kernel,
)
from cphandler.attention import exchange as exchanges
from cphandler.attention.exchange import DirectExchange, RingExchange, get_exchange
from cphandler.handler import factory
from cphandler.kernels import get_kernel, select_kernel
from cphandler.kernels import registry as kernels
from cphandler.kernels.reference import ReferenceKernel
from cphandler.testing import RankPool, assert_close
from cphandler.testing.cases import PARTITIONS, Batch, Case
from cphandler.testing.laws import check_attention
from tests.nonsense import steady


class MyHandler(LayoutHandler):
    exchange = "ring"


class MyExchange(RingExchange):
    pass


class MyKernel(ReferenceKernel):
    name = "mine"


class Kind(NamedTuple):
    """One of the three registries, spoken to alike."""

    register: Callable[[Any, Any], None]
    find: Callable[[str], Any]
    mine: type[Any]
    base: str
    taken: str


KINDS = {
    "backend": Kind(
        lambda name, target: register_cp_handler(name, None, target), get_cp_handler_cls, MyHandler,
        "ContextParallelHandler", "local",
    ),
    "exchange": Kind(register_exchange, get_exchange, MyExchange, "Exchange", "ring"),
    "kernel": Kind(
        lambda name, target: register_kernel(name, "cpu", target), lambda name: type(get_kernel(name, "cpu")), MyKernel,
        "Kernel", "torch",
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it: ``auto`` considers every kernel."""
    for module, name in ((factory, "_HANDLERS"), (exchanges, "_EXCHANGES"), (kernels, "_KERNELS")):
        monkeypatch.setattr(module, name, copy.deepcopy(getattr(module, name)))
    monkeypatch.setattr(kernels, "_PREFERENCES", dict(kernels._PREFERENCES))
    get_kernel.cache_clear()
    yield
    get_kernel.cache_clear()


def path_of(thing: type[Any]) -> str:
    return f"{thing.__module__}:{thing.__qualname__}"


def test_a_class_or_where_it_is(kind: Kind) -> None:
    kind.register("mine", kind.mine)
    assert kind.find("mine") is kind.mine
    kind.register("also mine", path_of(kind.mine))
    assert kind.find("also mine") is kind.mine


def test_the_same_target_again(kind: Kind) -> None:
    for first in (kind.mine, path_of(kind.mine)):
        name = f"from {first}"
        for again in (first, kind.mine, path_of(kind.mine), kind.mine):
            kind.register(name, again)
            assert kind.find(name) is kind.mine


def test_a_taken_name(kind: Kind) -> None:
    built_in = kind.find(kind.taken)
    with pytest.raises(InvalidValueError, match=r"already registered; got .*; choose another name"):
        kind.register(kind.taken, kind.mine)
    assert kind.find(kind.taken) is built_in
    kind.register("mine", kind.mine)
    anew = type(kind.mine.__name__, (kind.mine,), {"__module__": kind.mine.__module__})
    assert path_of(anew) == path_of(kind.mine)
    for other in (anew, "somewhere.else_:Thing"):
        with pytest.raises(InvalidValueError, match="already registered"):
            kind.register("mine", other)
    assert kind.find("mine") is kind.mine


WRONG_TARGETS = [5, None, 1.5, [], MyHandler(qkv_format="thd", cu_seqlens_q=[0, 4]), str.upper, "", "module", "module:"]
WRONG_TARGETS += [":Class", "my module:Class", ".module:Class", "module:Class:More", "my-module:Class", "a..b:C"]


@pytest.mark.parametrize("target", WRONG_TARGETS, ids=steady)
def test_what_is_no_target(kind: Kind, target: Any) -> None:
    with pytest.raises(InvalidTypeError, match=r"must be a class or 'module:Class'; got .*; pass the") as caught:
        kind.register("mine", target)
    assert kind.base in str(caught.value)


def test_classes_of_another_kind(kind: Kind) -> None:
    others = [object, int, *(other.mine for other in KINDS.values() if other is not kind)]
    for other in others:
        with pytest.raises(InvalidTypeError, match=f"is not a {kind.base}; got .*; derive it from {kind.base}"):
            kind.register("mine", other)
        kind.register(f"mine {other}", path_of(other))
        with pytest.raises(InvalidTypeError, match=f"is not a {kind.base}"):
            kind.find(f"mine {other}")
    with pytest.raises(InvalidTypeError, match=f"is not a {kind.base}"):
        kind.register("mine", kind.mine.__mro__[-1])


def test_classes_that_lack_a_method(kind: Kind) -> None:
    base = next(cls for cls in kind.mine.__mro__ if cls.__name__ == kind.base)
    with pytest.raises(InvalidTypeError, match=f"is abstract; got {kind.base}; implement .*") as caught:
        kind.register("mine", base)
    assert str(caught.value).endswith(", ".join(sorted(base.__abstractmethods__)))
    kind.register("later", path_of(base))
    with pytest.raises(InvalidTypeError, match="is abstract"):
        kind.find("later")


@pytest.mark.parametrize("kind", [KINDS["exchange"], KINDS["kernel"]], ids=["exchange", "kernel"])
def test_classes_that_ask_for_arguments(kind: Kind) -> None:
    def asks(self: Any, speed: int) -> None:
        del self, speed

    asking = type("Asking", (kind.mine,), {"__init__": asks, "__module__": __name__})
    with pytest.raises(
        InvalidTypeError, match=r"is made without arguments; got .*speed.*; give its arguments defaults"
    ):
        kind.register("asking", asking)


def test_an_exchange_that_needs_what_no_plan_holds() -> None:
    with pytest.raises(InvalidValueError, match="choose one of tasks, hops, stages"):
        type("Lost", (exchanges.RingExchange,), {"needs": "hop"})


def test_names_in_any_spelling(kind: Kind) -> None:
    kind.register(" My-Own ", kind.mine)
    assert kind.find("my_own") is kind.find("MY-OWN") is kind.mine


@pytest.mark.parametrize("name", [5, None, "", ["mine"], b"mine", True], ids=repr)
def test_what_is_no_name(kind: Kind, name: Any) -> None:
    before = [dict(registry._targets) for registry in (factory._HANDLERS, exchanges._EXCHANGES, kernels._KERNELS)]
    with pytest.raises(CPError) as caught:
        kind.register(name, kind.mine)
    assert caught.value.fix, "an error says the way out"
    after = [dict(registry._targets) for registry in (factory._HANDLERS, exchanges._EXCHANGES, kernels._KERNELS)]
    assert after == before, "nothing was registered"


SHOP = {
    "good": """
from cphandler import Exchange, LayoutHandler
from cphandler.attention.exchange import RingExchange
from cphandler.kernels.reference import ReferenceKernel

class ContextParallelHandler:
    class Inner(LayoutHandler):
        exchange = "ring"

class Exchange:
    Inner = RingExchange

class Kernel:
    class Inner(ReferenceKernel):
        name = "inner"

VALUE = 3
""",
    "lazy": "def __getattr__(name):\n    import no_such_thing",
    "needs": "import no_such_thing",
    "needs_deep": "from no_such_thing.deep import fast",
    "needs_newer": "from torch.nn import functionals",
    "needs_newer_module": "import torch.functionals",
    "needs_newer_library": "from cphandler import NoSuchName",
    "own_typo": "import shop.goood",
    "own_typo_from": "from shop.good import VALEU",
    "own_typo_relative": "from . import goood",
    "own_typo_below": "import shop.below.goood",
    "says_itself": "raise ImportError('needs a GPU')",
    "attribute": "import torch\ntorch.no_such_thing",
    "syntax": "class Broken(:",
    "value": "int('x')",
    "below/__init__": "",
}


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody's own, of which no module was imported yet."""
    for name, text in {"__init__": "", **SHOP}.items():
        path = tmp_path / "shop" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        monkeypatch.delitem(sys.modules, name)


FAULTS: dict[str, tuple[type[Exception], str]] = {
    "no_such_package.module:Thing": (
        MissingPackageError,
        "cannot be imported; got 'no_such_package.module': .*; install the package that holds 'no_such_package'",
    ),
    "no_such_package:Thing": (MissingPackageError, "install the package that holds 'no_such_package'"),
    "shop.needs:Thing": (MissingPackageError, "got 'shop.needs': .*; install the package that holds 'no_such_thing'"),
    "shop.needs_deep:Thing": (MissingPackageError, "install the package that holds 'no_such_thing'"),
    "shop.lazy:Thing": (MissingPackageError, "install the package that holds 'no_such_thing'"),
    "shop.needs_newer:Thing": (
        MissingPackageError,
        "cannot import name 'functionals' .*; install a version of 'torch' that has it, or mend the import",
    ),
    "shop.needs_newer_module:Thing": (MissingPackageError, "install a version of 'torch' that has it"),
    "shop.needs_newer_library:Thing": (MissingPackageError, "install a version of 'cphandler' that has it"),
    "shop.nothing:Thing": (InvalidValueError, "'shop' is there and has no 'shop.nothing': mend the path"),
    "shop.nothing.deep:Thing": (InvalidValueError, "'shop' is there and has no 'shop.nothing': mend the path"),
    "shop.good.deep:Thing": (InvalidValueError, "'shop' is there and has no 'shop.good.deep': mend the path"),
    "shop.good:Thing": (InvalidValueError, "cannot be found; got shop.good:Thing; 'shop.good' must define 'Thing'"),
    "shop.good:Kernel.Thing": (InvalidValueError, "'shop.good' must define 'Kernel.Thing'"),
    "shop.good:VALUE": (InvalidTypeError, "is not a .*; got shop.good:VALUE; derive it from"),
    "shop.own_typo:Thing": (ModuleNotFoundError, "^No module named 'shop.goood'$"),
    "shop.own_typo_below:Thing": (ModuleNotFoundError, "^No module named 'shop.below.goood'$"),
    "shop.own_typo_from:Thing": (ImportError, "^cannot import name 'VALEU' from 'shop.good'"),
    "shop.own_typo_relative:Thing": (ImportError, "^cannot import name 'goood' from 'shop'"),
    "shop.says_itself:Thing": (ImportError, "^needs a GPU$"),
    "shop.attribute:Thing": (AttributeError, "^module 'torch' has no attribute 'no_such_thing'"),
    "shop.syntax:Thing": (SyntaxError, "invalid syntax"),
    "shop.value:Thing": (ValueError, "invalid literal"),
}
"""What finding a class says: ours where something is missing, and the code's own error where the code is at fault."""


@pytest.mark.parametrize("path", FAULTS)
@pytest.mark.usefixtures("shop")
def test_what_cannot_be_imported(kind: Kind, path: str) -> None:
    error, message = FAULTS[path]
    kind.register("mine", path)
    for _ in range(2):  # asked again, it says the same
        with pytest.raises(error, match=message) as caught:
            kind.find("mine")
        ours = error.__module__.startswith("cphandler")
        assert isinstance(caught.value, CPError) == ours
        assert not ours or caught.value.fix


@pytest.mark.usefixtures("shop")
def test_a_class_inside_a_class(kind: Kind) -> None:
    kind.register("inner", f"shop.good:{kind.base}.Inner")
    assert issubclass(kind.find("inner"), next(cls for cls in kind.mine.__mro__ if cls.__name__ == kind.base))


def announce(monkeypatch: pytest.MonkeyPatch, **paths: str) -> None:
    def announced(group: str) -> list[EntryPoint]:
        assert group == "cphandler.backends"
        return [EntryPoint(name.rstrip("_").replace("__", ":"), path, group) for name, path in paths.items()]

    monkeypatch.setattr(factory, "entry_points", announced)


def test_what_packages_announce_takes_a_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    here = path_of(MyHandler)
    announce(monkeypatch, fast=here, fast__p2p=here, broken="no_such_package:Thing", odd="nowhere")
    assert {("fast", None), ("fast", "p2p"), ("broken", None)} <= set(available_cp_handlers())
    assert get_cp_handler_cls("Fast") is get_cp_handler_cls("fast", "P2P") is MyHandler
    with pytest.raises(MissingPackageError, match=r"\('broken', None\) cannot be imported.*holds 'no_such_package'"):
        get_cp_handler_cls("broken")
    with pytest.raises(InvalidTypeError, match="must be a class or 'module:Class'; got 'nowhere'"):
        get_cp_handler_cls("odd")
    register_cp_handler("fast", None, MyHandler)
    with pytest.raises(InvalidValueError, match=r"\('broken', None\) is already registered; got no_such_package:Thing"):
        register_cp_handler("broken", None, MyHandler)


def test_two_packages_announce_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(
        monkeypatch,
        fast="one.module:Handler",
        fast_="another.module:Handler",
        same=path_of(MyHandler),
        same_=path_of(MyHandler),
    )
    with pytest.raises(
        InvalidValueError, match=r"several .* announce .*got another.module:Handler, one.module:Handler"
    ):
        get_cp_handler_cls("fast")
    with pytest.raises(InvalidValueError, match="several installed packages"):
        register_cp_handler("fast", None, MyHandler)
    assert get_cp_handler_cls("same") is MyHandler


def test_a_registered_backend_is_one_of_a_list() -> None:
    register_cp_handler("local", "mine", MyHandler)
    both = get_cp_handler_cls("local", ["mine", "ring", "mine"], num_layers=3)
    assert [one.comm_type for one in both.classes] == [MyHandler.comm_type, "ring", MyHandler.comm_type]
    assert both.classes[0] is MyHandler


LISTS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "layers without a list": (
        "ring",
        2,
        InvalidValueError,
        "num_layers goes with a list .*; got num_layers 2",
    ),
    "layers without a comm type": (None, 2, InvalidValueError, "goes with a list .*; leave it out, or pass one"),
    "a short list": (["ring"], 2, InvalidValueError, "needs one for each layer; got 1 for 2 layers; repeat"),
    "an empty list": ([], None, InvalidValueError, "needs one for each layer; got 0 for some layers"),
    "no layers": ([], 0, InvalidValueError, "needs one for each layer"),
    "layers by name": (["ring"], "1", InvalidTypeError, "num_layers must be an int; got '1'"),
    "a bool of layers": (["ring"], True, InvalidTypeError, "num_layers must be an int; got True"),
    "layers by halves": (["ring", "p2p"], 2.0, InvalidTypeError, "num_layers must be an int; got 2.0"),
    "a list in a list": (["ring", ["p2p"]], None, InvalidTypeError, r"cp_comm_type must be a string; got \['p2p'\]"),
    "a number in a list": (["ring", 3], None, InvalidTypeError, "cp_comm_type must be a string; got 3"),
    "an unknown one in a list": (["ring", "rong"], None, InvalidValueError, r"got \('local', 'rong'\); choose one of"),
    "bytes": (b"ring", None, InvalidTypeError, "cp_comm_type must be a string; got b'ring'; 'ring', or a list"),
    "a set": ({"ring"}, None, InvalidTypeError, "cp_comm_type must be a string"),
}


@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS.keys())
def test_lists_of_comm_types(case: tuple[Any, Any, type[Exception], str]) -> None:
    comm_type, num_layers, error, message = case
    with pytest.raises(error, match=message) as caught:
        get_cp_handler_cls("local", comm_type, num_layers=num_layers)
    assert caught.value.fix


class Counted:
    """A kernel that says how often it was asked."""

    calls: ClassVar[list[str]] = []

    def forward(self, *args: Any) -> None:
        self.calls.append(f"{self.name} forward")
        super().forward(*args)

    def backward(self, *args: Any) -> None:
        self.calls.append(f"{self.name} backward")
        super().backward(*args)


class Eager(Counted, ReferenceKernel):
    name = "eager"


class Capped(Counted, ReferenceKernel):
    name = "capped"
    refuses: ClassVar[dict[str, str]] = {}


class Picky(Counted, ReferenceKernel):
    name = "picky"

    def misfit(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return "head dim must be 3" if q.shape[-1] != 3 else None


def attended(**options: Any) -> tuple[Tensor, list[str]]:
    """Attention on one rank with the kernel that ``auto`` takes, its gradient, and which registered kernels ran."""
    Counted.calls.clear()
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(13, 2, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3))
    out = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 6, 13]).core_attn(None, q, k, v, **options)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, dtype=out.dtype, generator=generator))
    return torch.cat([x.detach().flatten() for x in (out, *grads)]), list(Counted.calls)


def test_auto_considers_registered_kernels() -> None:
    plain, capped = attended()[0], attended(softcap=2.0)[0]
    register_kernel("picky", "any", Picky, preference=40)
    register_kernel("capped", "cpu", Capped)
    assert attended()[1] == [], "torch's kernels come before one of preference 10"
    result, calls = attended(softcap=2.0)
    assert calls == ["capped forward", "capped backward"], "which serves what they refuse"
    assert_close(result, capped)
    register_kernel("eager", "cpu", Eager, preference=30)
    result, calls = attended()
    assert calls == ["eager forward", "eager backward"]
    assert_close(result, plain)
    assert attended(softcap=2.0)[1][0] in ("capped forward", "eager forward")
    x = torch.randn(1, 4, 2, 3)
    assert select_kernel("auto", x, x, x) == "picky", "the highest preference that takes the call"
    named = get_cp_handler_cls("local")(qkv_format="thd", cu_seqlens_q=[0, 4], config=CPConfig(kernel="EAGER"))
    Counted.calls.clear()
    named.core_attn(None, x[0], x[0], x[0])
    assert Counted.calls == ["eager forward"]


def test_afterwards_auto_is_as_it_was() -> None:
    assert attended()[1] == []
    with pytest.raises(InvalidValueError, match="no kernel 'eager'"):
        get_kernel("eager", "cpu")


class CountedExchange(Exchange):
    """An exchange that says what its plans held."""

    plans: ClassVar[list[tuple[int, int]]] = []

    def forward(self, route: Any, rows: Any) -> Any:
        self.plans.append((len(route.plan.hops), len(route.plan.stages)))
        yield from super().forward(route, rows)  # type: ignore[safe-super]

    def backward(self, route: Any, rows: Any, home: Any) -> Any:
        self.plans.append((len(route.plan.hops), len(route.plan.stages)))
        yield from super().backward(route, rows, home)  # type: ignore[safe-super]


class Rounds(CountedExchange, RingExchange):
    needs = "hops"


class Errands(CountedExchange, DirectExchange):
    needs = "stages"


class Hoarder(CountedExchange, RingExchange):
    """Says that its plan need hold no hops, and is then sent nobody's keys."""

    needs = "tasks"


class RoundsHandler(LayoutHandler):
    comm_type = "rounds"
    exchange = "rounds"


class ErrandsHandler(LayoutHandler):
    comm_type = "errands"
    exchange = "errands"


class HoarderHandler(LayoutHandler):
    comm_type = "hoarder"
    exchange = "hoarder"


BATCHES = (Batch((13, 3, 6, 1)), Batch((2, 1)), Batch((7, 5), padded=(8, 8)))


def hold_registered_exchange_to_the_law(name: str, cp_size: int) -> list[tuple[int, int]]:
    exchange = {"rounds": Rounds, "errands": Errands, "hoarder": Hoarder}[name]
    handler_cls = {"rounds": RoundsHandler, "errands": ErrandsHandler, "hoarder": HoarderHandler}[name]
    register_exchange(name, exchange)
    register_cp_handler(name, None, path_of(handler_cls))
    CountedExchange.plans.clear()
    for batch in BATCHES:
        check_attention(Case(name, cp_size, "thd", "zigzag", batch=batch, max_logit=True))
    return list(CountedExchange.plans)


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("name", ["rounds", "errands"])
def test_registered_exchanges_have_what_they_need(ranks: RankPool, name: str, cp_size: int) -> None:
    plans = ranks.run(hold_registered_exchange_to_the_law, name, cp_size)
    for rank in {rank for part in PARTITIONS[cp_size] for rank in part}:
        hops, stages = (any(counts) for counts in zip(*plans[rank], strict=True))
        assert (hops, stages) == ((True, False) if name == "rounds" else (False, True))


def held_to_the_law_in_vain() -> str:
    try:
        hold_registered_exchange_to_the_law("hoarder", 4)
    except AssertionError as error:
        return str(error)
    return "nothing was wrong"


def test_an_exchange_that_does_not_say_what_it_needs(ranks: RankPool) -> None:
    """The law above sees keys that never came."""
    for told in ranks.run(held_to_the_law_in_vain):
        assert "hoarder cp4" in told


def exchanges_by_name_per_layer() -> None:
    for name, cls in (("rounds", Rounds), ("errands", Errands)):
        register_exchange(name, cls)
        register_cp_handler("local", name, {"rounds": RoundsHandler, "errands": ErrandsHandler}[name])
    for layer in (1, 2, 3):
        check_attention(Case(("rounds", "a2a", "errands"), 2, "sbhd", "zigzag", layer=layer))


def test_registered_exchanges_by_layer(ranks: RankPool) -> None:
    ranks.run(exchanges_by_name_per_layer)
