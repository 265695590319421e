"""Trials as jobs of a Slurm cluster, through submitit. The only file that needs it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gptjax.errors import EXIT_FAILED, EXIT_INTERRUPTED, GptjaxError
from gptjax.lab.progress import note, note_end, noted
from gptjax.lab.trials import Trial

ASK_SECONDS = 2.0  # between two questions to the cluster
SAVE_SECONDS = 120  # from the warning that a job's time is over to its end
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE", "RESIZING", "STOPPED")


@dataclass(frozen=True)
class Resources:
    """What a trial asks the cluster for; None: what the cluster gives by itself."""

    partition: str | None = None  # where it queues
    minutes: int = 60  # after which it is told to save; the same command goes on with it
    gpus: int | None = None  # on its node
    cpus: int | None = None  # cores
    memory_gb: int | None = None  # of its node
    parallel: int = 256  # jobs of the sweep that may run at once

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

    def poll(self) -> int | None:
        """The exit code; None while the job is alive. Notes what the cluster knows and the trial could not tell."""
        state = self._cluster.state(self.job)
        if state.startswith(ALIVE):
            return None
        last = noted(self.trial)
        if last.get("event") == "cancelled":
            return EXIT_INTERRUPTED
        if state.startswith("CANCELLED"):
            note(self.trial, "cancelled", job=self.job, why="cancelled on the cluster (scancel)")
            return EXIT_INTERRUPTED
        if last.get("event") == "ended":
            return int(last["code"])
        if state.startswith("COMPLETED"):
            return 0
        if state.startswith(("TIMEOUT", "PREEMPTED", "UNKNOWN")):
            code, why = EXIT_INTERRUPTED, ""
        else:
            code, why = EXIT_FAILED, f"job {self.job}: {state}"
        note_end(self.trial, code, job=self.job, why=why)
        return code

    def stop(self) -> None:
        """Tells the job to save and stop, and takes it out of the queue."""
        self.kill()

    def kill(self) -> None:
        """As `stop`: the cluster ends what does not end by itself."""
        subprocess.run(["scancel", self.job], check=False)


class Slurm:
    """Submits all trials at once as an array, and finds those again that are in the queue already."""

    def __init__(self, folder: Path, resources: Resources):
        try:
            import submitit
        except ImportError:
            raise GptjaxError(
                "--on slurm: needs submitit, which is not installed; pip install 'gptjax[slurm]'"
            ) from None
        try:
            _ask("sinfo", "--version")
        except FileNotFoundError:
            raise GptjaxError(
                "--on slurm: there is no Slurm here (no sinfo); run it on a cluster's login node"
            ) from None
        self._executor = submitit.AutoExecutor(folder=str(folder.absolute() / "slurm"), cluster="slurm")
        self._executor.update_parameters(name=folder.absolute().name, **resources.parameters())
        self._states: dict[str, str] = {}
        self._asked = -ASK_SECONDS

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
            jobs = self._executor.map_array(train_here, list(trials))
        except Exception as e:  # submitit passes on whatever sbatch says
            raise GptjaxError(f"--on slurm: sbatch refused the trials: {e}") from None
        for trial, job in zip(trials, jobs, strict=True):
            note(trial, "submitted", job=job.job_id)
        return {trial.name: SlurmJob(trial, job.job_id, self) for trial, job in zip(trials, jobs, strict=True)}

    def state(self, job: str) -> str:
        """What the cluster says of a job: RUNNING, COMPLETED, CANCELLED, …; UNKNOWN where it has forgotten it."""
        if time.monotonic() - self._asked >= ASK_SECONDS:
            queue, self._asked = _ask("squeue", "--noheader", "--array", "--me", "--format=%i %T"), time.monotonic()
            if queue is None:  # the cluster does not answer just now: what was alive is taken to be so still
                return self._states.setdefault(job, "PENDING")
            self._states = dict(line.split(maxsplit=1) for line in queue.splitlines() if " " in line)
        return self._states.get(job) or self._state_of_the_past(job)

    def _state_of_the_past(self, job: str) -> str:
        for command in (("scontrol", "show", "job", job, "--oneliner"), ("sacct", "-nXPo", "State", "-j", job)):
            with contextlib.suppress(FileNotFoundError):
                for word in (_ask(*command) or "").split():
                    if command[0] == "sacct" or word.startswith("JobState="):
                        return word.removeprefix("JobState=")
        return "UNKNOWN"


def _ask(*command: str) -> str | None:
    """What a command of Slurm prints; None where it fails."""
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return None if told.returncode else told.stdout
