"""Published results, each as a claim: the result of a paper, our result, and a rule that decides if they agree.

A claim is a file with a line `claim = Claim(...)`, in experiments/papers or anywhere else, and is named after it. Its
runs are kept, so the same command resumes an interrupted claim:

FOLDER/NAME/             the runs and metrics of a claim
FOLDER/NAME/claim.json   its result; measured again only if the code of its file has changed
FOLDER/claims.json       the results of all claims; claims.html shows them as a page
"""

import ast
import difflib
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
from gptjax.loading import read_attribute
from gptjax.training.evaluation import ScalarMetrics
from gptjax.training.loop import log
from gptjax.training.train import train

FORMAT_VERSION = 1
PAPERS = Path("experiments/papers")  # where claims are found by name
RESULT, SECONDS = "claim.json", "seconds.json"
TABLE, PAGE = "claims.json", "claims.html"
OLD_KEYS = {"figures": "metrics", "seen": "note"}  # of files written by version 0.1
ClaimVerdict = Literal["pass", "fail", "crashed", "not run"]


@dataclass(frozen=True)
class Measurement:
    """Our result for a claim."""

    ours: str  # our number, in the form of `Claim.published`
    passed: bool  # by the claim's own rule
    metrics: dict[str, Any] = field(default_factory=dict)  # the numbers behind it, as JSON values
    note: str = ""  # further observations, in a sentence or two


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published result and how to reproduce it."""

    title: str = ""  # the claim, in a sentence
    citation: str = ""  # authors, year, title, and the section, table or page with the number
    published: str = ""  # the number as published
    tolerance: str = ""  # the rule that decides, in plain words; fixed before the measurement
    minutes: float  # approximate time, on 2 CPU cores or one GPU
    measure: Callable[[Path], Measurement]  # trains and measures in the given folder, and resumes what is there
    device: Literal["cpu", "gpu"] = "cpu"  # a claim for a GPU is not run on a CPU


@dataclass(frozen=True)
class ClaimResult:
    """The result of a claim: a row of the table."""

    name: str
    title: str
    citation: str
    published: str
    tolerance: str
    ours: str
    verdict: ClaimVerdict
    minutes: float  # on this machine, over all attempts
    note: str  # further observations, or why there is no result
    metrics: dict[str, Any]
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
        """A hash of the file's code, without comments, layout and the module docstring."""
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        tree.body = tree.body[ast.get_docstring(tree) is not None :]
        return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:32]

    def result(self, verdict: ClaimVerdict, seconds: float, measurement: Measurement) -> ClaimResult:
        c = self.claim
        return ClaimResult(
            name=self.name,
            title=c.title,
            citation=c.citation,
            published=c.published,
            tolerance=c.tolerance,
            ours=measurement.ours,
            verdict=verdict,
            minutes=seconds / 60,
            note=measurement.note,
            metrics=measurement.metrics,
            date=date.today().isoformat(),
            code=self.code(),
        )


def load_claim(name: str) -> ClaimFile:
    """The claim of a file, or of a name in experiments/papers, where `pre-ln` also finds `pre_ln`.

    Raises `GptjaxError` if there is no such claim or the file is incomplete.
    """
    is_path = name.endswith(".py") or "/" in name
    path = Path(name) if is_path else PAPERS / f"{name.replace('-', '_').lower()}.py"
    if not is_path and not path.is_file():
        raise GptjaxError(_no_such_claim(name))
    _, claim = read_attribute(str(path), "claim")
    if claim is None:
        raise GptjaxError(f"{path}: defines no `claim`; it must hold a line `claim = Claim(...)` (gptjax.lab.repro)")
    return ClaimFile(path, _checked(claim, path))


