"""The package and its documents use the words of the field; words that gptjax once had for itself do not come back."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# what must not be written (a regular expression) -> what to write for it
FIELD_WORDS = {
    r"\b[Ww]orkshops?\b|\bshop\b": "TrainSetup, setup",
    r"\bLesson\b|\blesson": "train objective",
    r"\bSight\b|\bsight\b|within_sight": "AttentionMask, mask",
    r"(query|key|own)_places": "positions",
    r"\bTurned\b|\bturned\b": "Transposed, rotary_dim",
    r"\bby_chunks\b|\bmade_again\b|\bmade again\b": "map_in_chunks, remat, recomputed",
    r"\blayers_apart\b|\bread_out\b": "unstack_layers, unembed",
    r"\btold\b|\btells?\b": "log_probs, logits, predicts, prints, reports: the word for the thing",
    r"\basked\b": "loss_mask, is_target, requested",
    r"\blearnt\b": "trained, trainable",
    r"\bbeside\b": "with, next to, in addition to",
    r"\bWRITING\b|\bAim\b": "ON_POLICY, ObjectiveName",
    r"\busual_loss\b": "recent_loss",
    r"\bover_cores\b|\bby_core\b|\bdevices_of_a_batch\b": "sum_over_cores, map_over_cores, num_batch_devices",
    r"\brules_of\b|\bRules\b": "BatchedSamplingParams, batch_params",
    r"\blikeliest\b": "argmax, greedy, most likely",
    r"\bguessed\b|\bguesses\b": "draft tokens",
    r"\brelative_to_(others|group)\b": "leave_one_out_advantages, group_advantages",
    r"\bfrom_the_left\b|\bfrom_both_sides\b": "score_causal, score_bidirectional",
    r"\bwrite_durably\b": "write_atomic",
    r"\bverbs?\b": "command",
    r"\bthe house\b|\bdoors?\b": "the architecture, sole importer",
    r"\bstrangers?\b": "untrusted",
    r"\bgo(es|ing)? on\b|\bwent on\b": "resume, continue",
    r"\btaken back\b|\btakes? back\b": "roll back",
    r"\bstands?\b(?! for\b)|\bstood\b": "is, is written",
    r"(?<!the )(?<!a )\bwhole\b": "full, intact, valid (but: the whole run)",
    r"\bnats a\b|\bbits a\b": "nats/token, bits/byte",
    r"\b(tokens|examples|bytes|steps|MB|GB|texts) a second\b|\bms a step\b": "tokens/s, ms/step",
    r"\btrivial answer\b": "baseline",
    r"\bworked in(to)?\b": "applied, folded into",
}
# (file, text of the line) where such a word is right, with the reason; both are regular expressions
KEPT = [
    (
        r"gptjax/lab/(comparison|page)\.py|docs/reports\.md",
        r"cannot tell",
        "a verdict of a comparison: plain English, and in saved reports",
    ),
    (r"gptjax/lab/search\.py", r"\.tell\(", "the name of a method of Optuna"),
    (r"gptjax/lab/comparison\.py|gptjax/tuning/intervals\.py", r"\btell\b", "to tell a difference from noise"),
    (r"gptjax/data/store\.py", r"\"asked\"", "the name of an array in stores on disk"),
    (r"gptjax/training/privacy\.py", r"can be guessed", "a secret key"),
    (r"gptjax/interop/logit_check\.py", r"\bverb\b", "grammar: is or are"),
    (r".*", r"whole (number|word|document|head|character|byte|line|dollar)", "whole as in whole numbers"),
]
FILES = sorted(
    path
    for pattern in ("gptjax/**/*.py", "docs/**/*.md", "README.md", "CONTRIBUTING.md")
    for path in ROOT.glob(pattern)
)


def is_kept(name: str, line: str) -> bool:
    return any(re.fullmatch(file, name) and re.search(text, line) for file, text, _ in KEPT)


@pytest.mark.parametrize("word", FIELD_WORDS)
def test_a_word_of_the_field_is_used(word):
    found = []
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(word, line) and not is_kept(name, line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, f"write {FIELD_WORDS[word]} in place of {word}, or add an exception to KEPT:\n" + "\n".join(found)


def test_every_exception_is_needed():
    lines = [(str(path.relative_to(ROOT)), line) for path in FILES for line in path.read_text().splitlines()]
    for file, text, reason in KEPT:
        needed = any(
            re.fullmatch(file, name) and re.search(text, line) and any(re.search(word, line) for word in FIELD_WORDS)
            for name, line in lines
        )
        assert needed, f"no line needs the exception {text!r} ({reason}); remove it"
