"""Texts that must parse: a JSON schema, a regular expression or a grammar decides which tokens may come next.

The parsing is done by llguidance (https://github.com/guidance-ai/llguidance), an extra: pip install 'gptjax[grammar]'.
"""

import json
from typing import Any

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError


class Grammar:
    """A language over the tokens of one tokenizer; `guide` follows one text in it."""

    def __init__(self, tokenizer: Tokenizer, kind: str, source: str):
        """`kind`: json_schema (texts have no white space between parts), regex (of the whole text, as Rust knows it) or
        grammar (in Lark's notation). Raises `PromptError` where the source is none, or llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise PromptError(f"{kind}: needs llguidance; pip install 'gptjax[grammar]'") from None
        self.tokenizer, self.kind = tokenizer, kind
        self._new = llguidance.LLMatcher
        self._tokens = _wrapped(tokenizer)
        try:
            self._source = self._compiled(source)
        except ValueError as e:
            raise PromptError(f"{kind}: {e}") from None
        if problem := self._new.validate_grammar(self._source, self._tokens):
            raise PromptError(f"{kind}: {problem.strip()}")

    def _compiled(self, source: str) -> str:
        if self.kind == "regex":
            return self._new.grammar_from_regex(source)
        if self.kind == "grammar":
            return self._new.grammar_from_lark(source)
        try:
            schema = json.loads(source)
        except ValueError as e:
            raise PromptError(f"json_schema: is no JSON ({e})") from None
        return self._new.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})

    def guide(self) -> "GrammarGuide":
        return GrammarGuide(self._new(self._tokens, self._source), self.tokenizer)


class GrammarGuide:
    """A `TokenConstraint` that lets a text only go on in its grammar, and ends it where nothing more may follow."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer):
        self._matcher, self._vocab = matcher, tokenizer.vocab_size
        self._end = tokenizer.eos_id
        self._allowed = self._next()

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole one."""
        return self._matcher.is_accepting() or self._matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        return self._allowed

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise PromptError(f"the grammar broke off: {self._matcher.get_error()}")
        if self._matcher.is_stopped():
            return True
        self._allowed = self._next()
        others = self._allowed.sum() - (self._end is not None and self._allowed[self._end])
        return others == 0

    def _next(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab].astype(bool)


def _wrapped(tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance knows it. One without an end of text gets an id for it behind its last."""
    import llguidance

    class Description:
        eos_token_id = tokenizer.vocab_size if tokenizer.eos_id is None else tokenizer.eos_id
        bos_token_id = None
        special_token_ids = [i for i, piece in enumerate(tokenizer.id_to_bytes) if not piece]  # noqa: RUF012
        tokens = [piece or b"\xff[%d]" % i for i, piece in enumerate(tokenizer.id_to_bytes)]  # noqa: RUF012

        def __call__(self, text: str) -> list[int]:
            return [int(i) for i in tokenizer.encode(text)]

    own = Description()
    if tokenizer.eos_id is None:
        own.tokens = [*own.tokens, b"\xff[end]"]
        own.special_token_ids = [*own.special_token_ids, tokenizer.vocab_size]
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(own))
