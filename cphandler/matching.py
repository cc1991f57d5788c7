"""Who sends to whom when: messages arranged so that each rank sends at most one and receives at most one at a time.

Messages are the edges of a bipartite graph of senders and receivers; stages are the colours of a proper edge colouring.
As many stages as the busiest rank has messages are always enough (Koenig 1916), and the alternating paths of his proof
find them.
"""

from __future__ import annotations

import numpy as np

from cphandler.intervals import Flags, Table


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
    """Edges with colours, no two of one colour at a vertex; -1 where a vertex has no edge of a colour."""

    def __init__(self, size: int, colours: int) -> None:
        self.by_receiver = [[-1] * colours for _ in range(size)]
        self.by_sender = [[-1] * colours for _ in range(size)]

    def add(self, receiver: int, sender: int) -> None:
        """Add an edge in the first colour free at both ends; make one free where there is none."""
        receives, sends = self.by_receiver[receiver], self.by_sender[sender]
        for colour, (a, b) in enumerate(zip(receives, sends, strict=True)):
            if a < 0 and b < 0:
                receives[colour], sends[colour] = sender, receiver
                return
        colour, other = receives.index(-1), sends.index(-1)
        self._swap(sender, colour, other)
        receives[colour], sends[colour] = sender, receiver

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
        for receiver, at, was in path:
            self.by_receiver[receiver][was] = self.by_sender[at][was] = -1
        for receiver, at, was in path:
            becomes = other if was == colour else colour
            self.by_receiver[receiver][becomes], self.by_sender[at][becomes] = at, receiver
