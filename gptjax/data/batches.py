"""The batch at step n as a pure function of (tokens, seed, n): the same on any number of hosts and devices."""

import dataclasses
import hashlib
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from gptjax import sharding
from gptjax.config import Experiment, ObjectiveConfig
from gptjax.data.objectives import Batch, Windows, make_objective, needs_others, rows_together
from gptjax.data.store import Store, Stream, check_ids
from gptjax.data.windows import PackedStream, WindowedStream
from gptjax.errors import DataError

FAR = 1 << 40  # between a sample and the one that may be taken in the place of its second half
CYCLE = 1024  # samples after which every source of a mixture has had exactly its share
ROOM = 5.0  # standard deviations of the number of windows drawn that a batch has room for, above its mean


class DataPosition(NamedTuple):
    """Where a run stands in its data: what a checkpoint keeps, so that no example is skipped or read twice."""

    step: int = 0  # updates made
    samples: int = 0  # examples read, over the whole run
    tokens: int = 0  # tokens read, over the whole run
    next: int = 0  # number of the next example in this order
    order: str = ""  # what decides which example has which number: see `DataLoader.order`


class PoissonSampler(NamedTuple):
    """How batches are drawn where each window is to count for itself: DP-SGD (Abadi et al. 2016)."""

    windows: int  # of one plain pass, which are always cut in the same way
    rate: float  # probability of each to be in a batch
    most: int  # that a batch can hold

    @classmethod
    def of(cls, windows: int, most: int) -> "PoissonSampler":
        """As many on average as leave room for `ROOM` standard deviations, since what has no room costs privacy."""
        expected = ((math.sqrt(ROOM**2 + 4 * most) - ROOM) / 2) ** 2
        return cls(windows, 1.0 if windows <= most else expected / windows, most)

    @property
    def expected(self) -> float:
        """Windows in a batch, on average."""
        return self.rate * self.windows

    def at(self, seed: int, step: int) -> np.ndarray:
        """The windows of a step, by number; of too many, some by chance are left out: int64 [at most `most`]."""
        rng = np.random.default_rng((seed, 8, step))
        return rng.permutation(np.flatnonzero(rng.random(self.windows) < self.rate))[: self.most]


