"""Variants of an experiment compared over their seeds: what is better, what cannot be told, what was not compared."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptjax.config import Experiment, diff
from gptjax.errors import GptjaxError
from gptjax.lab.records import Record
from gptjax.lab.variants import Variant, seed_of
from gptjax.schema import leaves, value_at
from gptjax.training.run import COMPARED
from gptjax.tuning.intervals import Score, over_runs, runs_needed

BITS = "val_bits_per_byte"
LOWER = ("loss", "bits_per_byte", "edit_distance", "perplexity", "seconds", "memory_bytes", "skipped", "wait_share")
HIGHER = ("accuracy", "exact_match", "val_score", "f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "mfu",
          "tokens_per_second")  # fmt: skip
ASKED = ("val_", "best_val_", "train_loss")  # figures that depend on the text and on what is asked of it
TRAINED_FOR_ONLY = ("objective.z_loss",)  # of COMPARED, what the optimiser sees and a validation loss does not
TEXT = ("source", "weights", "column", "prompt", "answer", "hub_config", "hub_split", "max_documents", "val_source",
        "val_fraction", "split")  # fields of Data that decide the validation text  # fmt: skip
OF_TRAINING = ("source", "weights", "val_fraction", "split")  # of these, what counts only where it is split off

Outcome = Literal["baseline", "better", "worse", "cannot tell", "not comparable"]


@dataclass(frozen=True)
class Verdict:
    """What the pairs say of a variant against the baseline."""

    word: Outcome
    why: str = ""
    more_seeds: float = math.nan  # that would probably settle it; infinity for more than anybody trains

    @property
    def more(self) -> str:
        """In words, how many more seeds would settle it."""
        if self.word != "cannot tell" or math.isnan(self.more_seeds):
            return ""
        if math.isinf(self.more_seeds):
            return "more than 1,000 seeds would be needed"
        count = self.more_seeds if self.more_seeds < 20 else round(self.more_seeds, 2 - len(f"{self.more_seeds:.0f}"))
        return f"about {count:,.0f} more seed{'s' if count > 1 else ''} would settle it"


@dataclass(frozen=True)
class Row:
    """A variant in the table."""

    variant: Variant
    value: Score | None  # over its finished seeds; None where there are none
    bits: Score | None  # bits a byte likewise, where the metric is another
    difference: Score | None  # by seed, this less the baseline; None for the baseline and where nothing can be paired
    pairs: int
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All that a report shows."""

    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]  # the baseline where it stood
    warnings: tuple[str, ...]  # what makes figures incomparable, or was not counted: to be said aloud
    fields: dict[str, tuple[Any, ...]]  # in which variants differ: dotted name -> value of each variant

    @property
    def baseline(self) -> str:
        return next(row.variant.name for row in self.rows if row.verdict.word == "baseline")

    @property
    def unfinished(self) -> list[Record]:
        return [r for row in self.rows for r in row.variant.records if r.state != "finished"]


def compare(variants: Sequence[Variant], metric: str = "val_loss", baseline: str | None = None) -> Comparison:
    """Every variant against the baseline, by default the first.

    Raises `GptjaxError` for a baseline or a metric that is not there, or of which it is not known what is better.
    """
    names = [v.name for v in variants]
    if baseline is not None and baseline not in names:
        raise GptjaxError(f"--baseline {baseline}: is no variant; {_near(baseline, names)}there are {', '.join(names)}")
    higher = _higher_is_better(
        metric, {name for v in variants for r in v.finished for name in (*r.figures, *r.diverged)}
    )
    base = variants[names.index(baseline) if baseline else 0]
    apart = {v.name: told for v in variants if (told := _incomparable(v, base, metric))}
    rows = tuple(_row(v, base, metric, higher, apart.get(v.name, "")) for v in variants)
    return Comparison(metric, higher, rows, tuple(_warnings(variants, apart, metric)), _differing(variants))


def _row(variant: Variant, base: Variant, metric: str, higher: bool, apart: str) -> Row:
    values, other = variant.by_seed(metric), base.by_seed(metric)
    bits = variant.by_seed(BITS) if metric != BITS else {}
    pairs = [values[seed] - other[seed] for seed in values if seed in other]
    difference = over_runs(metric, pairs) if pairs and variant is not base and not apart else None
    if variant is base:
        verdict = Verdict("baseline")
    elif apart:
        verdict = Verdict("not comparable", apart)
    elif lost := sorted(seed_of(r) for v in (variant, base) for r in v.finished if metric in r.diverged):
        verdict = Verdict("cannot tell", f"not finite with seed {', '.join(map(str, dict.fromkeys(lost)))}")
    elif difference is None:
        verdict = Verdict("cannot tell", _why_no_pair(values, other))
    else:
        verdict = judge(difference, pairs, higher)
    value, of_bits = (over_runs(metric, list(x.values())) if x else None for x in (values, bits))
    return Row(variant, value, of_bits, difference, len(pairs), verdict)


def judge(difference: Score, pairs: Sequence[float], higher_is_better: bool) -> Verdict:
    """Better or worse where the interval of the mean difference leaves out 0; else how many more seeds would tell."""
    if math.isnan(difference.low):
        return Verdict("cannot tell", "one pair of runs: how much chance does, a second seed would show")
    if difference.low <= 0 <= difference.high:
        if not any(pairs):
            return Verdict("cannot tell", "no seed shows any difference")
        return Verdict("cannot tell", more_seeds=max(1.0, runs_needed(pairs) - len(pairs)))
    return Verdict("better" if (difference.value > 0) == higher_is_better else "worse")


