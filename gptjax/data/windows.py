"""A stream of tokens as an endless sequence of windows, cut at new positions every epoch or packed from examples.

An epoch cuts a stream into windows that do not overlap and shuffles them. The cuts move by a random phase from epoch
to epoch, so that a token has another context each time. Within an epoch every token is a target exactly once, except
the very first, which has no context.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from gptjax.data.store import Stream
from gptjax.errors import DataError


class Windows(NamedTuple):
    """Windows of a token stream: one token longer than the model's input, padded at the end."""

    ids: np.ndarray  # int32 [rows, length + 1]
    valid: np.ndarray  # bool [rows, length + 1]: false in the padding
    document_ids: np.ndarray | None  # int32 [rows, length + 1]: the document of each token, counted from 1
    loss_mask: np.ndarray | None = None  # bool [rows, length + 1]: tokens of answers; None: plain text
    classes: np.ndarray | None = None  # int16 [rows, length + 1]: class label at each token, -1: none; None: no labels

    def texts(self, row: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each document of a row; of the row if documents are not tracked. Without the padding."""
        size = int(self.valid[row].sum())
        changes = []
        if self.document_ids is not None:
            changes = np.flatnonzero(np.diff(self.document_ids[row, :size])).tolist()
        return pairwise(sorted({0, *(i + 1 for i in changes), size}))


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
    while (outside := out >= size).any():  # the network permutes a power of two: repeat until inside
        out[outside] = mix(out[outside])
    return out.astype(np.int64)


@dataclass(frozen=True)
class WindowedStream:
    """A stream as windows of `length` targets: an endless sequence, epoch after epoch."""

    stream: Stream
    length: int
    seed: tuple[int, ...]
    track_documents: bool

    @property
    def num_targets(self) -> int:
        """Tokens that are targets, in an epoch."""
        return len(self.stream.ids) - 1

    @property
    def windows_per_pass(self) -> int:
        """Windows in one plain pass."""
        return -(-self.num_targets // self.length)

    @property
    def windows_per_epoch(self) -> int:
        """Windows in an epoch of training: one more than fit, because the phase cuts the first one short."""
        return -(-self.num_targets // self.length) + (self.num_targets % self.length != 1)

    def shuffled(self, index: np.ndarray) -> Windows:
        """The windows at these indices of the endless shuffled sequence."""
        epochs, ranks = np.divmod(index, self.windows_per_epoch)
        starts = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            key = (*self.seed, int(epoch))
            chosen = epochs == epoch
            phase = int(np.random.default_rng(key).integers(self.length))
            starts[chosen] = permute(ranks[chosen], self.windows_per_epoch, key) * self.length - phase
        return self._cut(starts)

    def in_order(self, index: np.ndarray) -> Windows:
        """The windows of one plain pass from the start; beyond its end they are all padding."""
        return self._cut(np.where(index < self.windows_per_pass, index * self.length, len(self.stream.ids)))

    def _cut(self, starts: np.ndarray) -> Windows:
        """Windows whose first token is at `starts`; what lies outside the stream becomes padding."""
        ids = np.zeros((len(starts), self.length + 1), np.int32)
        valid = np.zeros(ids.shape, bool)
        document_ids = np.zeros(ids.shape, np.int32) if self.track_documents else None
        for row, start in enumerate(starts):
            first = max(start, 0)
            last = min(start + self.length + 1, len(self.stream.ids))
            count = max(last - first, 0)
            ids[row, :count] = self.stream.ids[first:last]
            valid[row, :count] = True
            if document_ids is not None:
                number = np.searchsorted(self.stream.document_starts, np.arange(first, last), "right")
                document_ids[row, :count] = number - number[:1] + 1
        return Windows(ids, valid, document_ids)


class PackedStream:
    """A stream of examples, packed into windows without splitting any: an endless sequence, epoch after epoch.

    Which examples share a window never changes, the order of the windows does. An example that is longer than a window
    loses the beginning of its first part; raises `DataError` where that is not enough.
    With `group` = (rows, examples), see `Objective.group`, an example has a window of its own, and the windows of
    a group are consecutive: (2, 2) two examples, (n, 1) n copies of one.
    """

    def __init__(self, stream: Stream, length: int, seed: tuple[int, ...], group: tuple[int, int] = (0, 0)):
        assert stream.loss_mask is not None
        self.stream = stream
        self.loss_mask = stream.loss_mask
        self.length = length
        self.seed = seed
        self.group_rows = max(group[0], 1)
        self.group_examples = max(group[1], 1)
        self.target_offset = int(stream.classes is None)  # a token is predicted one position earlier, a class is not
        max_size = length + self.target_offset
        self.ends = np.append(stream.document_starts[1:], len(stream.ids))
        self.starts = np.maximum(stream.document_starts, self.ends - max_size)
        if self.group_examples > 1:  # both answers of a pair must follow the same prompt
            cut = (self.starts - stream.document_starts).reshape(-1, self.group_examples).max(1)
            self.starts = stream.document_starts + np.repeat(cut, self.group_examples)
        self.num_truncated = int((self.starts > stream.document_starts).sum())
        self._check_targets()
        sizes = self.ends - self.starts
        self.packs = [[i] for i in range(len(sizes))] if group[0] else pack(sizes, max_size)

    def _check_targets(self) -> None:
        """Counts the targets. No target may be cut off, and a target token needs a token before it."""
        starts = self.stream.document_starts
        classes = self.stream.classes
        is_target = self.loss_mask if classes is None else classes >= 0
        before = np.concatenate([[0], np.cumsum(is_target)])  # targets before each token
        self.num_targets = int(before[-1])
        lost = (self.starts > starts) & (before[self.starts + self.target_offset] > before[starts])
        if classes is None:
            what, room, size = "answers are", "them and a token before", before[self.ends] - before[starts]
        else:
            what, room, size = "labelled words are", "them", self.ends - starts
        problems = [
            f"{self.stream.origin(int(i))}: its {what} {size[i]} tokens long, and model.context_length = {self.length} "
            f"must hold {room}"
            for i in np.flatnonzero(lost)
        ]
        if problems:
            more = f"\n  and {len(problems) - 5} others" if len(problems) > 5 else ""
            raise DataError("\n".join(problems[:5]) + more + "\nshorten them or leave these examples out")

    @property
    def windows_per_epoch(self) -> int:
        """Windows in an epoch, and in one plain pass."""
        return len(self.packs)

    windows_per_pass = windows_per_epoch

    def shuffled(self, index: np.ndarray) -> Windows:
        """The windows at these indices of the endless shuffled sequence."""
        groups, rows = np.divmod(index, self.group_rows)
        groups_per_epoch = self.windows_per_epoch // self.group_examples
        epochs, ranks = np.divmod(groups, groups_per_epoch)
        chosen = np.empty(len(index), np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = permute(ranks[now], groups_per_epoch, (*self.seed, int(epoch)))
        return self._assemble(chosen * self.group_examples + rows % self.group_examples)

    def in_order(self, index: np.ndarray) -> Windows:
        """The windows of one plain pass from the start; beyond its end they are all padding."""
        return self._assemble(index)

    def _assemble(self, pack_ids: np.ndarray) -> Windows:
        """The windows of these packs; each example is one document."""
        ids = np.zeros((len(pack_ids), self.length + 1), np.int32)
        document_ids = np.zeros(ids.shape, np.int32)
        loss_mask = np.zeros(ids.shape, bool)
        classes = None if self.stream.classes is None else np.full(ids.shape, -1, np.int16)
        for row, pack_id in enumerate(pack_ids):
            end = 0
            for number, example in enumerate(self.packs[pack_id] if pack_id < self.windows_per_epoch else (), 1):
                source = slice(self.starts[example], self.ends[example])
                start, end = end, end + source.stop - source.start
                ids[row, start:end] = self.stream.ids[source]
                loss_mask[row, start:end] = self.loss_mask[source]
                document_ids[row, start:end] = number
                if classes is not None and self.stream.classes is not None:
                    classes[row, start:end] = self.stream.classes[source]
        return Windows(ids, document_ids > 0, document_ids, loss_mask, classes)


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Best-fit decreasing: the longest example first, each into the fullest window of `room` tokens that holds it."""
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