@dataclass
class DataLoader:
    """The training batches and the validation pass of an experiment.

    With `optim.noise_multiplier` the windows of every step are drawn, see `PoissonSampler`; else every one has its turn. A run
    begins at example 0. One whose batch size was changed on the way goes on from the example at which it stood;
    one whose text or context length was changed begins a new order of examples.
    """

    store: Store
    experiment: Experiment
    origin: DataPosition = field(default_factory=DataPosition, init=False)  # where the run began, or was gone on with
    seconds: float = field(default=0.0, init=False)  # spent making training batches, in whatever thread

    def __post_init__(self) -> None:
        e = self.experiment
        length, track = e.model.context_length, e.data.document_mask

        together = rows_together(e.objective)
        if e.optim.noise_multiplier is not None:
            together = (1, 1)  # each example has a window of its own, which the others do not change

        def cut(stream: Stream, seed: tuple[int, ...]) -> WindowedStream | PackedStream:
            if stream.asked is not None:
                return PackedStream(stream, length, seed, together)
            return WindowedStream(stream, length, seed, track)

        self.train_streams = [cut(stream, (e.seed, 1, i)) for i, stream in enumerate(self.store.train)]
        self.validation_streams = [cut(stream, (e.seed, 3, i)) for i, stream in enumerate(self.store.validation)]
        for windowed in self.train_streams:
            if isinstance(windowed, WindowedStream) and windowed.answers < length:
                raise DataError(
                    f"{windowed.stream.name}: its {windowed.answers + 1} training tokens are fewer than one window of "
                    f"model.context_length + 1 = {length + 1}; give more text or a shorter context"
                )
        shares = np.array(e.data.weights or [w.answers for w in self.train_streams], np.float64)
        self.source_of, self.rank_of, self.per_cycle = mixture(shares / shares.sum(), (e.seed, 2))
        self.draws: PoissonSampler | None = None
        if e.optim.noise_multiplier is not None:
            self.draws = PoissonSampler.of(sum(w.passes for w in self.train_streams), e.train.batch_size)
        self.make = make_objective(e.objective, self.store.tokenizer)
        asked = (
            [] if e.objective == ObjectiveConfig() else [dataclasses.asdict(e.objective)]
        )  # losses compare within an order
        decides = [self.store.key, length, track, e.seed, e.data.weights, *asked]
        self.order = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def start_at(self, place: DataPosition) -> None:
        """Goes on from where a checkpoint stood in the data."""
        self.origin = place if place.order == self.order else place._replace(next=0, order=self.order)

    def place(self, step: int) -> DataPosition:
        """Where the run stands after `step` updates, in this order from its origin."""
        o, steps = self.origin, step - self.origin.step
        turns = o.next + steps * self.experiment.train.batch_size
        return DataPosition(
            step, o.samples + steps * self._read, o.tokens + steps * self.tokens_per_step, turns, self.order
        )

    def samples(self, step: int) -> np.ndarray:
        """The numbers of the examples that the update from `step` to step + 1 reads: int64 [microbatches, rows].

        Of windows that are drawn, places that are left over have a number beyond the last.
        """
        if self.draws is None:
            return self._turns(step)
        drawn = self.draws.at(self.experiment.seed, step)
        missing = self.draws.most - len(drawn)
        padded = np.pad(drawn, (0, missing), constant_values=self.draws.windows)
        return padded.reshape(self.experiment.train.microbatches, -1)

    def span(self, step: int) -> list[int]:
        """The lowest and the highest number of the examples that an update reads; [] where nothing was drawn."""
        numbers = self.samples(step)
        numbers = numbers if self.draws is None else numbers[numbers < self.draws.windows]
        return [int(numbers.min()), int(numbers.max())] if numbers.size else []

    def _turns(self, step: int) -> np.ndarray:
        """Numbers that grow from row to row over the whole run: int64 [microbatches, rows]."""
        t = self.experiment.train
        return self.place(step).next + np.arange(t.batch_size).reshape(t.microbatches, -1)

    @property
    def _read(self) -> int:
        """Examples that an update reads; of those that are drawn, on average."""
        return self.experiment.train.batch_size if self.draws is None else round(self.draws.expected)

    @property
    def tokens_per_step(self) -> int:
        return self._read * self.experiment.model.context_length

    def rows(self, samples: np.ndarray, turns: np.ndarray | None = None) -> Batch:
        """The training examples with these numbers in this order: [len(samples), length].

        What an objective draws for each follows from its turn, which is its number where examples are not drawn.
        """
        e = self.experiment
        others = self._windows(samples + FAR) if needs_others(e.objective) else None
        rngs = (np.random.default_rng((e.seed, 4, int(i))) for i in (samples if turns is None else turns))
        return self.make(self._windows(samples), rngs, others)

    def _windows(self, samples: np.ndarray) -> Windows:
        if self.draws is None:
            cycles, places = np.divmod(samples, CYCLE)
            sources = self.source_of[places]
            within = cycles * self.per_cycle[sources] + self.rank_of[places]
            parts = [w.shuffled(within[sources == i]) for i, w in enumerate(self.train_streams)]
        else:
            ends = np.cumsum([w.passes for w in self.train_streams])
            sources = np.searchsorted(ends[:-1], samples, "right")
            parts = [w.in_order(samples[sources == i] - (ends[i] - w.passes)) for i, w in enumerate(self.train_streams)]
        order = np.argsort(np.argsort(sources, kind="stable"), kind="stable")
        windows = _take(parts, order)
        check_ids(windows.ids, self.experiment.model.vocab_size, self.store.folder)
        return windows

    def batch(self, step: int, chosen: np.ndarray | None = None) -> Batch:
        """What the update from `step` to step + 1 reads: [microbatches, batch_size / microbatches, length].

        `chosen` picks columns of the second axis, for a host that needs only some.
        """
        samples, turns = self.samples(step), self._turns(step)
        if chosen is not None:
            samples, turns = samples[:, chosen], turns[:, chosen]
        batch = self.rows(samples.ravel(), turns.ravel())
        return jax.tree.map(lambda x: x.reshape(*samples.shape, -1), batch)

    def validation(self) -> Iterator[Batch]:
        """One pass over the whole validation text, in batches of one microbatch: [rows, length]. Always the same."""
        e = self.experiment
        rows = e.train.batch_size // e.train.microbatches
        for number, windowed in enumerate(self.validation_streams):
            for first in range(0, windowed.passes, rows):
                index = np.arange(first, first + rows)
                others = windowed.shuffled(index) if needs_others(e.objective) else None
                rngs = (np.random.default_rng((e.seed, 5, number, int(i))) for i in index)
                yield self.make(windowed.in_order(index), rngs, others)

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
    def joined(pieces: tuple[Any, ...]) -> Any:
        return None if pieces[0] is None else np.concatenate(pieces)[order]

    return Windows(*map(joined, zip(*parts, strict=True)))


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
