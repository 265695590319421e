"""Text in, text out: encodes prompts, generates and decodes; with stop strings, streaming and n texts per prompt."""

import codecs
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gptjax.errors import PromptError
from gptjax.inference.beams import BeamConfig, beam_search
from gptjax.inference.cache import is_unbounded
from gptjax.inference.drafters import Drafter
from gptjax.inference.engine import Engine, make_engine
from gptjax.inference.generate import Request, Step, TokenConstraint, generate
from gptjax.inference.pretrained import Pretrained
from gptjax.inference.sampling import SamplingParams
from gptjax.inference.speculative import Tally, speculate

DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Completion:
    """A generated continuation."""

    ids: np.ndarray  # int32, including a token that ended the text
    text: str  # cut before a stop string
    logprobs: np.ndarray  # float32: log-probabilities under the model, before sampling parameters
    finish_reason: Literal["stop", "length"]  # a stop token, stop string or grammar ended it, or the length limit

    @property
    def finished(self) -> bool:
        """Whether the text ended by itself, not by the length limit."""
        return self.finish_reason == "stop"


class StopCondition:
    """A `TokenConstraint` that ends a text at a stop token, or as soon as it contains a stop string."""

    def __init__(self, id_to_bytes: Sequence[bytes], tokens: Sequence[int], strings: Sequence[str]):
        self.id_to_bytes, self.tokens = id_to_bytes, frozenset(tokens)
        self.strings = [s.encode(errors="replace") for s in strings]
        self.text, self.finished = b"", False

    def allowed(self) -> None:
        return None

    def accept(self, token: int) -> bool:
        search_from = max(0, len(self.text) - max(map(len, self.strings), default=0) + 1)
        self.finished = token in self.tokens
        if not self.finished:
            self.text += self.id_to_bytes[token]
        if found := [at for s in self.strings if (at := self.text.find(s, search_from)) >= 0]:
            self.text, self.finished = self.text[: min(found)], True
        return self.finished

    @property
    def num_final_bytes(self) -> int:
        """How many bytes of the text are final: the last ones may be the beginning of a stop string."""
        if self.finished:
            return len(self.text)
        prefixes = [n for s in self.strings for n in range(1, len(s)) if self.text.endswith(s[:n])]
        return len(self.text) - max(prefixes, default=0)


