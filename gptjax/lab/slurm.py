"""Trials as jobs of a Slurm cluster, through submitit. The only file that needs it."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gptjax.errors import EXIT_FAILED, EXIT_INTERRUPTED, GptjaxError
from gptjax.lab.progress import note, note_end, noted
from gptjax.lab.trials import Trial

ASK_SECONDS = 2.0  # between two questions to the cluster
SAVE_SECONDS = 120  # from the warning that a job's time is over to its end
ANSWER_SECONDS = 30  # after which a cluster that was asked something is taken not to answer
SEEN_SECONDS = 60  # until what a node wrote last is seen by others: network file systems remember what was there before
UNKNOWN = "UNKNOWN"  # of a job that the cluster has forgotten
CUT_OFF = ("CANCELLED", "TIMEOUT", "PREEMPTED", UNKNOWN)  # states of a job whose trial may go on where it was
OVER = ("COMPLETED", "FAILED", "BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "REVOKED", *CUT_OFF)


@dataclass(frozen=True)
class Resources:
    """What a trial asks the cluster for; None: what the cluster gives by itself."""

    partition: str | None = None  # where it queues
    minutes: int = 60  # after which it is told to save; the same command goes on with it
    gpus: int | None = None  # on its node
    cpus: int | None = None  # cores
    memory_gb: int | None = None  # of its node
    parallel: int = 256  # jobs of the sweep that may run at once

    def check(self) -> None:
        """Raises `GptjaxError` for what no job can have."""
        if self.minutes <= (save := SAVE_SECONDS // 60):
            raise GptjaxError(
                f"--slurm.minutes {self.minutes}: a job saves {save} minutes before its end; it needs more"
            )
        given = {"gpus": self.gpus, "cpus": self.cpus, "memory-gb": self.memory_gb, "parallel": self.parallel}
        if low := [f"--slurm.{name}" for name, value in given.items() if value is not None and value < 1]:
            raise GptjaxError(f"{', '.join(low)}: must be 1 or more")

    def parameters(self) -> dict[str, Any]:
        """In submitit's words."""
        told = {
            "timeout_min": self.minutes,
            "slurm_partition": self.partition,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cpus,
            "mem_gb": self.memory_gb,
            "slurm_array_parallelism": self.parallel,
            "slurm_signal_delay_s": SAVE_SECONDS,
            "stderr_to_stdout": True,
        }
        return {name: value for name, value in told.items() if value is not None}


def train_here(trial: Trial) -> int:
    """Trains a trial in this process's job, and notes how that ended. Runs on a node of the cluster."""
    began, job = time.monotonic(), _job_id()
    note(trial, "started", job=job)
    with trial.log.open("ab") as log:
        process = subprocess.Popen(
            trial.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            # Slurm warns every process of a job; only we are to hear it, and ask training to save
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )  # fmt: skip

    def save(number: int, frame: FrameType | None) -> None:
        process.terminate()

    signal.signal(signal.SIGUSR2, save)  # in the place of submitit's own, which would start the job anew
    code = process.wait()
    note_end(trial, code, job=job, seconds=round(time.monotonic() - began, 1))
    return code


def _job_id() -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]


class SlurmJob:
    """A trial in the queue or on a node."""

    def __init__(self, trial: Trial, job: str, cluster: "Slurm"):
        self.trial, self.job, self._cluster = trial, job, cluster
        self._told: bool | None = None  # whether the cluster knows that it is to end; None: it is not to
        self._completed: float | None = None  # when that was first heard of

    def poll(self) -> int | None:
        """The exit code; None while the job is alive. Notes what the cluster knows and the trial could not tell."""
        state = self._cluster.state(self.job)
        if not state.startswith(OVER):
            if self._told is False:
                self.kill()
            return None
        last = noted(self.trial)
        if last.get("job") != self.job:
            return EXIT_INTERRUPTED  # another command has begun anew with the trial
        if state.startswith("CANCELLED") and self._told is None:
            note(self.trial, "cancelled", job=self.job, why="cancelled on the cluster (scancel)")
            return EXIT_INTERRUPTED
        if last["event"] == "cancelled":
            return EXIT_INTERRUPTED
        if last["event"] == "ended":
            return int(last["code"])
        if state.startswith("COMPLETED"):
            self._completed = self._completed or time.monotonic()
            if time.monotonic() - self._completed < SEEN_SECONDS:
                return None
            code, why = 0, ""
        elif state.startswith(CUT_OFF):
            code, why = EXIT_INTERRUPTED, ""
        else:
            code, why = EXIT_FAILED, f"job {self.job}: {state}; see {self._cluster.logs}/{self.job}_0_log.out"
        note_end(self.trial, code, job=self.job, why=why)
        return code

    def stop(self) -> None:
        """Tells the job to save and stop, and takes it out of the queue; again at every `poll` until that is heard."""
        self.kill()

    def kill(self) -> None:
        """As `stop`: the cluster ends what does not end by itself."""
        self._told = self._cluster.cancel(self.job)


