"""Who sends to whom when: messages arranged so that each rank sends at most one and receives at most one at a time.

Messages are the edges of a bipartite graph of senders and receivers; stages are the colours of a proper edge colouring.
As many stages as the busiest rank has messages are always enough (Koenig 1916), and the alternating paths of his proof
find them.
"""

from __future__ import annotations

import numpy as np

from cphandler.tokens.intervals import Flags, Table


def matchings(wanted: Flags) -> Table:
    """The stage of each message, as few stages as there can be.

    Messages between near ranks (receiver minus sender, round the ring) come first. Where everybody wants everybody's,
    stage s is the shift by ``s + 1``.

    Args:
        wanted: ``[P, P]``, whether receiver r wants a message of sender s; the diagonal is not looked at.

    Returns:
        ``[P, P]`` stages from 0; -1 where there is no message.
    """
    size = len(wanted)
    receivers, senders = np.nonzero(wanted & ~np.eye(size, dtype=bool))
    shifts = (receivers - senders) % size
    result = np.full((size, size), -1, dtype=np.int64)
    if not len(shifts):
        return result
    busiest = int(max(np.bincount(receivers).max(), np.bincount(senders).max()))
    distinct, stages = np.unique(shifts, return_inverse=True)
    if len(distinct) == busiest:
        result[receivers, senders] = stages
        return result
    colouring = _Colouring(size, busiest)
    for i in np.lexsort((senders, shifts)).tolist():
        colouring.add(int(receivers[i]), int(senders[i]))
    for receiver, stages_of in enumerate(colouring.by_receiver):
        for stage, sender in enumerate(stages_of):
            if sender >= 0:
                result[receiver, sender] = stage
    return result


class _Colouring:
    """Edges with colours, no two of one colour at a vertex; -1 where a vertex has no edge of a colour.

    The colours that are free at a vertex are the bits of one integer, so that two ends agree on one in a few operations
    whatever the number of colours.
    """

    def __init__(self, size: int, colours: int) -> None:
        self.by_receiver = [[-1] * colours for _ in range(size)]
        self.by_sender = [[-1] * colours for _ in range(size)]
        self.free_at_receiver = [(1 << colours) - 1] * size
        self.free_at_sender = [(1 << colours) - 1] * size

    def add(self, receiver: int, sender: int) -> None:
        """Add an edge in the first colour free at both ends; make one free where there is none."""
        colour = _lowest(self.free_at_receiver[receiver] & self.free_at_sender[sender])
        if colour < 0:
            colour, other = _lowest(self.free_at_receiver[receiver]), _lowest(self.free_at_sender[sender])
            self._swap(sender, colour, other)
        self._put(receiver, sender, colour)

    def _put(self, receiver: int, sender: int, colour: int) -> None:
        self.by_receiver[receiver][colour], self.by_sender[sender][colour] = sender, receiver
        self.free_at_receiver[receiver] &= ~(1 << colour)
        self.free_at_sender[sender] &= ~(1 << colour)

    def _take(self, receiver: int, sender: int, colour: int) -> None:
        self.by_receiver[receiver][colour] = self.by_sender[sender][colour] = -1
        self.free_at_receiver[receiver] |= 1 << colour
        self.free_at_sender[sender] |= 1 << colour

    def _swap(self, sender: int, colour: int, other: int) -> None:
        """Exchange two colours along the path that starts at a sender with ``colour``; it cannot reach the receiver.

        The receiver has no edge of ``colour``, and a path from a sender enters receivers by that colour only.
        """
        path: list[tuple[int, int, int]] = []
        wanted, follow = sender, colour
        while True:
            receiver = self.by_sender[wanted][follow]
            if receiver < 0:
                break
            path.append((receiver, wanted, follow))
            following = self.by_receiver[receiver][other]
            if following < 0:
                break
            path.append((receiver, following, other))
            wanted = following
        for edge in path:
            self._take(*edge)
        for receiver, at, was in path:
            self._put(receiver, at, other if was == colour else colour)


def _lowest(colours: int) -> int:
    """The first colour of a set kept as bits; -1 for none."""
    return (colours & -colours).bit_length() - 1
