"""Text in, text out: prompts, stop strings, streams that never split a character, and length limits."""

import jax
import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference.generator import Generator, StopCondition, resolve_sampling_params
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.model.gpt import init_params

MODEL = tiny_model(vocab_size=257, context_length=32)


@pytest.fixture(scope="module")
def generator():
    params = jax.tree.map(lambda x: 12 * x, jax.jit(lambda: init_params(MODEL, jax.random.key(0)))())
    return Generator(Pretrained("tiny", MODEL, params, ByteTokenizer()))


def test_streamed_text_is_the_text(generator):
    for seed in range(3):
        streamed = "".join(generator.stream("字😀", 20, SamplingParams(), seed))
        assert "字😀" + streamed == generator.texts("字😀", 20, 3, SamplingParams(), seed)[0]
    assert generator.texts("", 4, 1, SamplingParams(), seed=0)[0] is not None, "an empty prompt begins a document"


LETTERS = SamplingParams(logit_bias=tuple((i, 60.0) for i in b"abcdefghij"))


def test_a_text_ends_at_a_stop_string_which_is_left_out(generator):
    (free,) = generator.generate(["abc"], 20, LETTERS, seeds=4)
    whole = free.text
    stop = whole[5:7]
    (stopped,) = generator.generate(["abc"], 20, LETTERS, seeds=4, stop=["never seen", stop])
    assert (
        stopped.text == whole[: whole.index(stop)]
        and stopped.finish_reason == "stop"
        and free.finish_reason == "length"
    )
    assert len(stopped.ids) < len(free.ids) and np.array_equal(stopped.ids, free.ids[: len(stopped.ids)])
    assert "".join(generator.stream("abc", 20, LETTERS, 4, stop=[stop])) == stopped.text
    with pytest.raises(PromptError, match="an empty string would end every text"):
        generator.generate(["abc"], 20, stop=[""])


@settings(max_examples=200, deadline=None)
@given(made=st.text("ab", max_size=14), strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_where_they_first_end(made, strings):
    """Letter by letter; final bytes never change."""
    stops = StopCondition([bytes([i]) for i in range(256)], [], strings)
    num_final = 0
    for end, letter in enumerate(made, 1):
        finished = stops.accept(ord(letter))
        assert stops.num_final_bytes >= num_final and made.startswith(stops.text.decode())
        num_final = stops.num_final_bytes
        starts = [i for s in strings for i in range(end) if made[i:end].startswith(s)]
        assert finished == bool(starts)
        if finished:
            assert stops.text.decode() == made[: min(starts)]
            return
        assert not any(s in stops.text.decode() for s in strings)


def test_stop_tokens_of_the_model_end_a_text(generator):
    free = generator.generate(["abc"], 20, SamplingParams(), count=4)
    token = int(free[0].ids[3])
    ender = Generator(Pretrained("tiny", MODEL, generator.pretrained.params, ByteTokenizer(), stop_tokens=(token,)))
    for before, after in zip(free, ender.generate(["abc"], 20, SamplingParams(), count=4), strict=True):
        first = np.flatnonzero(before.ids == token)
        end = first[0] + 1 if len(first) else 20
        assert after.ids.tolist() == before.ids[:end].tolist() and after.finished == bool(len(first))


@pytest.mark.slow
def test_one_of_each_for_every_prompt(generator):
    done = generator.generate(
        ["ab", "xyz"], [3, 5], [SamplingParams(temperature=0), SamplingParams(1.5)], seeds=[1, 2], count=2
    )
    assert [len(c.ids) for c in done] == [3, 3, 5, 5] == [len(c.logprobs) for c in done]
    assert done[0].text == done[1].text and done[2].text != done[3].text
    assert done[3].text == generator.generate(["xyz"], 5, SamplingParams(1.5), seeds=2, count=2)[1].text


def test_max_new_tokens_is_the_given_limit_or_what_fits(generator):
    assert generator.resolve_max_new_tokens("abc", None, None) == 29
    assert generator.resolve_max_new_tokens("abc", 10, None) == 7
    assert generator.resolve_max_new_tokens("abc", 10, 4) == 4
    with pytest.raises(PromptError, match="max_length = 3: the prompt alone has 3 tokens"):
        generator.resolve_max_new_tokens("abc", 3, None)
    char = tiny_model(vocab_size=3)
    letters = Generator(Pretrained("c", char, init_params(char, jax.random.key(0)), CharTokenizer("\nab", False)))
    assert letters.encode("").tolist() == [0]


def test_given_sampling_params_come_before_the_generation_config(generator):
    made = Pretrained("m", MODEL, {}, ByteTokenizer(), generation_config=dict(temperature=0.6, top_p=0.9))
    assert resolve_sampling_params(made, temperature=None, top_p=0.5, top_k=None) == SamplingParams(0.6, top_p=0.5)
