"""Translation: French to Portuguese, verse by verse (the book of Genesis)."""

from itertools import zip_longest
from pathlib import Path

from gptjax.data.tasks import Rows, Split, Task

BLOCKS = 30  # 51 verses each: about a chapter and a half


def load_rows(split: Split, folder: Path) -> Rows:
    """Verses with their translation. Of ten blocks, one is for validation and one for test, all over the book.

    Single verses are not held out, because neighbours share names and phrases. The end of the book is not held out,
    because it is another story in other words.
    """
    french, portuguese = (folder / "genesis" / name for name in ("french.txt", "portuguese.txt"))
    verses = list(zip_longest(_lines(french), _lines(portuguese)))
    for number, (verse, translation) in enumerate(verses):
        block = number * BLOCKS // len(verses) % 10
        if split == ("validation" if block == 8 else "test" if block == 9 else "train"):
            if verse is None or translation is None:
                raise ValueError(f"{french.name} and {portuguese.name} have different numbers of lines")
            yield {"french": verse, "portuguese": translation}, f"{french}, line {number + 1}"


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]


TASK = Task(
    name="translation",
    summary="translate a verse from French to Portuguese",
    load_rows=load_rows,
    prompt="French:\n{french}\nPortuguese:\n",
    answer="{portuguese}",
    metrics=("chrf", "bleu"),
    baseline="copy",
    max_new_tokens=320,
    source="https://github.com/nltk/nltk_data (corpora/genesis)",
    licence="public domain",
)
