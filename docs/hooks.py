"""What mkdocs runs while it builds the site: adds the pages of the reference, and draws the layers."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import layers  # noqa: E402
import reference  # noqa: E402

LAYERS = "<!-- the picture of the layers is drawn here -->"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made from the code."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Draws the picture of the layers."""
    return markdown.replace(LAYERS, layers.svg()) if LAYERS in markdown else markdown
