"""Text in, text out: prompts are encoded, generated from and decoded; stop strings, streams and n texts a prompt."""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptjax.errors import PromptError
from gptjax.inference.beams import BeamConfig, beam_search
from gptjax.inference.cache import rolls
from gptjax.inference.engine import Engine, make_engine
from gptjax.inference.generate import Request, TokenConstraint, generate
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.speculative import Drafter, Tally, speculate

MOST_UNASKED = 256  # tokens to make where no number is asked for


@dataclass(frozen=True)
class Completion:
    """What was made from one prompt."""

    ids: np.ndarray  # int32: the continuation, a token that ended it included
    text: str  # of the continuation, cut before a stop string
    logprobs: np.ndarray  # float32: ln of each token's probability under the model, before any rule
    ended: bool  # by itself, and not because no more tokens were asked for


class Stops:
    """A `TokenConstraint` that ends a text at one of some tokens, or as soon as it contains one of some strings."""

    def __init__(self, pieces: Sequence[bytes], tokens: Sequence[int], strings: Sequence[str]):
        self.pieces, self.tokens = pieces, frozenset(tokens)
        self.strings = [s.encode(errors="replace") for s in strings]
        self.made, self.ended = b"", False

    def allowed(self) -> None:
        return None

    def take(self, token: int) -> bool:
        searched = max(0, len(self.made) - max(map(len, self.strings), default=0) + 1)
        self.made += b"" if token in self.tokens else self.pieces[token]
        self.ended = token in self.tokens
        if found := [at for s in self.strings if (at := self.made.find(s, searched)) >= 0]:
            self.made, self.ended = self.made[: min(found)], True
        return self.ended

    @property
    def certain(self) -> int:
        """How many of the bytes made so far will stay: the last ones may be the beginning of a stop string."""
        if self.ended:
            return len(self.made)
        begun = [n for s in self.strings for n in range(1, len(s)) if self.made.endswith(s[:n])]
        return len(self.made) - max(begun, default=0)


