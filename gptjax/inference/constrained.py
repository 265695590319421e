"""Constrained generation: a JSON schema, a regular expression or a grammar decides which tokens may come next.

llguidance (https://github.com/guidance-ai/llguidance) does the parsing; it is an extra: pip install 'gptjax[grammar]'.
"""

import json
from typing import Any

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import PromptError


class Grammar:
    """A language over the tokens of one tokenizer; `constraint` makes a constraint for one text."""

    def __init__(self, tokenizer: Tokenizer, kind: str, source: str):
        """`kind`: json_schema (without white space between parts), regex (of the whole text, in Rust's syntax) or
        grammar (in Lark's notation). Raises `PromptError` for an invalid source, or if llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise PromptError(f"{kind}: needs llguidance; pip install 'gptjax[grammar]'") from None
        self.tokenizer, self.kind = tokenizer, kind
        self._matcher_type = llguidance.LLMatcher
        self._ll_tokenizer = _ll_tokenizer(tokenizer)
        try:
            self._grammar = self._compile(source)
        except ValueError as e:
            raise PromptError(f"{kind}: {e}") from None
        if problem := self._matcher_type.validate_grammar(self._grammar, self._ll_tokenizer):
            raise PromptError(f"{kind}: {problem.strip()}")

    def _compile(self, source: str) -> str:
        if self.kind == "regex":
            return self._matcher_type.grammar_from_regex(source)
        if self.kind == "grammar":
            return self._matcher_type.grammar_from_lark(source)
        try:
            schema = json.loads(source)
        except ValueError as e:
            raise PromptError(f"json_schema: is not JSON ({e})") from None
        return self._matcher_type.grammar_from_json_schema(schema, defaults={"whitespace_flexible": False})

    def constraint(self) -> "GrammarConstraint":
        return GrammarConstraint(self._matcher_type(self._ll_tokenizer, self._grammar), self.tokenizer)


class GrammarConstraint:
    """A `TokenConstraint` that keeps a text in its grammar, and ends it where nothing more may follow."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer):
        self._matcher, self._vocab_size = matcher, tokenizer.vocab_size
        self._eos_id = tokenizer.eos_id
        self._allowed = self._compute_mask()

    @property
    def complete(self) -> bool:
        """Whether the text so far is complete under the grammar."""
        return self._matcher.is_accepting() or self._matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        return self._allowed

    def accept(self, token: int) -> bool:
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise PromptError(f"the grammar failed: {self._matcher.get_error()}")
        if self._matcher.is_stopped():
            return True
        self._allowed = self._compute_mask()
        num_allowed = self._allowed.sum()
        if self._eos_id is not None:
            num_allowed -= self._allowed[self._eos_id]
        return bool(num_allowed == 0)

    def _compute_mask(self) -> np.ndarray:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)


def _ll_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer for llguidance. If it has no EOS token, an id after the last one stands for it."""
    import llguidance

    class Description:
        eos_token_id = tokenizer.vocab_size if tokenizer.eos_id is None else tokenizer.eos_id
        bos_token_id = None
        special_token_ids = [i for i, token in enumerate(tokenizer.id_to_bytes) if not token]  # noqa: RUF012
        tokens = [token or b"\xff[%d]" % i for i, token in enumerate(tokenizer.id_to_bytes)]  # noqa: RUF012

        def __call__(self, text: str) -> list[int]:
            return [int(i) for i in tokenizer.encode(text)]

    description = Description()
    if tokenizer.eos_id is None:
        description.tokens = [*description.tokens, b"\xff[end]"]
        description.special_token_ids = [*description.special_token_ids, tokenizer.vocab_size]
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(description))
