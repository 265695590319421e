"""A dialogue: a chat template turns messages into a prompt; old messages are dropped to fit the context."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError
from gptjax.inference.generator import Generator
from gptjax.inference.sampling import SamplingParams

Message = dict[str, str]  # role (system, user, assistant) and content
TEMPLATE_SECONDS = 10  # that a chat template may take for a dialogue
SPEAKERS = {"system": "", "user": "User: ", "assistant": "Assistant: "}  # for models without a template


class Chat:
    """One dialogue. `reply` streams an answer and adds both messages to the history."""

    def __init__(self, generator: Generator, system: str | None = None, new_tokens: int = 256):
        """`new_tokens`: the maximum of an answer, reserved in the context. Raises `PromptError` if it does not fit."""
        self.generator, self.new_tokens = generator, new_tokens
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.template = generator.pretrained.chat_template
        self.stop = [] if self.template else ["\nUser:", "\nAssistant:"]
        self.context_length = generator.engine.config.context_length
        if new_tokens < 1:
            raise PromptError(f"max_new_tokens = {new_tokens}: must be at least 1")
        if new_tokens >= self.context_length:
            raise PromptError(
                f"max_new_tokens = {new_tokens}: leaves no space for a message in the context length of "
                f"{self.context_length}; choose a smaller number"
            )

    def reset(self) -> None:
        """Drops all messages but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def reply(self, text: str, sampling: SamplingParams, seed: int = 0) -> Iterator[str]:
        """The answer to a user message, in parts. Drops the oldest exchanges that do not fit into the context.

        Raises `PromptError` if the message alone does not fit.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.prompt(messages)
        while len(prompt) + self.new_tokens > self.context_length:
            oldest = next((i for i, m in enumerate(messages[:-1]) if m["role"] != "system"), None)
            if oldest is None:
                raise PromptError(
                    f"the prompt with this message has {len(prompt)} tokens; with max_new_tokens = {self.new_tokens} "
                    f"for the answer that is more than the context length of {self.context_length}; shorten one of them"
                )
            del messages[oldest : oldest + 2]
            prompt = self.prompt(messages)
        parts: list[str] = []
        try:
            for part in self.generator.stream(prompt, self.new_tokens, sampling, seed, self.stop):
                if not parts:
                    part = part.lstrip()  # the space after "Assistant:" is not part of the answer
                if part:
                    parts.append(part)
                    yield part
        finally:  # also keeps an answer that the caller stops reading
            self.messages = [*messages, {"role": "assistant", "content": "".join(parts).strip()}]

    def prompt(self, messages: list[Message]) -> np.ndarray:
        """The ids of a dialogue up to the assistant's answer. Special tokens in a message are encoded as text."""
        tokenizer = self.generator.tokenizer
        if not self.template:
            lines = [f"{SPEAKERS[m['role']]}{m['content'].strip()}\n" for m in messages]
            return self.generator.encode("".join(lines) + "Assistant:")
        placeholders = {
            f"\ue000{i}\ue001": m["content"]
            for i, m in enumerate(messages)
            if any(word in m["content"] for word in tokenizer.special_tokens)
        }
        to_placeholder = {content: placeholder for placeholder, content in placeholders.items()}
        safe = [m | {"content": to_placeholder.get(m["content"], m["content"])} for m in messages]
        parts = _split(_render(self.template, safe, tokenizer), list(placeholders))
        ids = [
            tokenizer.encode(placeholders[part]) if part in placeholders else tokenizer.encode_special(part)
            for part in parts
            if part
        ]
        return np.concatenate(ids).astype(np.int32)


def _split(text: str, separators: list[str]) -> list[str]:
    """The text split at the separators, which are kept as parts."""
    parts = [text]
    for separator in separators:
        parts = [q for p in parts for q in ([p] if p in separators else _join(p.split(separator), separator))]
    return parts


def _join(parts: list[str], separator: str) -> list[str]:
    return [x for part in parts for x in (part, separator)][:-1]


def _render(template: str, messages: list[Message], tokenizer: Tokenizer) -> str:
    """The text of a chat template, which is untrusted: it runs in a process with bounded time and memory."""
    if importlib.util.find_spec("jinja2") is None:
        raise PromptError("the model's chat template needs jinja2; pip install 'gptjax[chat]'")
    words: dict[int | None, str] = {i: word for word, i in tokenizer.special_tokens.items()}
    variables = {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": tokenizer.roles.get("bos_token") or words.get(tokenizer.bos_id, ""),
        "eos_token": tokenizer.roles.get("eos_token") or words.get(tokenizer.eos_id, ""),
    }
    script = Path(__file__).with_name("render_template.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script)],
            input=json.dumps({"template": template, "variables": variables}),
            capture_output=True,
            text=True,
            timeout=TEMPLATE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise PromptError(
            f"the model's chat template did not end within {TEMPLATE_SECONDS} s on this dialogue; it may loop forever"
        ) from None
    answer = json.loads(done.stdout) if done.returncode == 0 else {"error": f"its process ended: {done.stderr[-300:]}"}
    if "error" in answer:
        raise PromptError(f"the model's chat template fails on this dialogue: {answer['error']}")
    return answer["text"]
