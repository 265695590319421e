"""Fill in the middle (Bavarian et al. 2022): predict the next token, in texts whose middle was moved to the end."""

from collections.abc import Iterator
from functools import partial

from gptjax.data.batches import Batch, Generators, MakeBatch
from gptjax.data.tokenizer import Tokenizer
from gptjax.data.windows import Windows
from gptjax.objectives.base import Objective, extra_ids, room_problems
from gptjax.objectives.causal import causal_batch


class FIM(Objective):
    """Predicts the next token after rearranging a fraction `fim_rate` of the texts."""

    fields = ("fim_rate", "z_loss")

    def extra_tokens(self) -> tuple[str, ...]:
        return "prefix", "suffix", "middle"

    def batch_maker(self, tokenizer: Tokenizer) -> MakeBatch:
        marks = extra_ids(self.extra_tokens(), tokenizer)
        return partial(fim_batch, rate=self.config.fim_rate, marks=marks, end=tokenizer.eos_id)

    def problems(self) -> Iterator[str]:
        yield from room_problems(self.experiment)


def fim_batch(
    windows: Windows,
    rngs: Generators,
    negatives: Windows | None = None,
    *,
    rate: float,
    marks: list[int],
    end: int | None,
) -> Batch:
    """A fraction `rate` of the texts becomes <prefix> prefix <suffix> suffix <middle> middle <end> (PSM order).

    Each is cut at two uniformly random positions; `marks` and `end` are the ids of the added tokens. It keeps its
    length: its last tokens are dropped. Texts are documents, or rows if documents are not tracked.
    """
    ids = windows.ids.copy()
    closing = [] if end is None else [end]  # marks the end of the middle even where the document continues
    for row, rng in zip(range(len(ids)), rngs, strict=True):
        for first, last in windows.texts(row):
            kept = last - first - len(marks) - len(closing)
            if rng.random() < rate and kept > 0:
                text = ids[row, first : first + kept].tolist()
                a, b = sorted(rng.integers(0, kept + 1, 2))
                prefix, suffix, middle = marks
                ids[row, first:last] = [prefix, *text[:a], suffix, *text[b:], middle, *text[a:b], *closing]
    return causal_batch(windows._replace(ids=ids))
