"""A dialogue: messages become a prompt by the model's own chat template, and history is kept within the context."""

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np

from gptjax.errors import PromptError
from gptjax.inference.generator import Generator
from gptjax.inference.sampling import SamplingParams

Message = dict[str, str]  # role (system, user, assistant) and content
SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: "}  # of models that have no template


class Chat:
    """One dialogue. `reply` streams an answer and remembers both sides."""

    def __init__(self, writer: Generator, system: str | None = None, new_tokens: int = 256):
        """`new_tokens`: of an answer at most; the context keeps room for them. Raises `PromptError` if it has none."""
        self.writer, self.new_tokens = writer, new_tokens
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.template = writer.pretrained.chat_template
        self.stop = [] if self.template else ["\nUser:", "\nAssistant:"]
        if new_tokens < 1:
            raise PromptError(f"max_new_tokens = {new_tokens}: an answer needs at least 1")
        if new_tokens >= writer.engine.model.context_length:
            raise PromptError(
                f"max_new_tokens = {new_tokens}: leaves no room for a question in the context of "
                f"{writer.engine.model.context_length} tokens; ask for fewer"
            )

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def reply(self, text: str, sampling: SamplingParams, seed: int = 0) -> Iterator[str]:
        """The answer to what the user says, in parts. The oldest exchanges are forgotten where they no longer fit.

        Raises `PromptError` where the message alone does not fit.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.prompt(messages)
        while len(prompt) + self.new_tokens > self.writer.engine.model.context_length:
            if (oldest := next((i for i, m in enumerate(messages[:-1]) if m["role"] != "system"), None)) is None:
                raise PromptError(
                    f"the message has {len(prompt)} tokens with all around it; with {self.new_tokens} for the answer "
                    f"that is more than the context of {self.writer.engine.model.context_length}: shorten one of them"
                )
            del messages[oldest : oldest + 2]
            prompt = self.prompt(messages)
        parts: list[str] = []
        stream = self.writer.stream(prompt, self.new_tokens, sampling, seed, self.stop)
        try:
            for part in stream:
                if part := part if parts else part.lstrip():  # the space after "Assistant:" is no part of the answer
                    parts.append(part)
                    yield part
        finally:  # what was said stands, also where the reader stopped listening
            self.messages = [*messages, {"role": "assistant", "content": "".join(parts).strip()}]

    def prompt(self, messages: list[Message]) -> np.ndarray:
        """The ids of a dialogue up to where the assistant speaks. Words of special tokens in a message stay text."""
        tokenizer = self.writer.tokenizer
        if not self.template:
            lines = [f"{SPEAKERS[m['role']]}{m['content'].strip()}\n" for m in messages]
            return self.writer.encode("".join(lines) + "Assistant:")
        marks = {
            f"\ue000{i}\ue001": m["content"]
            for i, m in enumerate(messages)
            if any(word in m["content"] for word in tokenizer.special_tokens)
        }
        hidden = {content: mark for mark, content in marks.items()}
        shown = [m | {"content": hidden.get(m["content"], m["content"])} for m in messages]
        pieces = _split(_render(self.template, shown, tokenizer), list(marks))
        ids = [tokenizer.encode(marks[p]) if p in marks else tokenizer.encode_special(p) for p in pieces if p]
        return np.concatenate(ids).astype(np.int32)


def _split(text: str, marks: list[str]) -> list[str]:
    """The text at its marks, which are kept as parts of their own."""
    parts = [text]
    for mark in marks:
        parts = [q for p in parts for q in ([p] if p in marks else _between(p.split(mark), mark))]
    return parts


def _between(parts: list[str], mark: str) -> list[str]:
    return [x for part in parts for x in (part, mark)][:-1]


def _render(template: str, messages: list[Message], tokenizer: Any) -> str:
    """Runs a chat template as transformers does, in jinja2's sandbox: it may come from a stranger."""
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise PromptError("the model's chat template needs jinja2; pip install 'gptjax[chat]'") from None

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    words = {i: word for word, i in tokenizer.special_tokens.items()}
    name = lambda i: words.get(i, "") if i is not None else ""  # noqa: E731
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            bos_token=name(tokenizer.bos_id),
            eos_token=name(tokenizer.eos_id),
        )
    except Exception as e:  # a template may fail in any way
        raise PromptError(f"the model's chat template refuses this dialogue: {e}") from None
