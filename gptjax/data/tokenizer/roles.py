"""The roles of tokens in a tokenizer_config.json: which one begins a text, which one pads a batch, on which side."""

from collections.abc import Collection
from typing import Any

ROLE_TOKENS = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


def token_roles(config: dict[str, Any], tokens: Collection[str]) -> dict[str, Any]:
    """What a tokenizer_config.json says of the roles of `tokens` and of padding; anything else is left out."""
    roles: dict[str, Any] = {}
    for name in ROLE_TOKENS:
        if (text := token_text(config.get(name))) in tokens:
            roles[name] = text
    if config.get("padding_side") in ("left", "right"):
        roles["padding_side"] = config["padding_side"]
    length = config.get("model_max_length")
    if isinstance(length, int) and 0 < length < 10**9:  # transformers writes 10**30 for none
        roles["model_max_length"] = length
    for name in ("additional_special_tokens", "extra_special_tokens"):
        given = config.get(name)
        if isinstance(given, list) and (words := [w for w in map(token_text, given) if w in tokens]):
            roles[name] = words
    return roles


def token_text(token: Any) -> str | None:
    """The text of a token in a configuration: a string, or an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