class Slurm:
    """Submits all trials at once as an array, and finds those again that are in the queue already."""

    def __init__(self, folder: Path, resources: Resources):
        try:
            import submitit
        except ImportError:
            raise GptjaxError(
                "--on slurm: needs submitit, which is not installed; pip install 'gptjax[slurm]'"
            ) from None
        if shutil.which("sinfo") is None:
            raise GptjaxError("--on slurm: there is no Slurm here (no sinfo); run it on a cluster's login node")
        self.logs = folder.absolute() / "slurm"  # what jobs print before and beside their trials
        self._executor = submitit.AutoExecutor(folder=str(self.logs), cluster="slurm")
        self._executor.update_parameters(name=folder.absolute().name, **resources.parameters())
        self._states: dict[str, str] = {}
        self._asked, self._answers = -ASK_SECONDS, False

    def adopt(self, trials: Sequence[Trial]) -> dict[str, SlurmJob]:
        """The jobs that are in the queue or running."""
        noted_jobs = {trial: noted(trial) for trial in trials}
        known = {t.name: SlurmJob(t, last["job"], self) for t, last in noted_jobs.items()
                 if last.get("event") in ("submitted", "started") and "job" in last}  # fmt: skip
        return {name: job for name, job in known.items() if job.poll() is None}

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> dict[str, SlurmJob]:
        """A job for each trial."""
        if not trials:
            return {}
        try:
            with _ctrl_c_later():
                jobs = self._executor.map_array(train_here, list(trials))
        except Exception as e:  # submitit passes on whatever sbatch says
            raise GptjaxError(f"--on slurm: sbatch refused the trials: {e}") from None
        for trial, job in zip(trials, jobs, strict=True):
            if noted(trial).get("job") != job.job_id:  # else it has begun already
                note(trial, "submitted", job=job.job_id)
        return {trial.name: SlurmJob(trial, job.job_id, self) for trial, job in zip(trials, jobs, strict=True)}

    def state(self, job: str) -> str:
        """What the cluster says of a job: RUNNING, COMPLETED, CANCELLED, …; UNKNOWN where it has forgotten it.

        While it does not answer, what is not known to be over is taken to be alive.
        """
        if time.monotonic() - self._asked >= ASK_SECONDS:
            told = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %T")
            self._asked, self._answers = time.monotonic(), told is not None and told.returncode == 0
            if told and self._answers:
                self._states = dict(line.split(maxsplit=1) for line in told.stdout.splitlines() if " " in line)
        known = self._states.get(job)
        return known or (self._state_of_the_past(job) if self._answers else "PENDING")

    def cancel(self, job: str) -> bool:
        """Whether the cluster has heard that a job is to end. One that does not answer is not asked for every job."""
        if not self._answers:
            return False
        told = _ask("scancel", job)
        self._answers = told is not None
        return told is not None and told.returncode == 0

    def _state_of_the_past(self, job: str) -> str:
        told = _ask("scontrol", "show", "job", job, "--oneliner")
        if told and told.returncode == 0:
            return next(
                (w.removeprefix("JobState=") for w in told.stdout.split() if w.startswith("JobState=")), UNKNOWN
            )
        if told is None or not any(words in told.stdout + told.stderr for words in ("Invalid job id", "not found")):
            return "PENDING"
        kept = _ask("sacct", "-nXPo", "State", "-j", job)
        return next(iter(kept.stdout.split()), UNKNOWN) if kept and kept.returncode == 0 else UNKNOWN


def _ask(*command: str) -> subprocess.CompletedProcess[str] | None:
    """How a command of Slurm ended, and what it printed; None where it is not there or does not answer."""
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS)
    return None


@contextlib.contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """A terminal tells Ctrl-C to every program it runs; one that is started in here does not hear it, and we later."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
