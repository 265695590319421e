"""A stream of tokens as windows, numbered for ever: cut anew every epoch, or packed from whole examples.

An epoch cuts a stream into windows that do not overlap and deals them out in an order of its own; the cuts move by a
random phase from epoch to epoch, so that a token is read in ever new surroundings. Within an epoch every token is asked
for exactly once (all but the very first, which nothing precedes).
"""

import bisect
from dataclasses import dataclass

import numpy as np

from gptjax.data.objectives import Windows
from gptjax.data.store import Stream
from gptjax.errors import DataError


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a random permutation of range(size) sends each index, in O(1) memory: a Feistel network with cycle walking.

    Black & Rogaway 2002. The same key gives the same permutation; int64 in, int64 out.
    """
    bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << bits) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(8, np.uint64)

    def mix(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(bits), x & mask
        for round_key in round_keys:
            hashed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((hashed >> np.uint64(32)) & mask)
        return left << np.uint64(bits) | right

    out = mix(index.astype(np.uint64))
    while (outside := out >= size).any():  # the network permutes a power of two: walk on until inside
        out[outside] = mix(out[outside])
    return out.astype(np.int64)


@dataclass(frozen=True)
class WindowedStream:
    """A stream as windows of `length` answers, numbered from 0 for ever: epoch after epoch."""

    stream: Stream
    length: int
    seed: tuple[int, ...]
    track_documents: bool

    @property
    def answers(self) -> int:
        """Tokens that an epoch asks for."""
        return len(self.stream.ids) - 1

    @property
    def passes(self) -> int:
        """Windows in one plain pass."""
        return -(-self.answers // self.length)

    @property
    def windows(self) -> int:
        """Windows in an epoch of training: one more than fit, because the phase cuts the first one short."""
        return -(-self.answers // self.length) + (self.answers % self.length != 1)

    def shuffled(self, index: np.ndarray) -> Windows:
        """The windows at these places of the endless shuffled sequence."""
        epochs, places = np.divmod(index, self.windows)
        starts = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            key = (*self.seed, int(epoch))
            chosen = epochs == epoch
            phase = int(np.random.default_rng(key).integers(self.length))
            starts[chosen] = permute(places[chosen], self.windows, key) * self.length - phase
        return self._cut(starts)

    def in_order(self, index: np.ndarray) -> Windows:
        """The windows of one plain pass from the start; beyond its end they are all padding."""
        return self._cut(np.where(index < self.passes, index * self.length, len(self.stream.ids)))

    def _cut(self, starts: np.ndarray) -> Windows:
        """Windows whose first token stands at `starts`, with what lies outside the stream cut away."""
        ids = np.zeros((len(starts), self.length + 1), np.int32)
        valid = np.zeros(ids.shape, bool)
        documents = np.zeros(ids.shape, np.int32) if self.track_documents else None
        for row, start in enumerate(starts):
            first, last = max(start, 0), min(start + self.length + 1, len(self.stream.ids))
            count = max(last - first, 0)
            ids[row, :count] = self.stream.ids[first:last]
            valid[row, :count] = True
            if documents is not None:
                number = np.searchsorted(self.stream.documents, np.arange(first, last), "right")
                documents[row, :count] = number - number[:1] + 1
        return Windows(ids, valid, documents)


class PackedStream:
    """A stream of examples as windows that hold whole ones, numbered from 0 for ever: epoch after epoch.

    Which examples share a window never changes, the order of the windows does. Of an example that is longer than a
    window, the beginning of its first part is left out; raises `DataError` where that is not enough.
    With `together`, see `objectives.rows_together`, an example has a window of its own, and the windows of a group
    follow one another: (2, 2) two examples, (n, 1) n copies of one.
    """

    def __init__(self, stream: Stream, length: int, seed: tuple[int, ...], together: tuple[int, int] = (0, 0)):
        assert stream.asked is not None
        self.stream, self.asked, self.length, self.seed = stream, stream.asked, length, seed
        self.rows, self.span = max(together[0], 1), max(together[1], 1)
        self.ahead = int(stream.classes is None)  # an answer is a token after those that are read, a class is not
        self.ends = np.append(stream.documents[1:], len(stream.ids))
        self.begins = np.maximum(stream.documents, self.ends - (length + self.ahead))
        if self.span > 1:  # both answers of a pair are read after the same prompt
            left_out = (self.begins - stream.documents).reshape(-1, self.span).max(1)
            self.begins = stream.documents + np.repeat(left_out, self.span)
        self.shortened = int((self.begins > stream.documents).sum())
        self._check_answers()
        sizes, room = self.ends - self.begins, length + self.ahead
        self.packs = [[i] for i in range(len(sizes))] if together[0] else pack(sizes, room)

    def _check_answers(self) -> None:
        """What is left out must not be asked for, and an answer needs a token before it."""
        told = self.stream.classes
        asked = np.concatenate([[0], np.cumsum(self.asked if told is None else told >= 0)])
        self.answers = int(asked[-1])
        lost = (self.begins > self.stream.documents) & (asked[self.begins + self.ahead] > asked[self.stream.documents])
        if told is None:
            what, room, size = "answers are", "them and a token before", asked[self.ends] - asked[self.stream.documents]
        else:
            what, room, size = "labelled words are", "them", self.ends - self.stream.documents
        problems = [
            f"{self.stream.origin(int(i))}: its {what} {size[i]} tokens long, and model.context_length = {self.length} "
            f"must hold {room}"
            for i in np.flatnonzero(lost)
        ]
        if problems:
            more = f"\n  and {len(problems) - 5} others" if len(problems) > 5 else ""
            raise DataError("\n".join(problems[:5]) + more + "\nshorten them or leave these examples out")

    @property
    def windows(self) -> int:
        """Windows in an epoch, and in one plain pass."""
        return len(self.packs)

    passes = windows

    def shuffled(self, index: np.ndarray) -> Windows:
        """The windows at these places of the endless shuffled sequence."""
        groups, rows = np.divmod(index, self.rows)
        count = self.windows // self.span
        epochs, places = np.divmod(groups, count)
        chosen = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = permute(places[now], count, (*self.seed, int(epoch)))
        return self._joined(chosen * self.span + rows % self.span)

    def in_order(self, index: np.ndarray) -> Windows:
        """The windows of one plain pass from the start; beyond its end they are all padding."""
        return self._joined(index)

    def _joined(self, numbers: np.ndarray) -> Windows:
        """The windows of these packs, each example a document of its own."""
        ids = np.zeros((len(numbers), self.length + 1), np.int32)
        documents, asked = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, bool)
        told, classes = self.stream.classes, np.full(ids.shape, -1, np.int16)
        for row, number in enumerate(numbers):
            at = 0
            for place, example in enumerate(self.packs[number] if number < self.windows else (), 1):
                piece = slice(self.begins[example], self.ends[example])
                here = slice(at, at := at + piece.stop - piece.start)
                ids[row, here], asked[row, here] = self.stream.ids[piece], self.asked[piece]
                documents[row, here] = place
                if told is not None:
                    classes[row, here] = told[piece]
        return Windows(ids, documents > 0, documents, asked, None if told is None else classes)


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Fills as few windows of `room` tokens as best fit can: the longest first, each into the fullest that holds it."""
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # tokens left -> packs
    rooms: list[int] = []  # the keys, sorted
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        if (i := bisect.bisect_left(rooms, length)) < len(rooms):
            left = rooms[i]
            chosen = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[i]
        else:
            left, chosen = room, len(packs)
            packs.append([])
        packs[chosen].append(int(example))
        if left > length:
            if left - length not in by_room:
                bisect.insort(rooms, left - length)
            by_room.setdefault(left - length, []).append(chosen)
    return packs
