"""Real links between ranks of one machine: network namespaces, joined by veth pairs whose rate the kernel limits.

Two ranks share one pair; more hang on a bridge in a namespace of its own, with a pair for each. What ranks send passes
the kernel's TCP and a token bucket, as over a wire. Nothing outside the new namespaces is touched.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from cphandler.errors import UnsupportedError

COMMAND_LIMIT = 20.0
"""Seconds that one ``ip`` or ``tc`` may take."""

GROUP_LIMIT = 120.0
"""Seconds that a transfer over a link may take."""

INTERFACE = "link0"
"""A rank's end of its link, in its own namespace."""

BRIDGE = "bridge0"

UNLIMITED = "unlimited"

BURST = {"gbit": "512kb", "mbit": "64kb"}
"""Size of the token bucket by the unit of the rate: some milliseconds of it, and no less than a segment of 64 KiB."""

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h


class LinkError(UnsupportedError):
    """This machine, or this user, cannot make links."""


def require() -> None:
    """Refuse where links cannot be made.

    Raises:
        LinkError: the commands are missing, or the user is not root.
    """
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise LinkError(
            "links between network namespaces need the commands ip and tc",
            got=f"no {' and no '.join(missing)} on the PATH",
            fix="install iproute2 (Debian, Ubuntu, Alpine), or iproute and iproute-tc (Fedora, RHEL)",
        )
    if os.geteuid() != 0:
        raise LinkError(
            "only root can make network namespaces",
            got=f"user {os.geteuid()}",
            fix="run it as root (sudo), or in a container with --privileged",
        )


class Links:
    """Links between so many ranks, from ``with`` to its end.

    They are taken down whatever happens inside, an interrupt and a rank's crash included; only SIGKILL leaves
    namespaces, whose names start with ``cphandler-`` and this process's number.

    Args:
        ranks: how many.

    Raises:
        LinkError: the system refuses to make them.
    """

    def __init__(self, ranks: int) -> None:
        tag = f"cphandler-{os.getpid()}-{secrets.token_hex(3)}"
        self.namespaces = [f"{tag}-{rank}" for rank in range(ranks)]
        self._bridge = f"{tag}-bridge" if ranks > 2 else None

    def __enter__(self) -> Links:  # noqa: PYI034 (Self is not in Python 3.10)
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def limit(self, rate: str) -> None:
        """Let every link carry so much each way from now on.

        Args:
            rate: such as ``"10gbit"``, as ``tc`` reads it, or :data:`UNLIMITED`.
        """
        for namespace, interface in self._ends():
            shape = ["qdisc", "replace", "dev", interface, "root"]
            if rate == UNLIMITED:
                _run("tc", "-n", namespace, *shape, "noqueue")
            else:
                burst = BURST.get(rate.lower().lstrip("0123456789."), BURST["gbit"])
                _run("tc", "-n", namespace, *shape, "tbf", "rate", rate, "burst", burst, "latency", "50ms")

    def _ends(self) -> Iterator[tuple[str, str]]:
        """Namespace and name of every interface that something is sent from."""
        for rank, namespace in enumerate(self.namespaces):
            yield namespace, INTERFACE
            if self._bridge is not None:
                yield self._bridge, f"port{rank}"

    def _make(self) -> None:
        for namespace in (*self.namespaces, *([self._bridge] if self._bridge else [])):
            _run("ip", "netns", "add", namespace)
        if self._bridge is None:
            first, second = self.namespaces
            _pair(first, INTERFACE, second, INTERFACE)
        else:
            _run("ip", "-n", self._bridge, "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "-n", self._bridge, "link", "set", BRIDGE, "up")
            for rank, namespace in enumerate(self.namespaces):
                _pair(self._bridge, f"port{rank}", namespace, INTERFACE)
                _run("ip", "-n", self._bridge, "link", "set", f"port{rank}", "master", BRIDGE, "up")
        for rank, namespace in enumerate(self.namespaces):
            _run("ip", "-n", namespace, "address", "add", f"10.77.0.{rank + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", INTERFACE, "up")

    def _remove(self) -> None:
        """Remove every namespace, and with it what is inside; a second interrupt waits until that is done."""
        with _uninterrupted():
            known = set(_run("ip", "netns", "list").split())
            for namespace in (*self.namespaces, self._bridge):
                if namespace in known:
                    _run("ip", "netns", "delete", namespace)


def _pair(here: str, name: str, there: str, other: str) -> None:
    _run("ip", "-n", here, "link", "add", name, "type", "veth", "peer", "name", other, "netns", there)


def _run(*command: str) -> str:
    """A command's output; away from the terminal's interrupts, which are for this process to answer."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_LIMIT, check=False, start_new_session=True
    )
    if done.returncode:
        raise LinkError(
            f"the system refuses: {' '.join(command)}",
            got=done.stderr.strip() or f"exit code {done.returncode}",
            fix="the kernel needs the modules veth, bridge and sch_tbf, the process the right to make network "
            "namespaces (in a container, --privileged), and a rate is written as tc reads it, 1gbit say",
        )
    return done.stdout


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold signals that end a process back until the block is done."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """A signal ends the block by an exception, so that what was made is removed; further ones are ignored."""
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, frame: FrameType | None) -> None:
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_groups: list[dist.ProcessGroup] = []


def join(namespaces: Sequence[str]) -> None:
    """Move this rank of a pool into its namespace, and make a group whose messages travel over its link.

    The pool's own group goes on over the loopback device it was made on: barriers and requests do not use the link.

    Args:
        namespaces: one for each rank.
    """
    descriptor = os.open(Path("/run/netns") / namespaces[dist.get_rank()], os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _NEW_NETWORK):  # os.setns is of Python 3.12
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    made = dist.new_group(range(dist.get_world_size()), timeout=timedelta(seconds=GROUP_LIMIT), backend="gloo")
    assert isinstance(made, dist.ProcessGroup)
    _groups[:] = [made]


def group() -> dist.ProcessGroup:
    """The group that :func:`join` made."""
    return _groups[0]


def wire_bytes() -> int:
    """Bytes that have left this rank over its link, headers and the transport's own messages included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            return int(numbers.split()[8])
    raise UnsupportedError("this rank has no link", fix="call join first")


def bits_per_second(size: int) -> float:
    """How fast the first rank's link carries ``size`` bytes to the second, in one message: the best of a few."""
    if dist.get_rank() > 1:
        return 0.0
    message, best = torch.zeros(size, dtype=torch.uint8), 0.0
    for _ in range(4):  # other work on the machine makes some slower; the first one warms the connection
        started = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(message, group=group(), group_dst=1)
            dist.recv(message[:1], group=group(), group_src=1)
        else:
            dist.recv(message, group=group(), group_src=0)
            dist.send(message[:1], group=group(), group_dst=0)
        best = max(best, 8 * size / (time.perf_counter() - started))
    return best
