"""Published results, each as a claim: what a paper says, what gptjax gets, and whether the two agree by a given rule.

A claim is one file of experiments/papers/ with a line `claim = Claim(...)`; its name is that of the file. What it
trains and measures lies in a folder of its own, so that the same command goes on where it was stopped:

FOLDER/NAME/             the runs and figures of a claim
FOLDER/NAME/claim.json   its outcome, measured again only where the code of its file has changed
FOLDER/claims.json       all outcomes there are, and claims.html the same as a page
"""

import ast
import hashlib
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

import jax

from gptjax.atomic_io import read_json, write_atomic
from gptjax.config import Experiment
from gptjax.errors import GptjaxError, Interrupted, TrainingFailed
from gptjax.lab.claims_page import page
from gptjax.loading import defined
from gptjax.training.evaluation import Figures
from gptjax.training.loop import say
from gptjax.training.train import train

FORMAT_VERSION = 1
PAPERS = Path("experiments/papers")  # where claims are found by their name
OUTCOME, SPENT = "claim.json", "seconds.json"
TABLE, PAGE = "claims.json", "claims.html"
Verdict = Literal["pass", "fail", "crashed", "not run"]


@dataclass(frozen=True)
class Measured:
    """What came out of a claim."""

    ours: str  # our figure, in the form in which `Claim.published` gives theirs
    passed: bool  # by the claim's own rule
    figures: dict[str, Any] = field(default_factory=dict)  # every number behind it, as JSON can hold them
    seen: str = ""  # what was seen besides, in a sentence or two


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published result and how to get it here."""

    title: str = ""  # what is claimed, in a sentence
    citation: str = ""  # authors, year, title, and the section, table or page with the figure
    published: str = ""  # the figure as it was published
    tolerance: str = ""  # the rule that decides, in plain words, to be fixed before the figure is known
    minutes: float  # about how long it takes, on 2 CPU cores or on one GPU
    measure: Callable[[Path], Measured]  # trains and measures in a folder of its own, and goes on with what is there
    device: Literal["cpu", "gpu"] = "cpu"  # what it needs: on a CPU a claim for a GPU is not run


@dataclass(frozen=True)
class Outcome:
    """A claim's row in the table."""

    name: str
    title: str
    citation: str
    published: str
    tolerance: str
    ours: str
    verdict: Verdict
    minutes: float  # of this machine, over all attempts
    seen: str  # what was seen besides, or why there is no figure
    figures: dict[str, Any]
    date: str
    code: str  # hash of the claim's code


@dataclass(frozen=True)
class ClaimFile:
    """A claim and its file."""

    path: Path
    claim: Claim

    @property
    def name(self) -> str:
        return self.path.stem

    def code(self) -> str:
        """A hash of what the file does: comments, layout and the docstring can change without another measurement."""
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        tree.body = tree.body[ast.get_docstring(tree) is not None :]
        return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:32]

    def outcome(self, verdict: Verdict, seconds: float, measured: Measured) -> Outcome:
        c = self.claim
        told = (c.title, c.citation, c.published, c.tolerance, measured.ours, verdict, seconds / 60, measured.seen)
        return Outcome(self.name, *told, measured.figures, date.today().isoformat(), self.code())


def load_claim(name: str) -> ClaimFile:
    """The claim of a file, or of a name in experiments/papers. Raises `GptjaxError` naming what the file lacks."""
    is_path = name.endswith(".py") or "/" in name
    path = Path(name) if is_path else PAPERS / f"{name}.py"
    if not is_path and not path.is_file():
        known = ", ".join(p.stem for p in _files())
        raise GptjaxError(f"{name}: no such claim; {PAPERS} has {known or 'none: run it in a checkout of gptjax'}")
    _, claim = defined(str(path), "claim")
    if claim is None:
        raise GptjaxError(f"{path}: defines no `claim`; it must hold a line `claim = Claim(...)` (gptjax.lab.repro)")
    return ClaimFile(path, _checked(claim, path))