class Generator:
    """A model and its tokenizer, ready to generate. `dtype` as for `make_engine`."""

    def __init__(self, pretrained: Pretrained, dtype: str | None = None):
        self.pretrained, self.tokenizer = pretrained, pretrained.tokenizer
        self.engine: Engine = make_engine(pretrained, dtype)

    def encode(self, prompt: str | np.ndarray) -> np.ndarray:
        """The prompt's ids. An empty prompt becomes what precedes a document: the EOS token, else a line break."""
        if isinstance(prompt, np.ndarray):
            return prompt.astype(np.int32)
        ids = self.tokenizer.encode_prompt(prompt)
        if len(ids):
            return ids
        first = self.tokenizer.eos_id
        if first is None:
            first = self.tokenizer.id_to_bytes.index(b"\n") if b"\n" in self.tokenizer.id_to_bytes else 0
        return np.array([first], np.int32)

    def resolve_max_new_tokens(
        self, prompt: str | np.ndarray, max_length: int | None = None, max_new_tokens: int | None = None
    ) -> int:
        """The smaller of the given limits; without any what fits into the context, at most 256."""
        length = len(self.encode(prompt))
        if max_length is not None and max_length <= length:
            raise PromptError(
                f"max_length = {max_length}: the prompt alone has {length} tokens; choose a larger number"
            )
        if max_new_tokens is not None and max_new_tokens < 0:
            raise PromptError(f"max_new_tokens = {max_new_tokens}: must be at least 0")
        limits = [] if max_new_tokens is None else [max_new_tokens]
        if max_length is not None:
            limits.append(max_length - length)
        if limits:
            return min(limits)
        if is_unbounded(self.engine.config):
            return DEFAULT_MAX_NEW_TOKENS
        return min(DEFAULT_MAX_NEW_TOKENS, max(1, self.engine.config.context_length - length))

    def generate(
        self,
        prompts: Sequence[str | np.ndarray],
        new_tokens: int | Sequence[int],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        stop: Sequence[str] = (),
        seeds: int | Sequence[int] = 0,
        count: int = 1,
        constraints: Sequence[TokenConstraint] = (),
        drafter: Drafter | None = None,
        tally: Tally | None = None,
    ) -> list[Completion]:
        """`count` completions of each prompt, those of one prompt together. The same seed gives the same texts.

        `new_tokens`, `sampling` and `seeds`: one for all prompts, or one per prompt. `constraints`: one per completion.
        `drafter`: uses speculative decoding, whose accepted tokens `tally` counts.
        """
        if sampling is None:
            sampling = SamplingParams()
        settings = zip(
            prompts, _per_prompt(new_tokens, prompts), _per_prompt(sampling, prompts), _per_prompt(seeds, prompts),
            strict=True,
        )  # fmt: skip
        requests: list[Request] = []
        stops: list[StopCondition] = []
        for prompt, max_tokens, params, seed in settings:
            for copy in range(count):
                stops.append(self._stop_condition(stop))
                own = (stops[-1], *constraints[len(requests) : len(requests) + 1])
                requests.append(Request(self.encode(prompt), max_tokens, params, seed, copy, own))
        if drafter:
            tally = tally or Tally(num_draft_tokens=4)
            steps = list(speculate(self.engine, requests, drafter, tally.num_draft_tokens, tally))
        else:
            steps = list(generate(self.engine, requests))
        return [_completion(row, steps, stop_condition) for row, stop_condition in enumerate(stops)]

    def search(
        self, prompt: str | np.ndarray, new_tokens: int, sampling: SamplingParams, beam_config: BeamConfig
    ) -> list[Completion]:
        """The most likely continuations that beam search finds, best first."""
        request = Request(self.encode(prompt), new_tokens, dataclasses.replace(sampling, temperature=0))
        stop_tokens = self._stop_condition(()).tokens
        completions = []
        for found in beam_search(self.engine, request, beam_config, tuple(sorted(stop_tokens))):
            text = self.tokenizer.decode(i for i in found.ids if i not in stop_tokens)
            reason: Literal["stop", "length"] = "stop" if found.finished else "length"
            completions.append(Completion(found.ids, text, np.zeros(0, np.float32), reason))
        return completions

    def texts(self, prompt: str, new_tokens: int, count: int, sampling: SamplingParams, seed: int) -> list[str]:
        """`count` texts, each the prompt and a continuation."""
        return [prompt + c.text for c in self.generate([prompt], new_tokens, sampling, seeds=seed, count=count)]

    def stream(
        self, prompt: str | np.ndarray, new_tokens: int, sampling: SamplingParams, seed: int = 0,
        stop: Sequence[str] = (), constraints: Sequence[TokenConstraint] = (),
    ) -> Iterator[str]:  # fmt: skip
        """The continuation in parts, as it is generated; a part never ends inside a character or a stop string."""
        stop_condition = self._stop_condition(stop)
        request = Request(self.encode(prompt), new_tokens, sampling, seed, constraints=(stop_condition, *constraints))
        steps = generate(self.engine, [request])  # outside of the generator below, so that it raises immediately
        return self._parts(steps, stop_condition)

    def _parts(self, steps: Iterator[Step], stop_condition: StopCondition) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        num_yielded = 0
        for _ in steps:
            yield decoder.decode(stop_condition.text[num_yielded : stop_condition.num_final_bytes])
            num_yielded = max(num_yielded, stop_condition.num_final_bytes)
        yield decoder.decode(stop_condition.text[num_yielded:], final=True)

    def _stop_condition(self, strings: Sequence[str]) -> StopCondition:
        if "" in strings:
            raise PromptError("stop: an empty string would end every text; remove it")
        special = self.tokenizer.special_tokens  # never in a decoded text: as a stop string it is a stop token
        tokens = {*self.pretrained.stop_tokens, *(special[s] for s in strings if s in special)}
        if self.tokenizer.eos_id is not None:
            tokens.add(self.tokenizer.eos_id)
        return StopCondition(self.tokenizer.id_to_bytes, sorted(tokens), [s for s in strings if s not in special])


def _per_prompt(value: Any, prompts: Sequence[Any]) -> Sequence[Any]:
    """A setting for each prompt, given as one for all or one per prompt."""
    return value if isinstance(value, Sequence) else [value] * len(prompts)


def _completion(row: int, steps: Sequence[Step], stop_condition: StopCondition) -> Completion:
    own = [s for s in steps if s.live[row]]
    ids = np.array([s.tokens[row] for s in own], np.int32)
    logprobs = np.array([s.logprobs[row] for s in own], np.float32)
    text = stop_condition.text.decode(errors="replace")
    finished = bool(own) and bool(own[-1].finished[row])
    return Completion(ids, text, logprobs, "stop" if finished else "length")


def resolve_sampling_params(pretrained: Pretrained, **given: object) -> SamplingParams:
    """The given parameters; the model's own defaults replace those that are None."""
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(SamplingParams(), **(pretrained.generation_config | chosen))
