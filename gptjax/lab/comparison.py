"""Compares variants of an experiment over seeds: which are better, worse, undecided or not comparable."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptjax.config import Experiment, diff
from gptjax.errors import GptjaxError
from gptjax.lab.records import RunRecord
from gptjax.lab.variants import Variant, seed_of
from gptjax.schema import leaves, value_at
from gptjax.training.run import COMPARED
from gptjax.tuning.intervals import Score, over_runs, runs_needed

BITS = "val_bits_per_byte"
LOWER = ("loss", "bits_per_byte", "edit_distance", "perplexity", "seconds", "memory_bytes", "skipped", "wait_share")
HIGHER = ("accuracy", "exact_match", "val_score", "f1", "rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "mfu",
          "tokens_per_second")  # fmt: skip
TEXT_METRICS = ("val_", "best_val_", "train_loss")  # metrics that depend on the text and on the task
TRAINING_ONLY = ("objective.z_loss",)  # the fields of COMPARED that change training, not the validation loss
TEXT_FIELDS = ("source", "weights", "column", "prompt", "answer", "hub_config", "hub_split",
               "max_documents", "val_source", "val_fraction", "split")  # that define the text  # fmt: skip
SPLIT_FIELDS = ("source", "weights", "val_fraction", "split")  # those without effect if data.val_source is set

Outcome = Literal["baseline", "better", "worse", "cannot tell", "not comparable"]


@dataclass(frozen=True)
class Verdict:
    """How a variant compares with the baseline."""

    outcome: Outcome
    why: str = ""
    more_seeds: float = math.nan  # an upper estimate of those that would decide it; infinity: more than 1,000

    @property
    def seeds_hint(self) -> str:
        """A sentence: how many more seeds would decide it."""
        if self.outcome != "cannot tell" or math.isnan(self.more_seeds):
            return ""
        if math.isinf(self.more_seeds):
            return "this would take more than 1,000 seeds"
        count = self.more_seeds if self.more_seeds < 20 else round(self.more_seeds, 2 - len(f"{self.more_seeds:.0f}"))
        return f"up to about {count:,.0f} more seed{'s' if count > 1 else ''} would decide it"


@dataclass(frozen=True)
class Row:
    """A variant in the table."""

    variant: Variant
    value: Score | None  # over its finished seeds; None if there are none
    bits: Score | None  # bits/byte, if the metric is another one
    difference: Score | None  # this variant minus the baseline, paired by seed; None if there is no pair
    pairs: int
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """All that a report shows."""

    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]  # in the order of the variants
    warnings: tuple[str, ...]  # why metrics are not comparable, or what was left out
    fields: dict[str, tuple[Any, ...]]  # in which the variants differ: dotted name -> the value of each variant

    @property
    def baseline(self) -> str:
        """The label of the baseline."""
        return next(row.variant.label for row in self.rows if row.verdict.outcome == "baseline")

    @property
    def unfinished(self) -> list[RunRecord]:
        return [r for row in self.rows for r in row.variant.records if r.state != "finished"]


def compare(variants: Sequence[Variant], metric: str = "val_loss", baseline: str | None = None) -> Comparison:
    """Compares every variant with the baseline, by default the first one.

    Raises `GptjaxError` for an unknown baseline or metric, and for a metric without a known better direction.
    """
    names = [v.name for v in variants]
    if baseline not in names:  # a label is understood as well
        baseline = next((v.name for v in variants if v.label == baseline), baseline)
    if baseline is not None and baseline not in names:
        raise GptjaxError(
            f"--baseline {baseline}: is not a variant; {_near(baseline, names)}the variants are {', '.join(names)}"
        )
    higher = _higher_is_better(
        metric, {name for v in variants for r in v.finished for name in (*r.final_metrics, *r.diverged)}
    )
    base = variants[names.index(baseline) if baseline else 0]
    reasons = {v.label: why for v in variants if (why := _incomparable(v, base, metric))}
    rows = tuple(_row(v, base, metric, higher, reasons.get(v.label, "")) for v in variants)
    return Comparison(metric, higher, rows, tuple(_warnings(variants, reasons, metric)), _differing(variants))


def _row(variant: Variant, base: Variant, metric: str, higher: bool, incomparable: str) -> Row:
    values = variant.by_seed(metric)
    other = base.by_seed(metric)
    bits = variant.by_seed(BITS) if metric != BITS else {}
    pairs = [values[seed] - other[seed] for seed in values if seed in other]
    difference = None
    if pairs and variant is not base and not incomparable:
        difference = over_runs(metric, pairs)
    if variant is base:
        verdict = Verdict("baseline")
    elif incomparable:
        verdict = Verdict("not comparable", incomparable)
    elif diverged := sorted(seed_of(r) for v in (variant, base) for r in v.finished if metric in r.diverged):
        verdict = Verdict(
            "cannot tell", f"the metric is not finite for seed {', '.join(map(str, dict.fromkeys(diverged)))}"
        )
    elif difference is None:
        verdict = Verdict("cannot tell", _why_unpaired(values, other))
    else:
        verdict = judge(difference, pairs, higher)
    mean = over_runs(metric, list(values.values())) if values else None
    mean_bits = over_runs(metric, list(bits.values())) if bits else None
    return Row(variant, mean, mean_bits, difference, len(pairs), verdict)


def judge(difference: Score, pairs: Sequence[float], higher_is_better: bool) -> Verdict:
    """Better or worse if the interval of the mean difference excludes 0; else how many more seeds would decide it."""
    if math.isnan(difference.low):
        return Verdict(
            "cannot tell", "there is only one pair of runs; a second seed would show the noise between seeds"
        )
    if difference.low <= 0 <= difference.high:
        if not any(pairs):
            return Verdict("cannot tell", "no seed shows a difference")
        return Verdict("cannot tell", more_seeds=max(1.0, runs_needed(pairs) - len(pairs)))
    return Verdict("better" if (difference.value > 0) == higher_is_better else "worse")


def _why_unpaired(values: Mapping[int, float], other: Mapping[int, float]) -> str:
    if not values:
        return "no finished run"
    if not other:
        return "the baseline has no finished run"
    return "no seed in common with the baseline"


def _higher_is_better(metric: str, known: set[str]) -> bool:
    last = metric.rpartition(".")[2]
    directed = sorted(name for name in known if name.endswith(LOWER + HIGHER))
    if known and metric not in known:
        raise GptjaxError(f"--metric {metric}: no finished run has it; {_near(metric, directed)}the metrics are "
                          + ", ".join(directed))  # fmt: skip
    if last.endswith(LOWER):
        return False
    if last.endswith(HIGHER):
        return True
    raise GptjaxError(f"--metric {metric}: it is not known whether higher or lower is better; choose a loss, an "
                      f"accuracy, a score or a speed, for instance {', '.join(directed)}")  # fmt: skip


def _near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, 0.6)
    return f"did you mean {near[0]}? " if near else ""


def _incomparable(variant: Variant, base: Variant, metric: str) -> str:
    """What makes a variant's metric incomparable with the baseline's; empty if it is comparable."""
    if not metric.startswith(TEXT_METRICS) or not (base.finished and variant.finished):
        return ""
    conditions = [_conditions(r, metric) for v in (base, variant) for r in v.finished]
    differing = {name for other in conditions for name in other if other[name] != conditions[0][name]}
    sizes = [r.final_metrics.get("val_bytes", 0.0) for v in (base, variant) for r in v.finished]
    if metric == BITS and max(sizes) > 1.01 * min(sizes):  # tokens at the edges of windows may not be scored
        differing.add("bytes of validation text")
    return ", ".join(sorted(differing))


def _conditions(record: RunRecord, metric: str) -> dict[str, Any]:
    """What a validation metric depends on: the text, the tokenizer and the task.

    Bits per byte do not depend on the tokenizer: for them the settings that select the text are enough.
    """
    e = record.experiment
    assert e is not None
    found = {path: value_at(e, path) for path in leaves(Experiment)
             if path.startswith(COMPARED) and not path.startswith("data") and path not in TRAINING_ONLY}  # fmt: skip
    found["reference"] = record.provenance.get("reference")
    if metric != BITS:
        return found | {"data": record.provenance.get("data")}
    del found["model.context_length"]  # a longer context is a better model of the same bytes
    names = [n for n in TEXT_FIELDS if e.data.val_source is None or n not in SPLIT_FIELDS]
    return found | {f"data.{name}": getattr(e.data, name) for name in names}


def _warnings(variants: Sequence[Variant], reasons: Mapping[str, str], metric: str) -> Iterable[str]:
    for name, why in reasons.items():
        what = why.replace("data,", "the data (text, tokenizer or split),")
        what = re.sub(r"\bdata$", "the data (text, tokenizer or split)", what)
        hint = ""
        if metric != BITS:
            hint = f"; --metric {BITS} compares models of the same text, whatever their tokenizer and context length"
        yield f"{metric} of {name} is not comparable with the baseline's: they differ in {what}{hint}"
    for v in variants:
        for r in v.records:
            if r.state == "finished" and metric in r.diverged:
                yield f"{r.name}: its final {metric} is not finite, so the run is not in any mean"
            if changes := r.provenance.get("changes"):
                fields = sorted({str(f) for c in changes if isinstance(c, dict) for f in c.get("fields", ())})
                yield f"{r.name}: was changed during training ({', '.join(fields)})"
    for what, kinds in environments(variants).items():
        if len(kinds) > 1:
            yield f"the runs used different {what}: {', '.join(sorted(kinds))}"


def environments(variants: Iterable[Variant]) -> dict[str, set[str]]:
    """The devices, versions of jax and commits that the runs used."""
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
    """The fields in which any two variants differ, apart from names and seeds."""
    known = [_resolved(v.experiment, variants) for v in variants]
    first = next((e for e in known if e is not None), None)
    if first is None:
        return {}
    paths = {path for e in known if e is not None for path in diff(first, e)} - {"name", "seed"}
    return {path: tuple(None if e is None else value_at(e, path) for e in known)
            for path in leaves(Experiment) if path in paths}  # fmt: skip


def _resolved(e: Experiment | None, variants: Sequence[Variant]) -> Experiment | None:
    """The experiment of a variant that has not started, with the vocabulary size of another one on the same data."""
    for other in (v.experiment for v in variants):
        if e is None or e.model.vocab_size is not None:
            return e
        if other is not None and other.model.vocab_size is not None and other.data == e.data:
            return e.resolved(other.model.vocab_size)
    return e
