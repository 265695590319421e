"""Everything that a model with random weights generates under a grammar parses: checked by json, re and by hand."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import tiny_model

pytest.importorskip("llguidance")

from gptjax.data.tokenizer import ByteTokenizer, CharTokenizer
from gptjax.errors import PromptError
from gptjax.inference.constrained import Grammar
from gptjax.inference.drafters import PromptLookup
from gptjax.inference.generate import generate
from gptjax.inference.generator import Generator
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.speculative import speculate
from gptjax.model.gpt import init_params

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "c\n"]}, "maxItems": 3},
        "height": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def generator_of(tokenizer):
    model = tiny_model(vocab_size=tokenizer.vocab_size + 3, context_length=64, positions="rope")
    return Generator(Pretrained("random", model, init_params(model, jax.random.key(0)), tokenizer))


@pytest.fixture(scope="module")
def generator():
    return generator_of(ByteTokenizer())


def texts(generator, grammar, count=12, sampling=None, new_tokens=400):
    constraints = [grammar.constraint() for _ in range(count)]
    done = generator.generate(
        ["The answer: "], new_tokens, sampling or SamplingParams(), count=count, constraints=constraints
    )
    assert all(c.finished for c in done) and all(g.complete for g in constraints)
    return [c.text for c in done]


def test_every_sample_fits_the_json_schema(generator):
    found = [
        json.loads(text) for text in texts(generator, Grammar(generator.tokenizer, "json_schema", json.dumps(SCHEMA)))
    ]
    for value in found:
        assert value.keys() <= SCHEMA["properties"].keys() and {"name", "age", "tags"} <= value.keys()
        assert isinstance(value["name"], str) and len(value["name"]) <= 12
        assert 0 <= value["age"] <= 150 and len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "bé", "c\n"}
        assert value.get("height") in (None, True, False)
    assert len({json.dumps(v) for v in found}) > 6, "they are sampled"


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-z]{2,5}", r"(yes|no|né)!?", r"[0-9]{1,4}\.[^a-y]{2}"])
def test_every_sample_matches_the_expression(generator, pattern):
    made = texts(generator, Grammar(generator.tokenizer, "regex", pattern), sampling=SamplingParams(temperature=2.0))
    assert all(re.fullmatch(pattern, text) for text in made) and len(set(made)) > 1
    greedy = texts(generator, Grammar(generator.tokenizer, "regex", pattern), 2, SamplingParams(temperature=0))
    assert greedy[0] == greedy[1] and re.fullmatch(pattern, greedy[0])


def test_every_sample_is_in_the_grammar_even_without_an_eos_token():
    source = 'start: sum\nsum: DIGIT ("+" DIGIT){1,4}\nDIGIT: /[0-9]/'
    tokenizer = CharTokenizer("0123456789+-ehnrswTa :.", has_eos=False)
    made = texts(generator_of(tokenizer), Grammar(tokenizer, "grammar", source))
    assert all(re.fullmatch(r"\d(\+\d){1,4}", text) for text in made)


def test_a_text_cut_at_the_length_limit_is_not_complete(generator):
    constraint = Grammar(generator.tokenizer, "regex", "[a-z]{20}").constraint()
    (done,) = generator.generate(["x"], 5, SamplingParams(), constraints=[constraint])
    assert not done.finished and not constraint.complete and re.fullmatch("[a-z]{5}", done.text)


def test_invalid_grammars_are_refused(generator):
    for kind, source, message in [
        ("regex", "(", "regex: "),
        ("json_schema", "{", "json_schema: is not JSON"),
        ("json_schema", '{"type": "colour"}', "json_schema: "),
        ("grammar", "start: nothing", "grammar: "),
    ]:
        with pytest.raises(PromptError, match=message):
            Grammar(generator.tokenizer, kind, source)


def test_no_speculative_decoding_with_a_grammar(generator):
    from gptjax.inference.generate import Request

    constraint = Grammar(generator.tokenizer, "regex", "a+").constraint()
    request = Request(np.array([1], np.int32), 4, constraints=(constraint,))
    with pytest.raises(PromptError, match="a grammar constrains every single token"):
        speculate(generator.engine, [request], PromptLookup(), 2)
    assert {int(s.tokens[0]) for s in generate(generator.engine, [request])} <= {97, 256}
