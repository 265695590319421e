"""`gptjax sample`: continue a text."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from gptjax.commands import check_unused, for_terminal, parse, start_jax, without_run
from gptjax.commands.options import (
    Checkpoint,
    DtypeOption,
    FileOption,
    IntOption,
    ModelArgument,
    ModelOption,
    TextOption,
)
from gptjax.commands.sampling_options import (
    NEEDS_SAMPLING,
    SamplingOptions,
    open_generator,
    read_file,
    sampling_params,
    unused_when_greedy,
)
from gptjax.errors import EXIT_FAILED, PromptError

if TYPE_CHECKING:
    from gptjax.inference.constrained import Grammar, GrammarConstraint
    from gptjax.inference.drafters import Drafter
    from gptjax.inference.generator import Completion, Generator
    from gptjax.inference.sampling import SamplingParams

MAX_SEQUENCES = 10_000


@dataclass(frozen=True)
class BeamOptions:
    """Search for the most likely text instead of sampling."""

    num_beams: int = 1  # texts that are extended in parallel; 1: off
    length_penalty: float = 1.0  # above 0 prefers longer texts


@dataclass(frozen=True)
class SpeculativeOptions:
    """Speculative decoding: the same distribution of texts, with fewer calls of the model."""

    draft: ModelOption = None  # a smaller model with the same tokenizer that proposes tokens
    prompt_lookup: int = 0  # propose what followed the last few tokens (at most this many) earlier in the text; 0: off
    draft_tokens: int = 4  # tokens that are proposed for each call of the model


@dataclass(frozen=True)
class ConstraintOptions:
    """Restrict every text; give one of these."""

    json_schema: FileOption = None  # a file with a JSON schema
    regex: TextOption = None  # a regular expression that matches the whole text
    grammar: FileOption = None  # a file with a grammar in Lark's notation


@dataclass(frozen=True)
class Sample:
    """Continue a text."""

    model: ModelArgument
    prompt: Annotated[Positional[str], tyro.conf.arg(metavar="[PROMPT]")] = ""  # "": start a new document
    prompts: FileOption = None  # a file with one prompt per line, instead of PROMPT
    max_length: IntOption = None  # tokens including the prompt; None: what fits into the context, at most 256 new
    max_new_tokens: IntOption = None  # tokens without the prompt
    num_return_sequences: int = 1  # continuations of each prompt
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT ...")] = ()  # end at these strings, and omit them
    stop_tokens: Annotated[tuple[int, ...], tyro.conf.arg(metavar="ID ...")] = ()  # end at these tokens as well
    seed: int = 0  # the same seed gives the same text
    dtype: DtypeOption = None  # None: the model's own; int8: 8-bit weights
    logprobs: bool = False  # also print the log-probability of every token
    json: bool = False  # print one JSON object per text
    checkpoint: Checkpoint = "last"  # of a run
    sampling: OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)
    beam_search: OmitArgPrefixes[BeamOptions] = dataclasses.field(default_factory=BeamOptions)
    speculative_decoding: OmitArgPrefixes[SpeculativeOptions] = dataclasses.field(default_factory=SpeculativeOptions)
    constraint: OmitArgPrefixes[ConstraintOptions] = dataclasses.field(default_factory=ConstraintOptions)

    @property
    def streams(self) -> bool:
        """Whether a single text is printed while it is generated."""
        speculates = self.speculative_decoding.draft or self.speculative_decoding.prompt_lookup
        return not (self.json or self.logprobs or self.beam_search.num_beams != 1 or speculates)


def sample(arguments: list[str]) -> None:
    """MODEL and a prompt -> continuations on stdout."""
    options: Sample = parse(Sample, arguments, "sample")
    _check_unused(options)
    start_jax()
    generator = open_generator(options.model, options.checkpoint, options.dtype)
    _add_stop_tokens(options, generator)
    prompts = _prompts(options)
    params = sampling_params(options, generator)
    lengths = [generator.resolve_max_new_tokens(p, options.max_length, options.max_new_tokens) for p in prompts]
    grammar = _grammar(options.constraint, generator)
    if options.streams and len(prompts) == options.num_return_sequences == 1:
        _stream(options, generator, prompts[0], lengths[0], params, grammar)
        return
    if not 1 <= options.num_return_sequences <= MAX_SEQUENCES:
        raise PromptError(
            f"num_return_sequences = {options.num_return_sequences}: must be at least 1 and at most {MAX_SEQUENCES:,}, "
            "which are generated together; use more commands, with another --seed, for more"
        )
    constraints = [grammar.constraint() for _ in range(len(prompts) * options.num_return_sequences)] if grammar else []
    if options.beam_search.num_beams == 1:
        completions = _generate(options, generator, prompts, lengths, params, constraints)
    else:
        completions = _search(options, generator, prompts, lengths, params)
    for i, completion in enumerate(completions):
        prompt = prompts[i // options.num_return_sequences]
        if options.json:
            _print_json(prompt, completion)
            continue
        if len(completions) > 1:
            print(f"--- {i + 1} ---")
        print(for_terminal(prompt + completion.text))
        if options.logprobs:
            _print_logprobs(generator, completion)
    _check_complete(constraints)


def _check_unused(options: Sample) -> None:
    """Raises `GptjaxError` for options without effect."""
    unused = without_run(options.model)
    if options.beam_search.num_beams > 1:
        unused["no effect with --num-beams, which does not sample"] = ("temperature", *NEEDS_SAMPLING)
        unused["not supported with --num-beams"] = (
            "draft", "prompt_lookup", "stop", "logprobs", "json_schema", "regex", "grammar",
        )  # fmt: skip
    else:
        unused |= unused_when_greedy(options) | {"no effect without --num-beams above 1": ["length_penalty"]}
    if not (options.speculative_decoding.draft or options.speculative_decoding.prompt_lookup):
        unused["no effect without --draft or --prompt-lookup"] = ("draft_tokens",)
    check_unused(options, unused)


def _add_stop_tokens(options: Sample, generator: "Generator") -> None:
    vocab_size = generator.tokenizer.vocab_size
    for token in options.stop_tokens:
        if not 0 <= token < vocab_size:
            raise PromptError(f"stop_tokens: {token} is not a token id; ids are 0 to {vocab_size - 1}")
    stop_tokens = (*generator.pretrained.stop_tokens, *options.stop_tokens)
    generator.pretrained = dataclasses.replace(generator.pretrained, stop_tokens=stop_tokens)


def _prompts(options: Sample) -> list[str]:
    if options.prompts is None:
        return [options.prompt]
    prompts = read_file(options.prompts, "prompts").removesuffix("\n").split("\n")
    if options.prompt or prompts == [""]:
        raise PromptError("give either a prompt or a file of prompts with at least one line")
    return prompts


def _stream(
    options: Sample,
    generator: "Generator",
    prompt: str,
    length: int,
    params: "SamplingParams",
    grammar: "Grammar | None",
) -> None:
    """Prints one text while it is generated."""
    constraints = [grammar.constraint()] if grammar else []
    parts = generator.stream(prompt, length, params, options.seed, options.stop, constraints)
    print(for_terminal(prompt), end="", flush=True)
    for part in parts:
        print(for_terminal(part), end="", flush=True)
    print()
    _check_complete(constraints)


def _search(
    options: Sample, generator: "Generator", prompts: list[str], lengths: list[int], params: "SamplingParams"
) -> list["Completion"]:
    """The texts of beam search."""
    from gptjax.inference.beams import BeamConfig

    num_beams = options.beam_search.num_beams
    if options.num_return_sequences > num_beams > 0:
        raise PromptError(
            f"num_return_sequences = {options.num_return_sequences}: {num_beams} beams find at most {num_beams} texts"
        )
    beams = BeamConfig(num_beams, options.beam_search.length_penalty)
    completions = []
    for prompt, length in zip(prompts, lengths, strict=True):
        completions += generator.search(prompt, length, params, beams)[: options.num_return_sequences]
    return completions


def _generate(
    options: Sample,
    generator: "Generator",
    prompts: list[str],
    lengths: list[int],
    params: "SamplingParams",
    constraints: list["GrammarConstraint"],
) -> list["Completion"]:
    """Sampled or greedy texts, with speculative decoding if there is a drafter."""
    from gptjax.inference.speculative import Tally

    drafter = _drafter(options, generator)
    tally = Tally(options.speculative_decoding.draft_tokens)
    completions = generator.generate(
        prompts, lengths, params, options.stop, options.seed, options.num_return_sequences, constraints,
        drafter=drafter, tally=tally,
    )  # fmt: skip
    if drafter:
        print(
            f"{tally.tokens_per_call:.2f} tokens per call of the model ({tally.acceptance:.0%} of the draft tokens "
            f"accepted; Leviathan's formula gives {tally.expected_tokens_per_call:.2f})",
            file=sys.stderr,
        )
    return completions


def _drafter(options: Sample, generator: "Generator") -> "Drafter | None":
    from gptjax.inference.drafters import DraftModel, PromptLookup

    draft, lookup = options.speculative_decoding.draft, options.speculative_decoding.prompt_lookup
    if lookup < 0:
        raise PromptError(f"prompt_lookup = {lookup}: must be at least 0")
    if draft and lookup:
        raise PromptError("draft and prompt_lookup: give only one of them")
    if lookup:
        return PromptLookup(lookup)
    if not draft:
        return None
    draft_generator = open_generator(draft, "last", options.dtype)
    if draft_generator.tokenizer.id_to_bytes != generator.tokenizer.id_to_bytes:
        raise PromptError(f"{draft}: has other tokens than {options.model}; a draft model needs the same tokenizer")
    return DraftModel(draft_generator.engine)


def _grammar(options: ConstraintOptions, generator: "Generator") -> "Grammar | None":
    from gptjax.inference.constrained import Grammar

    given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
    if len(given) > 1:
        raise PromptError(f"{' and '.join(given)}: give only one of them")
    for name, value in given.items():
        return Grammar(generator.tokenizer, name, value if name == "regex" else read_file(value, name))
    return None


def _print_json(prompt: str, completion: "Completion") -> None:
    value = {
        "prompt": prompt,
        "text": completion.text,
        "ids": completion.ids.tolist(),
        "ended": completion.finished,
        "finish_reason": completion.finish_reason,
    }
    if len(completion.logprobs):
        value["logprobs"] = [round(float(x), 5) for x in completion.logprobs]
    print(json.dumps(value, ensure_ascii=False))


def _print_logprobs(generator: "Generator", completion: "Completion") -> None:
    for token, logprob in zip(completion.ids, completion.logprobs, strict=True):
        print(f"{logprob:10.4f}  {generator.tokenizer.id_to_bytes[token]!r}")


def _check_complete(constraints: list["GrammarConstraint"]) -> None:
    """Exits with an error if a text ended before it was complete under its grammar."""
    incomplete = sum(not c.complete for c in constraints)
    if incomplete:
        print(
            f"gptjax sample: {incomplete} of {len(constraints)} texts reached the length limit before they were "
            "complete; raise --max-new-tokens",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)
