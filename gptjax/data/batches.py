"""The batch at step n as a pure function of (tokens, seed, n): the same on any number of hosts and devices.

An epoch cuts a stream into windows that do not overlap and deals them out in an order of its own; the cuts move by a
random phase from epoch to epoch, so that a token is read in ever new surroundings. Within an epoch every token is asked
for exactly once (all but the very first, which nothing precedes).
"""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from gptjax import sharding
from gptjax.config import Experiment
from gptjax.data.objectives import OBJECTIVES, Batch, Windows
from gptjax.data.store import Store, Stream, check_ids
from gptjax.errors import DataError

CYCLE = 1024  # samples after which every source of a mixture has had exactly its share


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
        return self._cut(index * self.length)

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


class Place(NamedTuple):
    """Where a run stands in its data: what a checkpoint keeps, so that no example is skipped or read twice."""

    step: int = 0  # updates made
    samples: int = 0  # examples read, over the whole run
    tokens: int = 0  # tokens read, over the whole run
    next: int = 0  # number of the next example in this order
    order: str = ""  # what decides which example has which number: see `Batches.order`


@dataclass
class Batches:
    """The training batches and the validation pass of an experiment.

    A run begins at example 0. One whose batch size was changed on the way goes on from the example at which it stood;
    one whose text or context length was changed begins a new order of examples.
    """

    store: Store
    experiment: Experiment
    origin: Place = field(default_factory=Place, init=False)  # where the run began, or was gone on with
    seconds: float = field(default=0.0, init=False)  # spent making training batches, in whatever thread

    def __post_init__(self) -> None:
        e = self.experiment
        length, track = e.model.context_length, e.data.document_mask
        self.train_streams = [
            WindowedStream(stream, length, (e.seed, 1, i), track) for i, stream in enumerate(self.store.train)
        ]
        self.validation_streams = [WindowedStream(s, length, (), track) for s in self.store.validation]
        for windowed in self.train_streams:
            if windowed.answers < length:
                raise DataError(
                    f"{windowed.stream.name}: its {windowed.answers + 1} training tokens are fewer than one window of "
                    f"model.context_length + 1 = {length + 1}; give more text or a shorter context"
                )
        shares = np.array(e.data.weights or [w.answers for w in self.train_streams], np.float64)
        self.source_of, self.rank_of, self.per_cycle = mixture(shares / shares.sum(), (e.seed, 2))
        self.make = OBJECTIVES[e.objective.name]
        decides = [self.store.key, length, track, e.seed, e.data.weights]
        self.order = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def start_at(self, place: Place) -> None:
        """Goes on from where a checkpoint stood in the data."""
        self.origin = place if place.order == self.order else place._replace(next=0, order=self.order)

    def place(self, step: int) -> Place:
        """Where the run stands after `step` updates, in this order from its origin."""
        o, steps = self.origin, step - self.origin.step
        samples = steps * self.experiment.train.batch_size
        tokens = o.tokens + steps * self.tokens_per_step
        return Place(step, o.samples + samples, tokens, o.next + samples, self.order)

    def samples(self, step: int) -> np.ndarray:
        """The numbers of the examples that the update from `step` to step + 1 reads: int64 [microbatches, rows]."""
        t = self.experiment.train
        return self.place(step).next + np.arange(t.batch_size).reshape(t.microbatches, -1)

    @property
    def tokens_per_step(self) -> int:
        return self.experiment.train.batch_size * self.experiment.model.context_length

    def rows(self, samples: np.ndarray) -> Batch:
        """The training examples with these numbers in this order: [len(samples), length]."""
        cycles, places = np.divmod(samples, CYCLE)
        sources = self.source_of[places]
        within = cycles * self.per_cycle[sources] + self.rank_of[places]
        parts = [w.shuffled(within[sources == i]) for i, w in enumerate(self.train_streams)]
        order = np.argsort(np.argsort(sources, kind="stable"), kind="stable")
        windows = _take(parts, order)
        check_ids(windows.ids, self.experiment.model.vocab_size, self.store.folder)
        return self.make(windows)

    def batch(self, step: int, chosen: np.ndarray | None = None) -> Batch:
        """What the update from `step` to step + 1 reads: [microbatches, batch_size / microbatches, length].

        `chosen` picks columns of the second axis, for a host that needs only some.
        """
        samples = self.samples(step)
        samples = samples if chosen is None else samples[:, chosen]
        batch = self.rows(samples.ravel())
        return jax.tree.map(lambda x: x.reshape(*samples.shape, -1), batch)

    def validation(self) -> Iterator[Batch]:
        """One pass over the whole validation text, in batches of one microbatch: [rows, length]."""
        rows = self.experiment.train.batch_size // self.experiment.train.microbatches
        for windowed in self.validation_streams:
            for first in range(0, -(-windowed.answers // windowed.length), rows):
                yield self.make(windowed.in_order(np.arange(first, first + rows)))

    def on_devices(self, step: int, mesh: jax.sharding.Mesh) -> Batch:
        """`batch(step)` laid out over the mesh; each host makes only the rows of its own devices."""
        began = time.perf_counter()
        t, length = self.experiment.train, self.experiment.model.context_length
        shape = (t.microbatches, t.batch_size // t.microbatches, length)
        layout = sharding.sharding(("microbatch", "batch", "length"), shape, mesh)
        local = self.batch(step, _local_columns(layout, shape) if jax.process_count() > 1 else None)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, x, shape), local)
        self.seconds += time.perf_counter() - began
        return batch


def mixture(shares: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cycle of `CYCLE` samples in which every source has its share (to the nearest sample, and at least one).

    Returns, for each place of the cycle, its source and how many samples of that source stand before it; and the number
    of samples of each source in a cycle.
    """
    counts = np.maximum(np.floor(shares * CYCLE).astype(np.int64), 1)
    for i in np.argsort(counts - shares * CYCLE)[: max(CYCLE - counts.sum(), 0)]:
        counts[i] += 1
    counts[counts.argmax()] += CYCLE - counts.sum()
    sources = np.random.default_rng(key).permutation(np.repeat(np.arange(len(shares)), counts))
    ranks = np.empty(CYCLE, np.int64)
    for i in range(len(shares)):
        ranks[sources == i] = np.arange(counts[i])
    return sources, ranks, counts


def _take(parts: list[Windows], order: np.ndarray) -> Windows:
    ids, valid, documents = zip(*parts, strict=True)
    joined = None if documents[0] is None else np.concatenate(documents)[order]
    return Windows(np.concatenate(ids)[order], np.concatenate(valid)[order], joined)


def _local_columns(layout: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    indices = layout.addressable_devices_indices_map(shape).values()
    columns = [np.arange(shape[1])[index[1]] for index in indices if index is not None]
    return np.unique(np.concatenate(columns))


def prefetch(make: Callable[[int], Batch], steps: range, depth: int) -> Generator[Batch, None, None]:
    """`make(step)` for each step, made up to `depth` ahead in a thread of its own; its errors are raised here."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                put(make(step))
        except BaseException as e:  # handed over, to be raised where the batch is wanted
            put(e)

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
