"""`gptjax chat`: a dialogue in the terminal."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tyro.conf import OmitArgPrefixes

from gptjax.commands import check_unused, for_terminal, parse, start_jax, without_run
from gptjax.commands.options import Checkpoint, DtypeOption, IntOption, ModelArgument, TextOption
from gptjax.commands.sampling_options import SamplingOptions, open_generator, sampling_params, unused_when_greedy
from gptjax.errors import GptjaxError

if TYPE_CHECKING:
    from gptjax.inference.chat import Chat
    from gptjax.inference.sampling import SamplingParams

DEFAULT_NEW_TOKENS = 256  # of an answer


@dataclass(frozen=True)
class ChatOptions:
    """Chat with a model in the terminal. /reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer."""

    model: ModelArgument
    system: TextOption = None  # a system message
    max_new_tokens: IntOption = None  # of an answer; None: 256, or half of the context
    seed: int = 0  # the same seed and messages give the same answers
    dtype: DtypeOption = None  # None: the model's own; int8: 8-bit weights
    checkpoint: Checkpoint = "last"  # of a run
    sampling: OmitArgPrefixes[SamplingOptions] = dataclasses.field(default_factory=SamplingOptions)


def chat(arguments: list[str]) -> None:
    """MODEL -> a dialogue in the terminal."""
    options: ChatOptions = parse(ChatOptions, arguments, "chat")
    check_unused(options, without_run(options.model) | unused_when_greedy(options))
    start_jax()
    from gptjax.inference.chat import Chat

    generator = open_generator(options.model, options.checkpoint, options.dtype)
    new_tokens = options.max_new_tokens
    if new_tokens is None:
        new_tokens = min(DEFAULT_NEW_TOKENS, generator.engine.config.context_length // 2)
    dialogue = Chat(generator, options.system, new_tokens)
    params, interactive = sampling_params(options, generator), sys.stdin.isatty()
    if interactive:
        template = "its own chat template" if dialogue.template else "no chat template, so prompts are plain dialogues"
        print(f"{generator.pretrained.name} ({template}); /reset starts over, /exit ends", file=sys.stderr)
    turn = refused = 0
    while (line := _read_line(interactive)) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            dialogue.reset()
        elif line:
            refused += not _print_reply(dialogue, line, params, options.seed + turn, interactive)
            turn += 1
    if refused and refused == turn and not interactive:
        raise GptjaxError("no message got an answer; the reasons are above")


def _print_reply(dialogue: "Chat", line: str, params: "SamplingParams", seed: int, interactive: bool) -> bool:
    """Prints an answer, or the error; returns whether there was an answer."""
    parts = dialogue.reply(line, params, seed)
    answered = True
    try:
        for part in parts:
            print(for_terminal(part), end="", flush=True)
    except GptjaxError as e:
        print(f"gptjax chat: {e}", file=sys.stderr)
        answered = False
    except KeyboardInterrupt:
        if not interactive:
            raise
        parts.close()
    print(flush=True)
    return answered


def _read_line(interactive: bool) -> str | None:
    """The next line of the user; None at the end."""
    try:
        return input("> " if interactive else "").strip()
    except EOFError:
        return None