def _no_such_claim(name: str) -> str:
    known = [path.stem for path in _files()]
    if not known:
        return (
            f"{name}: no such claim: this folder has no {PAPERS}; run the command in a checkout of gptjax, or name a "
            "file (gptjax new mine --from claim, then gptjax repro mine.py)"
        )
    near = difflib.get_close_matches(name.replace("-", "_"), known, 3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{name}: no such claim; {hint}{PAPERS} has {', '.join(known)}"


def _checked(claim: Any, path: Path) -> Claim:
    if not isinstance(claim, Claim):
        raise GptjaxError(f"{path}: its claim is of type {type(claim).__name__}; it must be a gptjax.lab.repro.Claim")
    texts = {name: getattr(claim, name) for name in ("title", "citation", "published", "tolerance")}
    if empty := [name for name, text in texts.items() if not isinstance(text, str) or not text.strip()]:
        why = {
            "citation": "say where the number was published: authors, year, title, table or section",
            "tolerance": "state the rule by which it passes, in plain words",
        }
        raise GptjaxError(f"{path}: the claim has no {empty[0]}; {why.get(empty[0], 'write it as a sentence')}")
    if claim.device not in ("cpu", "gpu") or not claim.minutes > 0 or not callable(claim.measure):
        raise GptjaxError(f"{path}: a claim needs device 'cpu' or 'gpu', minutes above 0, and a measure function")
    return claim


def all_claims() -> list[ClaimFile]:
    """Every claim in experiments/papers, the cheapest first; those for a GPU last."""
    claims = [load_claim(str(path)) for path in _files() if read_attribute(str(path), "claim")[1] is not None]
    return sorted(claims, key=lambda c: (c.claim.device == "gpu", c.claim.minutes, c.name))


def _files() -> list[Path]:
    return sorted(path for path in PAPERS.glob("*.py") if path.name != "__init__.py")


def saved_result(claim_file: ClaimFile, folder: Path) -> ClaimResult | None:
    """The saved result of the same code; None if the claim has to be measured."""
    path = folder / claim_file.name / RESULT
    if not path.is_file():
        return None
    values = _with_new_keys(read_json(path))
    if values.pop("format", None) != FORMAT_VERSION or values.keys() != {f.name for f in fields(ClaimResult)}:
        return None
    result = ClaimResult(**values)
    return result if result.code == claim_file.code() else None


def _with_new_keys(values: dict[str, Any]) -> dict[str, Any]:
    return {OLD_KEYS.get(key, key): value for key, value in values.items()}


def reproduce(claims: Sequence[ClaimFile], folder: Path) -> Iterator[ClaimResult]:
    """Measures the claims one after the other, also after one that fails; writes the table after each.

    Raises `Interrupted` after Ctrl-C or SIGTERM; the same call resumes.
    """
    for claim_file in claims:
        result = saved_result(claim_file, folder) or _attempt(claim_file, folder)
        if result.verdict in ("pass", "fail"):
            write_atomic(folder / claim_file.name / RESULT, _json({"format": FORMAT_VERSION} | asdict(result)))
        write_table([result], folder)
        yield result


def _attempt(claim_file: ClaimFile, folder: Path) -> ClaimResult:
    claim = claim_file.claim
    if claim.device == "gpu" and jax.default_backend() != "gpu":
        return claim_file.result("not run", 0, Measurement("", False, note="needs a GPU; this machine has none"))
    own_folder = folder / claim_file.name
    own_folder.mkdir(parents=True, exist_ok=True)
    log(f"{claim_file.name}: {claim.title} (about {claim.minutes:g} min)")
    measurement = None
    verdict: ClaimVerdict
    with _clock(own_folder) as seconds:
        try:
            measurement = claim.measure(own_folder)
            verdict = "pass" if measurement.passed else "fail"
        except Interrupted:
            raise
        except GptjaxError as e:
            verdict = "crashed" if isinstance(e, TrainingFailed) else "not run"
            why = str(e)
        except Exception as e:  # a bug in this claim must not stop the others
            log(traceback.format_exc())
            verdict = "crashed"
            why = f"{type(e).__name__}: {e}"
    return claim_file.result(verdict, seconds(), measurement or Measurement("", False, note=why))


@contextmanager
def _clock(folder: Path) -> Iterator[Callable[[], float]]:
    """The seconds spent on a claim, including earlier attempts."""
    path = folder / SECONDS
    started = time.perf_counter()
    before = read_json(path)["seconds"] if path.is_file() else 0.0

    def seconds() -> float:
        return before + time.perf_counter() - started

    try:
        yield seconds
    finally:
        write_atomic(path, _json({"seconds": seconds()}))


def write_table(results: Sequence[ClaimResult], folder: Path) -> list[ClaimResult]:
    """Writes results into the table of a folder, as JSON and as a page; they replace older ones of the same claims."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TABLE
    existing = read_json(path)["claims"] if path.is_file() else []
    rows = {row["name"]: _with_new_keys(row) for row in [*existing, *map(asdict, results)]}
    write_atomic(path, _json({"format": FORMAT_VERSION, "claims": list(rows.values())}))
    write_atomic(folder / PAGE, page(list(rows.values())))
    return [ClaimResult(**row) for row in rows.values()]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def train_run(experiment: Experiment, folder: Path) -> ScalarMetrics:
    """Trains or resumes a run in FOLDER/NAME; returns its final metrics."""
    return train(experiment, folder / experiment.name)
