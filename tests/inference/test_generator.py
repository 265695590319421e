"""Text in, text out: prompts, stop strings, streams that never show half a character, and rooms."""

import jax
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference.generator import Generator, Stops, recommended
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.model.gpt import init_params

MODEL = tiny_model(vocab_size=257, context_length=32)


@pytest.fixture(scope="module")
def writer():
    params = jax.tree.map(lambda x: 12 * x, jax.jit(lambda: init_params(MODEL, jax.random.key(0)))())
    return Generator(Pretrained("tiny", MODEL, params, ByteTokenizer()))


def test_streamed_text_is_the_text(writer):
    for seed in range(3):
        streamed = "".join(writer.stream("字😀", 20, SamplingParams(), seed))
        assert "字😀" + streamed == writer.texts("字😀", 20, 3, SamplingParams(), seed)[0]
    assert writer.texts("", 4, 1, SamplingParams(), seed=0)[0] is not None, "an empty prompt begins a document"


LETTERS = SamplingParams(logit_bias=tuple((i, 60.0) for i in b"abcdefghij"))


def test_a_text_ends_at_a_stop_string_which_is_left_out(writer):
    (free,) = writer.complete(["abc"], 20, LETTERS, seeds=4)
    whole = free.text
    stop = whole[5:7]
    (stopped,) = writer.complete(["abc"], 20, LETTERS, seeds=4, stop=["never seen", stop])
    assert stopped.text == whole[: whole.index(stop)] and stopped.ended and not free.ended
    assert len(stopped.ids) < len(free.ids) and np.array_equal(stopped.ids, free.ids[: len(stopped.ids)])
    assert "".join(writer.stream("abc", 20, LETTERS, 4, stop=[stop])) == stopped.text
    with pytest.raises(PromptError, match="an empty string ends every text"):
        writer.complete(["abc"], 20, stop=[""])


@settings(max_examples=200, deadline=None)
@given(made=st.text("ab", max_size=14), strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_where_they_first_end(made, strings):
    """Letter by letter; what is called certain is never taken back."""
    stops = Stops([bytes([i]) for i in range(256)], [], strings)
    shown = 0
    for end, letter in enumerate(made, 1):
        ended = stops.take(ord(letter))
        assert stops.certain >= shown and made.startswith(stops.made.decode())
        shown = stops.certain
        starts = [i for s in strings for i in range(end) if made[i:end].startswith(s)]
        assert ended == bool(starts)
        if ended:
            assert stops.made.decode() == made[: min(starts)]
            return
        assert not any(s in stops.made.decode() for s in strings)


def test_the_end_of_a_text_and_the_makers_tokens_end_it(writer):
    free = writer.complete(["abc"], 20, SamplingParams(), count=4)
    token = int(free[0].ids[3])
    ender = Generator(Pretrained("tiny", MODEL, writer.pretrained.params, ByteTokenizer(), stop_tokens=(token,)))
    for before, after in zip(free, ender.complete(["abc"], 20, SamplingParams(), count=4), strict=True):
        first = np.flatnonzero(before.ids == token)
        end = first[0] + 1 if len(first) else 20
        assert after.ids.tolist() == before.ids[:end].tolist() and after.ended == bool(len(first))


def test_one_of_each_for_every_prompt(writer):
    done = writer.complete(
        ["ab", "xyz"], [3, 5], [SamplingParams(temperature=0), SamplingParams(1.5)], seeds=[1, 2], count=2
    )
    assert [len(c.ids) for c in done] == [3, 3, 5, 5] == [len(c.logprobs) for c in done]
    assert done[0].text == done[1].text and done[2].text != done[3].text
    assert done[3].text == writer.complete(["xyz"], 5, SamplingParams(1.5), seeds=2, count=2)[1].text


def test_room_is_what_was_asked_for_and_fits(writer):
    assert writer.room("abc", None, None) == 29
    assert writer.room("abc", 10, None) == 7
    assert writer.room("abc", 10, 4) == 4
    with pytest.raises(PromptError, match="max_length = 3: the prompt alone has 3 tokens"):
        writer.room("abc", 3, None)
    char = tiny_model(vocab_size=3)
    letters = Generator(Pretrained("c", char, init_params(char, jax.random.key(0)), CharTokenizer("\nab", False)))
    assert letters.encode("").tolist() == [0]


def test_what_is_asked_for_comes_before_what_is_recommended(writer):
    made = Pretrained("m", MODEL, {}, ByteTokenizer(), generation_config=dict(temperature=0.6, top_p=0.9))
    assert recommended(made, temperature=None, top_p=0.5, top_k=None) == SamplingParams(0.6, top_p=0.5)
