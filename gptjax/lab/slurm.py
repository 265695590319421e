"""Trials as jobs of a Slurm cluster, through submitit. The only file that needs submitit."""

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
from gptjax.lab.progress import read_note, write_end_note, write_note
from gptjax.lab.trials import Trial

QUERY_SECONDS = 2.0  # between two queries of the queue
SAVE_SECONDS = 120  # from Slurm's warning to the end of a job's time
COMMAND_TIMEOUT = 30  # seconds after which the cluster counts as unreachable
VISIBLE_SECONDS = 60  # until other nodes see what a node wrote last: network file systems cache
UNKNOWN = "UNKNOWN"  # the state of a job that the cluster no longer knows
INTERRUPTED = ("CANCELLED", "TIMEOUT", "PREEMPTED", UNKNOWN)  # states of a job whose trial can be resumed
OVER = ("COMPLETED", "FAILED", "BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "REVOKED", *INTERRUPTED)


@dataclass(frozen=True)
class Resources:
    """The resources requested for each trial; None: the cluster's default."""

    partition: str | None = None  # Slurm partition
    minutes: int = 60  # time limit of a job, after which it saves; the same command resumes it
    gpus: int | None = None  # GPUs per trial
    cpus: int | None = None  # CPU cores per trial
    memory_gb: int | None = None  # memory per node
    parallel: int = 256  # jobs of the sweep that run at the same time, at most

    def check(self) -> None:
        """Raises `GptjaxError` for values that no job can have."""
        save_minutes = SAVE_SECONDS // 60
        if self.minutes <= save_minutes:
            raise GptjaxError(
                f"--slurm.minutes {self.minutes}: must be more than {save_minutes}: a job saves {save_minutes} minutes "
                "before its end"
            )
        given = {"gpus": self.gpus, "cpus": self.cpus, "memory-gb": self.memory_gb, "parallel": self.parallel}
        if low := [f"--slurm.{name}" for name, value in given.items() if value is not None and value < 1]:
            raise GptjaxError(f"{', '.join(low)}: must be at least 1")

    def parameters(self) -> dict[str, Any]:
        """The arguments of submitit."""
        values = {
            "timeout_min": self.minutes,
            "slurm_partition": self.partition,
            "gpus_per_node": self.gpus,
            "cpus_per_task": self.cpus,
            "mem_gb": self.memory_gb,
            "slurm_array_parallelism": self.parallel,
            "slurm_signal_delay_s": SAVE_SECONDS,
            "stderr_to_stdout": True,
        }
        return {name: value for name, value in values.items() if value is not None}


def train_here(trial: Trial) -> int:
    """Trains a trial in the job of this process and writes its note. Runs on a node of the cluster."""
    started = time.monotonic()
    job = _job_id()
    write_note(trial, "started", job=job)
    with trial.log.open("ab") as log:
        process = subprocess.Popen(
            trial.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            # Slurm signals every process of a job; only this process handles it, and makes training save
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )  # fmt: skip

    def save(number: int, frame: FrameType | None) -> None:
        process.terminate()

    signal.signal(signal.SIGUSR2, save)  # replaces submitit's handler, which would requeue the job
    code = process.wait()
    write_end_note(trial, code, job=job, seconds=round(time.monotonic() - started, 1))
    return code


def _job_id() -> str:
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    return os.environ["SLURM_JOB_ID"]


class SlurmJob:
    """A trial that is queued or running."""

    def __init__(self, trial: Trial, job: str, cluster: "Slurm"):
        self.trial = trial
        self.job = job
        self._cluster = cluster
        self._cancelled: bool | None = None  # whether the cluster received our cancellation; None: not requested
        self._completed: float | None = None  # when the cluster first reported the job as completed

    def poll(self) -> int | None:
        """The exit code; None while the job is alive. Writes a note if the trial could not write one itself."""
        state = self._cluster.state(self.job)
        if not state.startswith(OVER):
            if self._cancelled is False:
                self.kill()
            return None
        last = read_note(self.trial)
        if last.get("job") != self.job:
            return EXIT_INTERRUPTED  # another command has started the trial again
        if state.startswith("CANCELLED") and self._cancelled is None:
            write_note(self.trial, "cancelled", job=self.job, why="cancelled on the cluster (scancel)")
            return EXIT_INTERRUPTED
        if last["event"] == "cancelled":
            return EXIT_INTERRUPTED
        if last["event"] == "ended":
            return int(last["code"])
        why = ""
        if state.startswith("COMPLETED"):
            self._completed = self._completed or time.monotonic()
            if time.monotonic() - self._completed < VISIBLE_SECONDS:
                return None
            code = 0
        elif state.startswith(INTERRUPTED):
            code = EXIT_INTERRUPTED
        else:
            code = EXIT_FAILED
            why = f"job {self.job}: {state}; see {self._cluster.logs}/{self.job}_0_log.out"
        write_end_note(self.trial, code, job=self.job, why=why)
        return code

    def stop(self) -> None:
        """Cancels the job, which makes it save; `poll` repeats this until the cluster has received it."""
        self.kill()

    def kill(self) -> None:
        """Like `stop`: the cluster kills a job that does not end."""
        self._cancelled = self._cluster.cancel(self.job)


class Slurm:
    """Submits all trials as one job array, and finds jobs of an earlier command again."""

    def __init__(self, folder: Path, resources: Resources):
        try:
            import submitit
        except ImportError:
            raise GptjaxError(
                "--executor slurm: needs submitit, which is not installed; pip install 'gptjax[slurm]'"
            ) from None
        if shutil.which("sinfo") is None:
            raise GptjaxError("--executor slurm: this machine has no Slurm (no sinfo); use a login node of a cluster")
        self.logs = folder.absolute() / "slurm"  # the output of jobs outside their trials
        self._executor = submitit.AutoExecutor(folder=str(self.logs), cluster="slurm")
        self._executor.update_parameters(name=folder.absolute().name, **resources.parameters())
        self._states: dict[str, str] = {}
        self._last_query = -QUERY_SECONDS
        self._reachable = False

    def adopt(self, trials: Sequence[Trial]) -> dict[str, SlurmJob]:
        """The jobs of an earlier command that are queued or running."""
        notes = {trial: read_note(trial) for trial in trials}
        known = {t.name: SlurmJob(t, last["job"], self) for t, last in notes.items()
                 if last.get("event") in ("submitted", "started") and "job" in last}  # fmt: skip
        return {name: job for name, job in known.items() if job.poll() is None}

    def start(self, trials: Sequence[Trial], measured: Mapping[str, int]) -> dict[str, SlurmJob]:
        """Submits a job for each trial."""
        if not trials:
            return {}
        try:
            with _block_ctrl_c():
                jobs = self._executor.map_array(train_here, list(trials))
        except Exception as e:  # submitit raises whatever sbatch reports
            raise GptjaxError(f"--executor slurm: sbatch refused the trials: {e}") from None
        for trial, job in zip(trials, jobs, strict=True):
            if read_note(trial).get("job") != job.job_id:  # else it has already started
                write_note(trial, "submitted", job=job.job_id)
        return {trial.name: SlurmJob(trial, job.job_id, self) for trial, job in zip(trials, jobs, strict=True)}

    def state(self, job: str) -> str:
        """Slurm's state of a job: RUNNING, COMPLETED, CANCELLED, ...; UNKNOWN if the cluster no longer knows it.

        While the cluster is unreachable, a job that is not known to be over counts as alive.
        """
        if time.monotonic() - self._last_query >= QUERY_SECONDS:
            done = _run("squeue", "--noheader", "--array", "--me", "--format=%i %T")
            self._last_query = time.monotonic()
            self._reachable = done is not None and done.returncode == 0
            if done and self._reachable:
                self._states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line)
        if job in self._states:
            return self._states[job]
        return self._past_state(job) if self._reachable else "PENDING"

    def cancel(self, job: str) -> bool:
        """Cancels a job; returns whether the cluster received it. An unreachable cluster is not tried for every job."""
        if not self._reachable:
            return False
        done = _run("scancel", job)
        self._reachable = done is not None
        return done is not None and done.returncode == 0

    def _past_state(self, job: str) -> str:
        """The state of a job that is not in the queue."""
        done = _run("scontrol", "show", "job", job, "--oneliner")
        if done and done.returncode == 0:
            words = done.stdout.split()
            return next((w.removeprefix("JobState=") for w in words if w.startswith("JobState=")), UNKNOWN)
        if done is None or not any(text in done.stdout + done.stderr for text in ("Invalid job id", "not found")):
            return "PENDING"
        accounting = _run("sacct", "-nXPo", "State", "-j", job)
        if accounting is None or accounting.returncode != 0:
            return UNKNOWN
        return next(iter(accounting.stdout.split()), UNKNOWN)


def _run(*command: str) -> subprocess.CompletedProcess[str] | None:
    """Runs a command of Slurm; None if it does not exist or does not answer."""
    with contextlib.suppress(FileNotFoundError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT)
    return None


@contextlib.contextmanager
def _block_ctrl_c() -> Iterator[None]:
    """Delays Ctrl-C. A terminal sends it to every process; processes started in this context do not receive it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
