"""The batch at step n is a pure function of (data, seed, n), and every token is a target exactly once an epoch."""

import collections
import time

import jax
import numpy as np
import pytest
from conftest import TINY, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import sharding
from gptjax.data.batches import CYCLE, DataLoader, mixture, positions_within
from gptjax.data.prefetch import prefetch
from gptjax.data.store import Store, Stream, open_store
from gptjax.data.tokenizer import ByteTokenizer
from gptjax.data.windows import PackedStream, WindowedStream, Windows, pack, permute
from gptjax.errors import DataError
from gptjax.objectives import make_objective
from gptjax.objectives.causal import causal_batch
from gptjax.objectives.sft import answer_batch


def numbered(size: int, documents=(0,), name="numbers") -> Stream:
    """A stream in which every token is its own position."""
    return Stream(name, np.arange(size, dtype=np.uint32), np.array(documents, np.int64))


def windows_of(stream: Stream, length: int, seed=(0,), track=False) -> WindowedStream:
    return WindowedStream(stream, length, seed, track)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, (key,))) == list(range(size))


def test_permutations_are_mixed_and_differ():
    size = 1000
    orders = np.array([permute(np.arange(size), size, (7, epoch)) for epoch in range(200)])
    assert len({tuple(o) for o in orders}) == 200
    # each position gets a mean of 499.5 with standard deviation 289 / sqrt(200) = 20
    assert np.abs(orders.mean(0) - 499.5).max() < 6 * 20.4
    neighbours = np.mean(np.abs(np.diff(orders, axis=1)) == 1)
    assert neighbours < 0.01


