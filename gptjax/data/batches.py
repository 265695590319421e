"""The batch at step n as a pure function of (tokens, seed, n): the same on any number of hosts and devices."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from gptjax import sharding
from gptjax.config import Experiment, ObjectiveConfig, names_of_format_1
from gptjax.data.poisson import PoissonSampler
from gptjax.data.store import Store, Stream, check_ids
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.windows import PackedStream, WindowedStream, Windows
from gptjax.errors import DataError
from gptjax.random_streams import (
    MIXTURE,
    TRAIN_EXAMPLE,
    TRAIN_ORDER,
    VALIDATION_EXAMPLE,
    VALIDATION_ORDER,
)

FAR = 1 << 40  # from an example's id to that of its negative example, which next_sentence takes a second half from
CYCLE = 1024  # samples after which every source of a mixture has had exactly its share


class Batch(NamedTuple):
    """What the train step reads: [rows, length] on the host, [microbatches, rows, length] on the devices."""

    tokens: np.ndarray | Array  # int32: the model's input
    targets: np.ndarray | Array  # int32: the token (or class) to predict at each position
    loss_weights: np.ndarray | Array  # float32: weight of each target in the loss; 0 in the padding
    segment_ids: np.ndarray | Array | None = None  # int32: tokens attend within their segment; None: the whole row
    positions: np.ndarray | Array | None = None  # int32: position within the segment; None: within the row
    prefix_mask: np.ndarray | Array | None = None  # bool: visible to earlier tokens of the segment; None: no token is
    advantages: np.ndarray | Array | None = None  # float32: of each sampled token (policy gradient); None: 1


Generators = Iterable[np.random.Generator]  # one per row, made only when they are used
# windows, generators, and negative windows (see `Objective.needs_negatives`) -> batch
MakeBatch = Callable[[Windows, Generators, Windows | None], Batch]


class BatchRecipe(Protocol):
    """What the loader needs of an objective (`gptjax/objectives/`)."""

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch: ...

    def group(self) -> tuple[int, int]: ...

    def needs_negatives(self) -> bool: ...


class DataPosition(NamedTuple):
    """How far a run has read its data. A checkpoint keeps it, so that no example is skipped or read twice."""

    step: int = 0  # updates made
    samples: int = 0  # examples read, over the whole run
    tokens: int = 0  # tokens read, over the whole run
    next_example: int = 0  # index of the next example in this order
    order_id: str = ""  # which order of examples this is: see `DataLoader.order_id`

    def to_json(self) -> dict[str, int | str]:
        """The position as a checkpoint's manifest keeps it."""
        return {_JSON_KEYS.get(name, name): value for name, value in self._asdict().items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataPosition":
        """The inverse of `to_json`. Raises `TypeError` for an unknown key."""
        names = {key: name for name, key in _JSON_KEYS.items()}
        return cls(**{names.get(key, key): value for key, value in values.items()})


_JSON_KEYS = {"next_example": "next", "order_id": "order"}  # the other fields have the same names in JSON


@dataclass
class DataLoader:
    """The training batches and the validation pass of an experiment.

    With `optim.noise_multiplier` the windows of every step are drawn by a `PoissonSampler`. Without it every window is
    read once an epoch. A run begins at example 0. If its batch size changes, it resumes from the same example; if its
    text or context length changes, a new order of examples begins.
    """

    store: Store
    experiment: Experiment
    objective: BatchRecipe
    origin: DataPosition = field(default_factory=DataPosition, init=False)  # where the run began or was resumed
    seconds: float = field(default=0.0, init=False)  # spent making training batches, in any thread

    def __post_init__(self) -> None:
        e = self.experiment
        length = e.model.context_length
        track_documents = e.data.document_mask
        group = self.objective.group()
        if e.optim.noise_multiplier is not None:
            group = (1, 1)  # one example a window, so that no example's gradient depends on another

        def cut(stream: Stream, seed: tuple[int, ...]) -> WindowedStream | PackedStream:
            if stream.loss_mask is not None:
                return PackedStream(stream, length, seed, group)
            return WindowedStream(stream, length, seed, track_documents)

        self.train_streams = [cut(stream, (e.seed, TRAIN_ORDER, i)) for i, stream in enumerate(self.store.train)]
        self.validation_streams = [
            cut(stream, (e.seed, VALIDATION_ORDER, i)) for i, stream in enumerate(self.store.validation)
        ]
        for windowed in self.train_streams:
            if isinstance(windowed, WindowedStream) and windowed.num_targets < length:
                raise DataError(
                    f"{windowed.stream.name}: its {windowed.num_targets + 1} training tokens are fewer than one window "
                    f"of model.context_length + 1 = {length + 1}; give more text or a shorter context"
                )
        shares = np.array(e.data.weights or [w.num_targets for w in self.train_streams], np.float64)
        self.source_of, self.rank_of, self.per_cycle = mixture(shares / shares.sum(), (e.seed, MIXTURE))
        self.sampler: PoissonSampler | None = None
        if e.optim.noise_multiplier is not None:
            num_windows = sum(w.windows_per_pass for w in self.train_streams)
            self.sampler = PoissonSampler.of(num_windows, e.train.batch_size)
        self.make_batch = self.objective.batch_maker(self.store.tokenizer)
        decides = [self.store.key, length, track_documents, e.seed, e.data.weights]
        if e.objective != ObjectiveConfig():  # losses are comparable within an order only
            decides.append(names_of_format_1("objective", e.objective))
        self.order_id = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def seek(self, position: DataPosition) -> None:
        """Resumes from the position that a checkpoint kept."""
        same_order = position.order_id == self.order_id
        self.origin = position if same_order else position._replace(next_example=0, order_id=self.order_id)

    def position(self, step: int) -> DataPosition:
        """The position after `step` updates, in this order from its origin."""
        origin = self.origin
        steps = step - origin.step
        samples = origin.samples + steps * self.examples_per_step
        tokens = origin.tokens + steps * self.tokens_per_step
        next_example = origin.next_example + steps * self.experiment.train.batch_size
        return DataPosition(step, samples, tokens, next_example, self.order_id)

    def example_ids(self, step: int) -> np.ndarray:
        """The ids of the examples that the update from `step` to step + 1 reads: int64 [microbatches, rows].

        If windows are drawn, the unused rows of the batch have an id beyond the last window.
        """
        if self.sampler is None:
            return self._example_index(step)
        drawn = self.sampler.draw(self.experiment.seed, step)
        missing = self.sampler.max_batch - len(drawn)
        padded = np.pad(drawn, (0, missing), constant_values=self.sampler.num_windows)
        return padded.reshape(self.experiment.train.microbatches, -1)

    def example_range(self, step: int) -> list[int]:
        """The lowest and the highest id of the examples that an update reads; [] if none were drawn."""
        ids = self.example_ids(step)
        if self.sampler is not None:
            ids = ids[ids < self.sampler.num_windows]
        return [int(ids.min()), int(ids.max())] if ids.size else []

    def _example_index(self, step: int) -> np.ndarray:
        """Indices that grow from row to row over the whole run: int64 [microbatches, rows]."""
        t = self.experiment.train
        return self.position(step).next_example + np.arange(t.batch_size).reshape(t.microbatches, -1)

    @property
    def examples_per_step(self) -> int:
        """Examples that an update reads; the mean if they are drawn."""
        return self.experiment.train.batch_size if self.sampler is None else round(self.sampler.expected_batch)

    @property
    def tokens_per_step(self) -> int:
        return self.examples_per_step * self.experiment.model.context_length

    def make_examples(self, example_ids: np.ndarray, index: np.ndarray | None = None) -> Batch:
        """The training examples with these ids in this order: [len(example_ids), length].

        `index` seeds what the objective draws for each example. Default: the ids themselves, which are the indices
        unless examples are drawn.
        """
        e = self.experiment
        negatives = self._windows(example_ids + FAR) if self.objective.needs_negatives() else None
        index = example_ids if index is None else index
        rngs = (np.random.default_rng((e.seed, TRAIN_EXAMPLE, int(i))) for i in index)
        return self.make_batch(self._windows(example_ids), rngs, negatives)

    def _windows(self, example_ids: np.ndarray) -> Windows:
        if self.sampler is None:
            cycles, slots = np.divmod(example_ids, CYCLE)
            sources = self.source_of[slots]
            within = cycles * self.per_cycle[sources] + self.rank_of[slots]
            parts = [w.shuffled(within[sources == i]) for i, w in enumerate(self.train_streams)]
        else:
            ends = np.cumsum([w.windows_per_pass for w in self.train_streams])
            sources = np.searchsorted(ends[:-1], example_ids, "right")
            begins = [end - w.windows_per_pass for end, w in zip(ends, self.train_streams, strict=True)]
            within = example_ids - np.array(begins)[sources]
            parts = [w.in_order(within[sources == i]) for i, w in enumerate(self.train_streams)]
        order = np.argsort(np.argsort(sources, kind="stable"), kind="stable")
        windows = _take(parts, order)
        check_ids(windows.ids, self.experiment.model.vocab_size, self.store.folder)
        return windows

    def host_batch(self, step: int, columns: np.ndarray | None = None) -> Batch:
        """The batch of the update from `step` to step + 1: [microbatches, batch_size / microbatches, length].

        `columns` picks columns of the second axis, for a host that needs only some.
        """
        ids = self.example_ids(step)
        index = self._example_index(step)
        if columns is not None:
            ids = ids[:, columns]
            index = index[:, columns]
        batch = self.make_examples(ids.ravel(), index.ravel())
        return jax.tree.map(lambda x: x.reshape(*ids.shape, -1), batch)

    def validation(self) -> Iterator[Batch]:
        """One pass over the whole validation text, in batches of one microbatch: [rows, length]. Always the same."""
        e = self.experiment
        rows = e.train.batch_size // e.train.microbatches
        for number, windowed in enumerate(self.validation_streams):
            for first in range(0, windowed.windows_per_pass, rows):
                index = np.arange(first, first + rows)
                negatives = windowed.shuffled(index) if self.objective.needs_negatives() else None
                rngs = (np.random.default_rng((e.seed, VALIDATION_EXAMPLE, number, int(i))) for i in index)
                yield self.make_batch(windowed.in_order(index), rngs, negatives)

    def device_batch(self, step: int, mesh: jax.sharding.Mesh) -> Batch:
        """`host_batch(step)` sharded over the mesh; each host makes only the rows of its own devices."""
        began = time.perf_counter()
        t = self.experiment.train
        shape = (t.microbatches, t.batch_size // t.microbatches, self.experiment.model.context_length)
        layout = sharding.named_sharding(("microbatch", "batch", "length"), shape, mesh)
        local = self.host_batch(step, _local_columns(layout, shape) if jax.process_count() > 1 else None)
        batch = jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, x, shape), local)
        self.seconds += time.perf_counter() - began
        return batch


def mixture(shares: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A cycle of `CYCLE` samples in which every source has its share (to the nearest sample, and at least one).

    Returns, for each sample of the cycle, its source and its rank among the samples of that source; and the number of
    samples of each source in a cycle.
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


def positions_within(segments: np.ndarray) -> np.ndarray:
    """For each token, how many tokens of its segment come before it in the row: int32 [rows, length]."""
    places = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1, dtype=np.int32)


def _take(parts: list[Windows], order: np.ndarray) -> Windows:
    """Rows of all parts, one part after the other, in a new order."""

    def join(arrays: tuple[Any, ...]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)[order]

    return Windows(*map(join, zip(*parts, strict=True)))


def _local_columns(layout: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    indices = layout.addressable_devices_indices_map(shape).values()
    columns = [np.arange(shape[1])[index[1]] for index in indices if index is not None]
    return np.unique(np.concatenate(columns))
