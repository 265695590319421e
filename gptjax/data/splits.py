"""Which texts are for training and which for validation.

With `data.val_source` all of `data.source` is for training. Otherwise each source is split: by document, where a hash
of the text decides, or at one position of its text.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from gptjax.config import DataConfig
from gptjax.data import corpus
from gptjax.data.examples import Example, Split, holds_examples, load_examples


class SplitText(NamedTuple):
    """A document, or the part of one that belongs to a split."""

    is_train: bool
    text: str
    ends_document: bool


def source_names(source: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """One source, several or none, always as a tuple."""
    if source is None:
        return ()
    return (source,) if isinstance(source, str) else source


def text_streams(data: DataConfig) -> Iterator[Iterator[SplitText]]:
    """The texts of every source, then of every validation source."""
    for source in source_names(data.source):
        yield _split_texts(source, data)
    for source in source_names(data.val_source):
        yield (SplitText(False, text, True) for text in corpus.iter_documents(source, data))


def example_streams(data: DataConfig) -> Iterator[dict[Split, Iterator[Example]]]:
    """The examples of every source by split, then of every validation source."""
    splits: tuple[Split, ...] = ("train",) if data.val_source else ("train", "validation")
    for source in source_names(data.source):
        yield {split: load_examples(source, data, split) for split in splits}
    for source in source_names(data.val_source):
        yield {"validation": load_examples(source, data, "validation")}


def all_texts(data: DataConfig) -> Iterator[SplitText]:
    """The texts of all sources, for a tokenizer that is made from them."""
    if not holds_examples(data):
        yield from chain.from_iterable(text_streams(data))
        return
    for streams in example_streams(data):
        for split, examples in streams.items():
            for example in examples:
                yield SplitText(split == "train", "".join(part.text for part in example.parts), True)


def _split_texts(source: str, data: DataConfig) -> Iterator[SplitText]:
    fraction = data.val_fraction if data.val_source is None else 0.0
    if fraction and data.split != "document":
        total = sum(len(text) for text in corpus.iter_documents(source, data))
        yield from _split_at(int(total * (1 - fraction)), corpus.iter_documents(source, data))
        return
    for text in corpus.iter_documents(source, data):
        yield SplitText(not fraction or corpus.hash_fraction(text) >= fraction, text, True)


def _split_at(cut: int, documents: Iterator[str]) -> Iterator[SplitText]:
    """The first `cut` characters are for training; the document at the cut is divided."""
    seen = 0
    for text in documents:
        num_train = min(max(cut - seen, 0), len(text))
        seen += len(text)
        if num_train:
            yield SplitText(True, text[:num_train], num_train == len(text))
        if num_train < len(text):
            yield SplitText(False, text[num_train:], True)