def _checked(claim: Any, path: Path) -> Claim:
    if not isinstance(claim, Claim):
        raise GptjaxError(f"{path}: its claim is a {type(claim).__name__}; a gptjax.lab.repro.Claim is needed")
    texts = {name: getattr(claim, name) for name in ("title", "citation", "published", "tolerance")}
    if empty := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
        why = {
            "citation": "say where the figure was published: authors, year, title, table or section",
            "tolerance": "say by which rule it passes, in plain words",
        }
        raise GptjaxError(f"{path}: the claim has no {empty[0]}; {why.get(empty[0], 'write it in a sentence')}")
    if claim.device not in ("cpu", "gpu") or not claim.minutes > 0 or not callable(claim.measure):
        raise GptjaxError(f"{path}: a claim needs device 'cpu' or 'gpu', minutes above 0, and a function to measure it")
    return claim


def all_claims() -> list[ClaimFile]:
    """Every claim in experiments/papers, the cheapest first; those for a GPU last."""
    found = [load_claim(str(path)) for path in _files() if defined(str(path), "claim")[1] is not None]
    return sorted(found, key=lambda filed: (filed.claim.device == "gpu", filed.claim.minutes, filed.name))


def _files() -> list[Path]:
    return sorted(path for path in PAPERS.glob("*.py") if path.name != "__init__.py")


def known_outcome(filed: ClaimFile, folder: Path) -> Outcome | None:
    """What was measured before by the same code; None where that is still to be done."""
    path = folder / filed.name / OUTCOME
    if not path.is_file():
        return None
    values = read_json(path)
    if values.pop("format", None) != FORMAT_VERSION or values.keys() != {f.name for f in fields(Outcome)}:
        return None
    outcome = Outcome(**values)
    return outcome if outcome.code == filed.code() else None


def reproduce(claims: Sequence[ClaimFile], folder: Path) -> Iterator[Outcome]:
    """Measures one claim after the other, whatever becomes of those before; the table is written after each.

    Raises `Interrupted` after Ctrl-C or SIGTERM: the same call goes on.
    """
    for filed in claims:
        outcome = known_outcome(filed, folder) or _attempt(filed, folder)
        if outcome.verdict in ("pass", "fail"):
            write_atomic(folder / filed.name / OUTCOME, _json({"format": FORMAT_VERSION} | asdict(outcome)))
        write_table([outcome], folder)
        yield outcome


def _attempt(filed: ClaimFile, folder: Path) -> Outcome:
    if filed.claim.device == "gpu" and jax.default_backend() != "gpu":
        return filed.outcome("not run", 0, Measured("", False, seen="needs a GPU, and there is none here"))
    place = folder / filed.name
    place.mkdir(parents=True, exist_ok=True)
    say(f"{filed.name}: {filed.claim.title} (about {filed.claim.minutes:g} min)")
    measured: Measured | None = None
    verdict: Verdict
    with _clock(place) as seconds:
        try:
            measured = filed.claim.measure(place)
            verdict = "pass" if measured.passed else "fail"
        except Interrupted:
            raise
        except GptjaxError as e:
            verdict = "crashed" if isinstance(e, TrainingFailed) else "not run"
            why = str(e)
        except Exception as e:  # a claim's own code: the others must not suffer from it
            say(traceback.format_exc())
            verdict, why = "crashed", f"{type(e).__name__}: {e}"
    return filed.outcome(verdict, seconds(), measured or Measured("", False, seen=why))


@contextmanager
def _clock(place: Path) -> Iterator[Callable[[], float]]:
    """Seconds spent on a claim, those of earlier attempts included."""
    path, began = place / SPENT, time.perf_counter()
    before = read_json(path)["seconds"] if path.is_file() else 0.0

    def seconds() -> float:
        return before + time.perf_counter() - began

    try:
        yield seconds
    finally:
        write_atomic(path, _json({"seconds": seconds()}))


def write_table(outcomes: Sequence[Outcome], folder: Path) -> list[Outcome]:
    """Puts outcomes into the table of a folder, in place of older ones of the same claims; as JSON and as a page."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TABLE
    there = read_json(path)["claims"] if path.is_file() else []
    rows = {row["name"]: row for row in [*there, *map(asdict, outcomes)]}
    write_atomic(path, _json({"format": FORMAT_VERSION, "claims": list(rows.values())}))
    write_atomic(folder / PAGE, page(list(rows.values())))
    return [Outcome(**row) for row in rows.values()]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def trained(experiment: Experiment, folder: Path) -> Figures:
    """The final figures of a run in FOLDER/NAME, which is trained, gone on with, or finished already."""
    return train(experiment, folder / experiment.name)