class Generator:
    """A model and its tokenizer, ready to write. `numbers` as for `make_engine`."""

    def __init__(self, pretrained: Pretrained, numbers: str | None = None):
        self.pretrained, self.tokenizer = pretrained, pretrained.tokenizer
        self.engine: Engine = make_engine(pretrained, numbers)

    def encode(self, prompt: str | np.ndarray) -> np.ndarray:
        """The prompt's ids; for an empty one what a document begins after: the end of another, or a line break."""
        if isinstance(prompt, np.ndarray):
            return prompt.astype(np.int32)
        ids = self.tokenizer.encode_prompt(prompt)
        if len(ids):
            return ids
        if self.tokenizer.eos_id is not None:
            return np.array([self.tokenizer.eos_id], np.int32)
        return np.array([self.tokenizer.id_to_bytes.index(b"\n") if b"\n" in self.tokenizer.id_to_bytes else 0], np.int32)

    def room(self, prompt: str | np.ndarray, max_length: int | None = None, max_new_tokens: int | None = None) -> int:
        """How many tokens to make: the smaller of what is asked for; else what the context holds, at most 256."""
        length = len(self.encode(prompt))
        if max_length is not None and max_length <= length:
            raise PromptError(f"max_length = {max_length}: the prompt alone has {length} tokens; ask for more")
        if max_new_tokens is not None and max_new_tokens < 0:
            raise PromptError(f"max_new_tokens = {max_new_tokens}: must not be negative")
        asked = [n for n in (max_length and max_length - length, max_new_tokens) if n is not None]
        if asked or rolls(self.engine.model):
            return min(asked, default=MOST_UNASKED)
        return min(MOST_UNASKED, max(1, self.engine.model.context_length - length))

    def complete(
        self,
        prompts: Sequence[str | np.ndarray],
        new_tokens: int | Sequence[int],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        seeds: int | Sequence[int] = 0,
        count: int = 1,
        guides: Sequence[TokenConstraint] = (),
        drafter: Drafter | None = None,
        tally: Tally | None = None,
    ) -> list[Completion]:
        """`count` completions of each prompt, those of one prompt together. The same seed gives the same texts.

        `new_tokens`, `sampling` and `seeds` are one for all prompts or one for each; `guides` one for each completion.
        A `drafter` makes it speculative decoding, of which `tally` keeps count.
        """
        many = len(prompts)
        lengths = [new_tokens] * many if isinstance(new_tokens, int) else new_tokens
        rules = (
            [sampling or SamplingParams()] * many
            if sampling is None or isinstance(sampling, SamplingParams)
            else sampling
        )
        own_seeds = [seeds] * many if isinstance(seeds, int) else seeds
        requests: list[Request] = []
        stops: list[Stops] = []
        for prompt, length, rule, seed in zip(prompts, lengths, rules, own_seeds, strict=True):
            for copy in range(count):
                stops.append(self._stops(stop))
                own = (stops[-1], *guides[len(requests) : len(requests) + 1])
                requests.append(Request(self.encode(prompt), length, rule, seed, copy, own))
        if drafter:
            tally = tally or Tally(guesses=4)
            steps = list(speculate(self.engine, requests, drafter, tally.guesses, tally))
        else:
            steps = list(generate(self.engine, requests))
        return [self._completion(row, steps, ends) for row, ends in enumerate(stops)]

    def search(
        self, prompt: str | np.ndarray, new_tokens: int, sampling: SamplingParams, beams: BeamConfig
    ) -> list[Completion]:
        """The likeliest continuations that beam search finds, best first."""
        request = Request(self.encode(prompt), new_tokens, dataclasses.replace(sampling, temperature=0))
        stops = self._stops(())
        found = beam_search(self.engine, request, beams, tuple(sorted(stops.tokens)))
        decode = self.tokenizer.decode
        return [Completion(f.ids, decode(i for i in f.ids if i not in stops.tokens), np.zeros(0, np.float32), f.ended)
                for f in found]  # fmt: skip

    def texts(self, prompt: str, new_tokens: int, count: int, sampling: SamplingParams, seed: int) -> list[str]:
        """`count` texts, each the prompt and a continuation."""
        return [prompt + c.text for c in self.complete([prompt], new_tokens, sampling, seeds=seed, count=count)]

    def stream(
        self, prompt: str | np.ndarray, new_tokens: int, sampling: SamplingParams, seed: int = 0,
        stop: Sequence[str] = (), guides: Sequence[TokenConstraint] = (),
    ) -> Iterator[str]:  # fmt: skip
        """The continuation in parts, as it is made; a part never ends inside a character or a stop string."""
        ends = self._stops(stop)
        request = Request(self.encode(prompt), new_tokens, sampling, seed, guides=(ends, *guides))
        return self._parts(generate(self.engine, [request]), ends)  # which refuses before the first part is asked for

    def _parts(self, steps: Iterator, ends: Stops) -> Iterator[str]:
        decoder, shown = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
        for _ in steps:
            yield decoder.decode(ends.made[shown : ends.certain])
            shown = max(shown, ends.certain)
        yield decoder.decode(ends.made[shown:], final=True)

    def _stops(self, strings: Sequence[str]) -> Stops:
        end = self.tokenizer.eos_id
        special = self.tokenizer.special_tokens  # their words are never text: a stop at one is a stop token
        tokens = {*self.pretrained.stop_tokens, *([] if end is None else [end])}
        tokens |= {special[s] for s in strings if s in special}
        if "" in strings:
            raise PromptError("stop: an empty string ends every text; leave it out")
        return Stops(self.tokenizer.id_to_bytes, sorted(tokens), [s for s in strings if s not in special])

    def _completion(self, row: int, steps: list, ends: Stops) -> Completion:
        own = [s for s in steps if s.live[row]]
        ids = np.array([s.tokens[row] for s in own], np.int32)
        logprobs = np.array([s.logprobs[row] for s in own], np.float32)
        return Completion(ids, ends.made.decode(errors="replace"), logprobs, bool(own) and bool(own[-1].ended[row]))


def recommended(pretrained: Pretrained, **asked: object) -> SamplingParams:
    """What is asked for, with what the model's makers recommend in the place of None."""
    given = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(SamplingParams(), **(pretrained.generation_config | given))
