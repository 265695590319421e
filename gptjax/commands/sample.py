"""`gptjax sample` and `gptjax chat`: text from a model."""

import dataclasses
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from gptjax.commands import check_unused, parse, start_jax, without_run
from gptjax.errors import EXIT_FAILED, GptjaxError, PromptError

if TYPE_CHECKING:
    from gptjax.inference.constrained import Grammar
    from gptjax.inference.generator import Completion, Generator
    from gptjax.inference.sampling import SamplingParams

MODEL = "a run folder, a Hugging Face folder, or the name of a model on the Hugging Face hub"
DRAWN = ("top_k", "top_p", "min_p", "seed")  # options that have an effect only where tokens are drawn


@dataclass(frozen=True)
class Drawing:
    """How tokens are chosen; None: as the model's makers recommend, else not at all (temperature: 0.8)."""

    temperature: float | None = None  # divides the logits; 0 takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest tokens that together have this probability
    min_p: float | None = None  # draw from tokens at least this many times as likely as the likeliest
    repetition_penalty: float | None = None  # above 1: tokens that the text has already become less likely
    presence_penalty: float | None = None  # taken off the logits of tokens that were made already
    frequency_penalty: float | None = None  # the same, as often as they were made
    no_repeat_ngram_size: int | None = None  # no run of this many tokens twice
    logit_bias: tuple[str, ...] = ()  # ID:NUMBER, added to the logit of a token; several may follow

    def sampling(self, writer: "Generator") -> "SamplingParams":
        from gptjax.inference.generator import recommended

        asked: dict[str, Any] = dataclasses.asdict(self) | {"logit_bias": tuple(map(_bias, self.logit_bias)) or None}
        if "temperature" not in writer.pretrained.generation_config and self.temperature is None:
            asked["temperature"] = 0.8
        return recommended(writer.pretrained, **asked)


@dataclass(frozen=True)
class Sample:
    """Continue a text."""

    model: Annotated[Positional[str], tyro.conf.arg(help=MODEL)]
    prompt: Positional[str] = ""  # what to go on from; "": the beginning of a document
    prompts: Path | None = None  # a file with one prompt a line, in the place of the one above
    max_length: int | None = None  # tokens with those of the prompt; None: as the context holds, at most 256 new
    max_new_tokens: int | None = None  # tokens without those of the prompt
    num_return_sequences: int = 1  # continuations of each prompt
    drawing: Annotated[Drawing, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Drawing)
    stop: tuple[str, ...] = ()  # strings that end a text and are left out; several may follow
    stop_tokens: tuple[int, ...] = ()  # ids of tokens that end a text, besides the model's own; several may follow
    seed: int = 0  # the same seed gives the same text
    num_beams: int = 1  # above 1: search for the likeliest text with this many at once, and draw nothing
    length_penalty: float = 1.0  # of beam search: above 0 prefers longer texts
    draft: str | None = None  # a smaller model with the same tokens that guesses what this one then checks
    prompt_lookup: int = 0  # guess what followed the last few tokens (at most this many) where they stood before
    draft_tokens: int = 4  # tokens to guess for each call of the model
    json_schema: Path | None = None  # a file with a JSON schema that every text fits
    regex: str | None = None  # a regular expression that every text matches
    grammar: Path | None = None  # a file with a grammar in Lark's notation that every text is in
    dtype: Literal["float32", "bfloat16", "int8"] | None = None  # None: the model's own; int8: 8-bit weights
    logprobs: bool = False  # also print ln of the probability of every token
    json: bool = False  # print one JSON object for each text
    checkpoint: str = "last"  # of a run: last, best, or a step