def _why_no_pair(values: Mapping[int, float], other: Mapping[int, float]) -> str:
    if not values:
        return "no finished run"
    return "no seed in common with the baseline" if other else "the baseline has no finished run"


def _higher_is_better(metric: str, known: set[str]) -> bool:
    last = metric.rpartition(".")[2]
    if known and metric not in known:
        judged = sorted(name for name in known if name.endswith(LOWER + HIGHER))
        raise GptjaxError(f"--metric {metric}: no finished run has it; {_near(metric, judged)}there are "
                          + ", ".join(judged))  # fmt: skip
    if last.endswith(LOWER):
        return False
    if last.endswith(HIGHER):
        return True
    raise GptjaxError(f"--metric {metric}: whether more of it is better is not known; choose a loss, an accuracy, a "
                      "score or a speed, for instance "
                      + ", ".join(sorted(name for name in known if name.endswith(LOWER + HIGHER))))  # fmt: skip


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"did you mean {near[0]}? " if near else ""


def _incomparable(variant: Variant, base: Variant, metric: str) -> str:
    """In which ways the figures of a variant are of something else than the baseline's; empty where they are not."""
    if not metric.startswith(ASKED) or not (base.finished and variant.finished):
        return ""
    asked = [_asked(r, metric) for v in (base, variant) for r in v.finished]
    differing = {name for other in asked for name in other if other[name] != asked[0][name]}
    sizes = [r.figures.get("val_bytes", 0.0) for v in (base, variant) for r in v.finished]
    if metric == BITS and max(sizes) > 1.01 * min(sizes):  # what stands at the edges of windows may not be asked for
        differing.add("bytes of validation text")
    return ", ".join(sorted(differing))


def _asked(record: Record, metric: str) -> dict[str, Any]:
    """What a validation figure is of: the text, how it is cut into tokens, and what is asked of them.

    Bits a byte do not depend on tokens: there the text itself is enough, told by the settings that it is read by.
    """
    e = record.experiment
    assert e is not None
    found = {path: value_at(e, path) for path in leaves(Experiment)
             if path.startswith(COMPARED) and not path.startswith("data") and path not in TRAINED_FOR_ONLY}  # fmt: skip
    found["reference"] = record.provenance.get("reference")
    if metric != BITS:
        return found | {"data": record.provenance.get("data")}
    del found["model.context_length"]  # a longer context is a better model of the same bytes
    own = e.data.val_source is not None
    return found | {f"data.{name}": getattr(e.data, name) for name in TEXT if not own or name not in OF_TRAINING}


def _warnings(variants: Sequence[Variant], apart: Mapping[str, str], metric: str) -> Iterable[str]:
    for name, told in apart.items():
        what = told.replace("data,", "the data (text, tokenizer or split),")
        what = re.sub(r"\bdata$", "the data (text, tokenizer or split)", what)
        more = f"; --metric {BITS} compares models of one text whatever their tokens and context"
        yield f"{metric} of {name} is not comparable with the baseline's: they differ in {what}" + (
            more if metric != BITS else ""
        )
    for v in variants:
        for r in v.records:
            if r.state == "finished" and metric in r.diverged:
                yield f"{r.name}: its {metric} was not finite at the end, and is in no mean"
            if changes := r.provenance.get("changes"):
                fields = sorted({str(f) for c in changes if isinstance(c, dict) for f in c.get("fields", ())})
                yield f"{r.name}: was changed while it was trained ({', '.join(fields)})"
    for what, kinds in environments(variants).items():
        if len(kinds) > 1:
            yield f"the runs were made with different {what}: {', '.join(sorted(kinds))}"


def environments(variants: Iterable[Variant]) -> dict[str, set[str]]:
    """With what the runs were made: each kind of it that is there."""
    found: dict[str, set[str]] = {"devices": set(), "versions of jax": set(), "commits": set()}
    for r in (r for v in variants for r in v.records):
        devices, versions = (p if isinstance(p := r.provenance.get(n), dict) else {} for n in ("devices", "versions"))
        if devices:
            found["devices"].add(f"{devices.get('count')} x {devices.get('kind')}")
        if versions:
            found["versions of jax"].add(str(versions.get("jax")))
        if commit := r.provenance.get("commit"):
            found["commits"].add(str(commit).rstrip("+")[:10] + ("+" if str(commit).endswith("+") else ""))
    return found


def _differing(variants: Sequence[Variant]) -> dict[str, tuple[Any, ...]]:
    """The fields of the experiments in which any two variants differ, but for names and seeds."""
    known = [_resolved(v.experiment, variants) for v in variants]
    first = next((e for e in known if e is not None), None)
    if first is None:
        return {}
    paths = {path for e in known if e is not None for path in diff(first, e)} - {"name", "seed"}
    return {path: tuple(None if e is None else value_at(e, path) for e in known)
            for path in leaves(Experiment) if path in paths}  # fmt: skip


def _resolved(e: Experiment | None, variants: Sequence[Variant]) -> Experiment | None:
    """Of a variant that has not begun, what it will be: its vocabulary is the others', where it has their tokenizer."""
    for other in (v.experiment for v in variants):
        if e is None or e.model.vocab_size is not None:
            return e
        if other is not None and other.model.vocab_size is not None and other.data == e.data:
            return e.resolved(other.model.vocab_size)
    return e