@given(size=st.integers(2, 300), length=st.integers(1, 40), seed=st.integers(0, 1000), epoch=st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_every_token_is_a_target_exactly_once_an_epoch(size, length, seed, epoch):
    stream = windows_of(numbered(size), length, (seed,))
    count = stream.windows_per_epoch
    batch = causal_batch(stream.shuffled(np.arange(epoch * count, (epoch + 1) * count)))
    targets = batch.targets[batch.loss_weights > 0]
    assert sorted(targets) == list(range(1, size))
    assert np.array_equal(batch.tokens[batch.loss_weights > 0] + 1, targets), "each follows its input token"


@given(size=st.integers(2, 300), length=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_validation_is_one_plain_pass(size, length):
    stream = windows_of(numbered(size), length)
    batch = causal_batch(stream.in_order(np.arange(-(-stream.num_targets // length))))
    assert list(batch.targets[batch.loss_weights > 0]) == list(range(1, size))


def test_windows_start_elsewhere_in_each_epoch():
    stream = windows_of(numbered(1000), 10)
    first = [
        stream.shuffled(np.arange(e * stream.windows_per_epoch, (e + 1) * stream.windows_per_epoch)).ids[:, 0] % 10
        for e in range(8)
    ]
    assert len({collections.Counter(phase).most_common(1)[0][0] for phase in first}) > 2


def make_batches(sizes, weights=(), seed=0, **changes) -> DataLoader:
    streams = tuple(
        Stream(f"s{i}", np.arange(size, dtype=np.uint32) + 10_000 * i, np.array([0])) for i, size in enumerate(sizes)
    )
    e = TINY.override({"data.source": tuple(s.name for s in streams), "data.weights": weights, "seed": seed, **changes})
    return DataLoader(Store(None, "key", ByteTokenizer(), streams, streams), e, make_objective(e))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 400), min_size=1, max_size=3),
    batch_size=st.sampled_from([2, 4, 6]),
    step=st.integers(0, 10_000),
    seed=st.integers(0, 100),
)
def test_batches_do_not_depend_on_hosts_or_microbatches(sizes, batch_size, step, seed):
    loader = make_batches(sizes, seed=seed, **{"train.batch_size": batch_size})
    expected = loader.host_batch(step)
    again = make_batches(sizes, seed=seed, **{"train.batch_size": batch_size})
    np.testing.assert_array_equal(expected.tokens, again.host_batch(step).tokens)
    halves = make_batches(sizes, seed=seed, **{"train.batch_size": batch_size, "train.microbatches": 2})
    np.testing.assert_array_equal(halves.host_batch(step).tokens.reshape(expected.tokens.shape), expected.tokens)
    for host in range(2):  # two hosts, each with its own columns only
        columns = np.arange(host, batch_size, 2)
        np.testing.assert_array_equal(loader.host_batch(step, columns).targets, expected.targets[:, columns])
    twice = make_batches(sizes, seed=seed, **{"train.batch_size": 2 * batch_size})
    np.testing.assert_array_equal(
        twice.host_batch(step).tokens[0],
        np.concatenate([loader.host_batch(2 * step).tokens[0], loader.host_batch(2 * step + 1).tokens[0]]),
    )


def test_every_source_of_a_mixture_keeps_its_epochs():
    batches = make_batches([330, 170], weights=(3.0, 1.0), **{"train.batch_size": 8})
    first, second = (w.windows_per_epoch for w in batches.train_streams)
    samples = 0
    counts = collections.Counter()
    while samples < 4 * CYCLE:
        batch = batches.host_batch(samples // 8)
        counts.update(batch.targets[batch.loss_weights > 0].tolist())
        samples += 8
    in_first = [counts[i] for i in range(1, 330)]
    in_second = [counts[10_000 + i] for i in range(1, 170)]
    # after s samples of a source every token was a target floor(s / windows) times or once more
    assert set(in_first) <= {3 * CYCLE // first, 3 * CYCLE // first + 1}
    assert set(in_second) <= {CYCLE // second, CYCLE // second + 1}


@given(shares=st.lists(st.floats(0.001, 1), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_a_mixture_cycle_has_the_shares(shares):
    shares = np.array(shares) / sum(shares)
    sources, ranks, counts = mixture(shares, (1,))
    assert counts.sum() == CYCLE == len(sources) and counts.min() >= 1
    assert np.abs(counts - shares * CYCLE).max() <= len(shares)
    for i, count in enumerate(counts):
        assert sorted(ranks[sources == i]) == list(range(count))
        assert np.all(np.diff(ranks[sources == i]) == 1)


def test_without_weights_sources_count_by_their_size():
    batches = make_batches([3000, 1000])
    assert batches.per_cycle[0] / CYCLE == pytest.approx(0.75, abs=0.002)


def test_the_seed_changes_the_order():
    first, second = (make_batches([500], seed=seed).host_batch(0) for seed in (0, 1))
    assert not np.array_equal(first.tokens, second.tokens)


def test_document_masks_follow_the_documents():
    stream = windows_of(numbered(20, documents=(0, 5, 12)), 10, track=True)
    batch = causal_batch(stream.in_order(np.arange(2)))
    assert batch.segment_ids.tolist() == [[1] * 5 + [2] * 5, [1, 1] + [2] * 7 + [2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.loss_weights.tolist() == [[1, 1, 1, 1, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1, 1, 0]]


def test_padding_is_a_separate_document():
    ids = np.array([[3, 4, 5, 0, 0]], np.int32)
    batch = causal_batch(Windows(ids, ids > 0, np.array([[1, 1, 1, 0, 0]], np.int32)))
    assert batch.loss_weights.tolist() == [[1, 1, 0, 0]] and batch.segment_ids.tolist() == [[1, 1, 1, 0]]


@given(st.lists(st.lists(st.integers(1, 3), min_size=6, max_size=6).map(sorted), min_size=1, max_size=4))
def test_positions_restart_with_each_segment(rows):
    segments = np.array(rows)
    expected = [[row[:i].count(s) for i, s in enumerate(row)] for row in segments.tolist()]
    assert positions_within(segments).tolist() == expected


def test_the_global_batch_is_the_same_on_every_mesh():
    batches = make_batches([500])
    for data, model in ((1, 1), (8, 1), (4, 2), (2, 4)):
        mesh = sharding.mesh_of(jax.devices()[: data * model], data, model)
        placed = batches.device_batch(3, mesh)
        np.testing.assert_array_equal(placed.tokens, batches.host_batch(3).tokens)
        assert placed.tokens.sharding.spec[1] == ("cores", "data")


def test_a_text_shorter_than_a_window_is_refused(tmp_path):
    e = TINY.override({"data.source": str(write_corpus(tmp_path, 100)), "model.context_length": 4096})
    with pytest.raises(DataError, match="fewer than one window of"):
        DataLoader(open_store(e.data), e, make_objective(e))


def test_prefetch_keeps_the_order_runs_ahead_and_stops():
    made = []

    def make(step):
        made.append(step)
        return step

    batches = prefetch(make, range(5, 100), depth=2)
    assert [next(batches) for _ in range(3)] == [5, 6, 7]
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made[:5] == [5, 6, 7, 8, 9] and len(made) <= 6
    batches.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count, "a closed prefetch makes no more batches"


def test_an_error_in_the_thread_is_raised_in_the_caller():
    def make(step):
        if step == 2:
            raise DataError("step 2 is bad")
        return step

    batches = prefetch(make, range(10), depth=1)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError, match="step 2 is bad"):
        next(batches)


def test_the_permutation_of_an_epoch_needs_no_memory():
    assert permute(np.array([0, 10**12 - 1]), 10**12, (1,)).max() < 10**12


def test_a_run_resumes_at_its_next_example(tmp_path):
    """Another batch size keeps the order of examples; another context length begins a new one; both are counted."""

    def batches(**changes) -> DataLoader:
        e = TINY.override({"data.source": str(write_corpus(tmp_path))} | changes)
        return DataLoader(open_store(e.data), e.resolved(257), make_objective(e))

    first = batches()
    position = first.position(10)
    assert (position.samples, position.tokens, position.next_example) == (80, 80 * 16, 80)
    larger = batches(**{"train.batch_size": 12})
    larger.seek(position)
    assert larger.example_ids(10).ravel().tolist() == list(range(80, 92))
    np.testing.assert_array_equal(larger.host_batch(10).tokens[0], first.make_examples(np.arange(80, 92)).tokens)
    assert larger.position(10) == position and larger.position(12)[:4] == (12, 104, 104 * 16, 104)
    longer = batches(**{"model.context_length": 32})
    longer.seek(larger.position(12))
    assert longer.example_ids(12).ravel().tolist() == list(range(8))
    assert longer.position(13)[:4] == (13, 112, 104 * 16 + 8 * 32, 8)
    again = batches(**{"model.context_length": 32})
    again.seek(longer.position(13))
    assert again.example_ids(13).ravel().tolist() == list(range(8, 16)), "in the new order"


def packed(lengths, length: int, seed=(0,)) -> PackedStream:
    """Examples of these lengths, in which every token is its own position and the second half is the answer."""
    starts = np.cumsum([0, *lengths])
    loss_mask = np.concatenate([np.arange(n) >= (n + 1) // 2 for n in lengths])
    stream = Stream("examples", np.arange(starts[-1], dtype=np.uint32), starts[:-1], loss_mask)
    return PackedStream(stream, length, seed)


@given(lengths=st.lists(st.integers(2, 17), min_size=1, max_size=60), seed=st.integers(0, 99), epoch=st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_example_once_unsplit_and_in_its_own_segment(lengths, seed, epoch):
    stream = packed(lengths, 16, (seed,))
    count = stream.windows_per_epoch
    windows = stream.shuffled(np.arange(epoch * count, (epoch + 1) * count))
    ids = windows.ids[windows.valid]
    assert sorted(ids) == list(range(sum(lengths)))
    batch = answer_batch(windows)
    is_target = batch.loss_weights > 0
    assert sorted(batch.targets[is_target]) == list(np.flatnonzero(stream.loss_mask)), "every answer token once"
    np.testing.assert_array_equal(batch.tokens[is_target] + 1, batch.targets[is_target])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(len(windows.ids)):
        inside = windows.valid[row]
        own, numbers = owner[windows.ids[row][inside]], windows.document_ids[row][inside]
        assert len(set(zip(own, numbers, strict=True))) == len(set(own)) == len(set(numbers))


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80))
def test_packing_loses_no_example_and_is_nearly_optimal(lengths):
    packs = pack(np.array(lengths), 20)
    assert sorted(i for p in packs for i in p) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in p) for p in packs]
    fewest = max(-(-sum(lengths) // 20), sum(length > 10 for length in lengths))
    assert max(filled) <= 20 and len(packs) <= 1.5 * fewest + 1, "best-fit decreasing is near the optimum"


def test_a_long_example_loses_its_beginning_and_its_answers_must_fit(tmp_path):
    stream = packed([30, 8], 20)
    assert stream.num_truncated == 1 and stream.starts.tolist() == [9, 30]
    with pytest.raises(DataError, match=r"row 1: its answers are 30 tokens long, and model.context_length = 20 must"):
        (tmp_path / "origins").write_text("table.csv, row 1\ntable.csv, row 2")
        first = Stream("x", np.arange(68), np.array([0, 60]), np.arange(68) % 60 >= 30, tmp_path / "origins")
        PackedStream(first, 20, (0,))