def sample(arguments: list[str]) -> None:
    """MODEL and a prompt -> continuations on stdout."""
    options: Sample = parse(Sample, arguments, "sample")
    _check_belongs(options)
    start_jax()
    writer = _writer(options.model, options.checkpoint, options.dtype)
    if strange := [i for i in options.stop_tokens if not 0 <= i < writer.tokenizer.vocab_size]:
        raise PromptError(
            f"stop_tokens: {strange[0]} is no token; there are ids 0 to {writer.tokenizer.vocab_size - 1}"
        )
    stops = (*writer.pretrained.stop_tokens, *options.stop_tokens)
    writer.pretrained = dataclasses.replace(writer.pretrained, stop_tokens=stops)
    prompts = [options.prompt]
    if options.prompts is not None:
        prompts = _read(options.prompts, "prompts").removesuffix("\n").split("\n")
        if options.prompt or prompts == [""]:
            raise PromptError("give either a prompt or a file of prompts with at least one line")
    sampling = _sampling(options, writer)
    lengths = [writer.room(p, options.max_length, options.max_new_tokens) for p in prompts]
    grammar = _grammar(options, writer)
    plain = not (options.json or options.logprobs or options.num_beams != 1 or options.draft or options.prompt_lookup)
    if plain and len(prompts) == options.num_return_sequences == 1:
        guides = [grammar.guide()] if grammar else []
        parts = writer.stream(prompts[0], lengths[0], sampling, options.seed, options.stop, guides)
        print(prompts[0], end="", flush=True)
        for part in parts:
            print(part, end="", flush=True)
        print()
        _check_whole([g.complete for g in guides])
        return
    done, whole = _complete(options, writer, prompts, lengths, sampling, grammar)
    for i, completion in enumerate(done):
        _show(options, writer, i, prompts[i // options.num_return_sequences], completion, alone=len(done) == 1)
    _check_whole(whole)


def _check_belongs(options: Sample) -> None:
    """Raises `GptjaxError` where an option would have no effect."""
    idle = without_run(options.model)
    if options.num_beams > 1:
        idle["no effect with --num-beams, which draws nothing"] = ("temperature", *DRAWN)
        idle["not possible with --num-beams"] = (
            "draft", "prompt_lookup", "stop", "logprobs", "json_schema", "regex", "grammar",
        )  # fmt: skip
    else:
        idle |= _cold(options) | {"no effect without --num-beams above 1": ["length_penalty"]}
    if not (options.draft or options.prompt_lookup):
        idle["no effect without --draft or --prompt-lookup"] = ("draft_tokens",)
    check_unused(options, idle)


def _cold(options: "Sample | Talk") -> dict[str, Iterable[str]]:
    return {"no effect at --temperature 0, which draws nothing": DRAWN} if options.drawing.temperature == 0 else {}


def _sampling(options: "Sample | Talk", writer: "Generator") -> "SamplingParams":
    """Raises `GptjaxError` where the model's makers recommend to draw nothing, and options are about drawing."""
    sampling = options.drawing.sampling(writer)
    if sampling.temperature == 0:
        check_unused(options, {"no effect at temperature 0, as the model's makers recommend; give another": DRAWN})
    return sampling


def _complete(
    options: Sample,
    writer: "Generator",
    prompts: list[str],
    lengths: list[int],
    sampling: "SamplingParams",
    grammar: "Grammar | None",
) -> tuple[list["Completion"], list[bool]]:
    """All texts, and which are whole where there is a grammar."""
    from gptjax.inference.beams import BeamConfig
    from gptjax.inference.speculative import DraftModel, PromptLookup, Tally

    if options.num_beams < 1 or options.prompt_lookup < 0:
        raise PromptError("num_beams must be at least 1, and prompt_lookup at least 0")
    if options.num_return_sequences < 1:
        raise PromptError(f"num_return_sequences = {options.num_return_sequences}: must be at least 1")
    if options.num_beams > 1:
        beams = BeamConfig(options.num_beams, options.length_penalty)
        found = [writer.search(*p, sampling, beams) for p in zip(prompts, lengths, strict=True)]
        if options.num_return_sequences > options.num_beams:
            raise PromptError(f"num_return_sequences: {options.num_beams} beams find no more texts than that")
        return [c for texts in found for c in texts[: options.num_return_sequences]], []
    guides = [grammar.guide() for _ in range(len(prompts) * options.num_return_sequences)] if grammar else []
    drafter: PromptLookup | DraftModel | None = None
    if options.draft and options.prompt_lookup:
        raise PromptError("draft and prompt_lookup: one of them can guess")
    if options.prompt_lookup:
        drafter = PromptLookup(options.prompt_lookup)
    if options.draft:
        draft = _writer(options.draft, "last", options.dtype)
        if draft.tokenizer.id_to_bytes != writer.tokenizer.id_to_bytes:
            raise PromptError(f"{options.draft}: has other tokens than {options.model}; a draft needs the same")
        drafter = DraftModel(draft.engine)
    tally = Tally(options.draft_tokens)
    done = writer.complete(
        prompts, lengths, sampling, options.stop, options.seed, options.num_return_sequences, guides,
        drafter=drafter, tally=tally,
    )  # fmt: skip
    if drafter:
        print(
            f"{tally.tokens_per_call:.2f} tokens a call of the model ({tally.acceptance:.0%} of the guesses accepted; "
            f"that many give {tally.expected_tokens_per_call:.2f} by Leviathan's formula)",
            file=sys.stderr,
        )
    return done, [g.complete for g in guides]


def _show(options: Sample, writer: "Generator", i: int, prompt: str, done: "Completion", alone: bool) -> None:
    if options.json:
        value = {"prompt": prompt, "text": done.text, "ids": done.ids.tolist(), "ended": done.ended}
        scored = {"logprobs": [round(float(x), 5) for x in done.logprobs]} if len(done.logprobs) else {}
        print(json.dumps(value | scored, ensure_ascii=False))
        return
    if not alone:
        print(f"--- {i + 1} ---")
    print(prompt + done.text)
    if options.logprobs:
        for token, logprob in zip(done.ids, done.logprobs, strict=False):
            print(f"{logprob:10.4f}  {writer.tokenizer.id_to_bytes[token]!r}")


@dataclass(frozen=True)
class Talk:
    """Talk with a model in the terminal. /reset forgets, /exit or Ctrl-D ends, Ctrl-C stops an answer."""

    model: Annotated[Positional[str], tyro.conf.arg(help=MODEL)]
    system: str | None = None  # a message that stands before all others
    max_new_tokens: int | None = None  # of an answer at most; None: 256, or half of the context
    drawing: Annotated[Drawing, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Drawing)
    seed: int = 0  # the same seed and questions give the same answers
    dtype: Literal["float32", "bfloat16", "int8"] | None = None  # None: the model's own; int8: 8-bit weights
    checkpoint: str = "last"  # of a run: last, best, or a step


def chat(arguments: list[str]) -> None:
    """MODEL -> a dialogue on the terminal."""
    options: Talk = parse(Talk, arguments, "chat")
    check_unused(options, without_run(options.model) | _cold(options))
    start_jax()
    from gptjax.inference.chat import Chat

    writer = _writer(options.model, options.checkpoint, options.dtype)
    usual = min(256, writer.engine.model.context_length // 2)
    most = usual if options.max_new_tokens is None else options.max_new_tokens
    dialogue = Chat(writer, options.system, most)
    sampling, interactive = _sampling(options, writer), sys.stdin.isatty()
    if interactive:
        how = "its own chat template" if dialogue.template else "no chat template: it goes on with a written dialogue"
        print(f"{writer.pretrained.name} ({how}); /reset forgets, /exit ends", file=sys.stderr)
    turn = 0
    while (line := _ask(interactive)) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            dialogue.reset()
            continue
        if not line:
            continue
        parts = dialogue.reply(line, sampling, options.seed + turn)
        turn += 1
        try:
            for part in parts:
                print(part, end="", flush=True)
        except GptjaxError as e:
            print(f"gptjax chat: {e}", file=sys.stderr, end="")
        except KeyboardInterrupt:
            if not interactive:
                raise
            parts.close()
        print(flush=True)


def _ask(interactive: bool) -> str | None:
    """The next line; None at the end."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None


def _writer(model: str, checkpoint: str, dtype: str | None) -> "Generator":
    from gptjax.inference.generator import Generator
    from gptjax.interop.open import open_model

    return Generator(open_model(model, checkpoint), dtype)


def _grammar(options: Sample, writer: "Generator") -> "Grammar | None":
    from gptjax.inference.constrained import Grammar

    asked = {"json_schema": options.json_schema, "regex": options.regex, "grammar": options.grammar}
    given = {kind: source for kind, source in asked.items() if source is not None}
    if len(given) > 1:
        raise PromptError(f"{' and '.join(given)}: a text can be held to one of them")
    for kind, source in given.items():
        return Grammar(writer.tokenizer, kind, source if isinstance(source, str) else _read(source, kind))
    return None


def _check_whole(whole: list[bool]) -> None:
    if not all(whole):
        print(
            f"gptjax sample: {whole.count(False)} of {len(whole)} texts had to stop before they were whole; ask for "
            "more --max-new-tokens",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)


def _read(path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise PromptError(f"{what} = {str(path)!r}: cannot be read ({e})") from None


def _bias(text: str) -> tuple[int, float]:
    try:
        token, number = text.split(":")
        return int(token), float(number)
    except ValueError:
        raise PromptError(f"logit_bias: {text!r} is not ID:NUMBER, such as 50256:-100") from None
