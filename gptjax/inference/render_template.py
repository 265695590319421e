"""Renders an untrusted chat template: a script with bounded memory, which `chat.py` runs as a process of its own.

It reads a request from stdin (JSON: template and variables) and prints the answer (JSON: text or error). Templates are
rendered as transformers does, in jinja2's sandbox, which keeps them from running code but not from running forever.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_MEMORY = 1 << 30  # bytes
MAX_TEXT = 10_000_000  # characters


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's answers for training, and changes no text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The statements up to `{% endgeneration %}`, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def render(template: str, variables: dict[str, Any]) -> str:
    """Raises whatever the template raises."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment.from_string(template).render(**variables)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        text = render(**request)
    except MemoryError:
        return {"error": f"it needs more than {MAX_MEMORY >> 30} GiB of memory"}
    except Exception as e:  # a template can raise anything
        return {"error": str(e)[:1000] or type(e).__name__}
    if len(text) > MAX_TEXT:
        return {"error": f"its text has {len(text):,} characters; at most {MAX_TEXT:,} are read"}
    return {"text": text}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    print(json.dumps(_answer(json.load(sys.stdin))))
