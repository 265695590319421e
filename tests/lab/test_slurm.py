"""Slurm's answers, and clusters that do not answer. tests/slurm checks the same code on a real Slurm."""

import json
from pathlib import Path

import pytest
from conftest import TINY

from gptjax.lab import slurm
from gptjax.lab.progress import read_note, state_of, write_note
from gptjax.lab.slurm import Resources, Slurm
from gptjax.lab.trials import trials_of, write_sweep

ANSWERS = """#!/bin/sh
[ -e {folder}/down ] && exit 1
name=$(basename $0)
echo "$name $*" >> {folder}/queries
[ $name = scontrol ] && {{ grep "^$3 " {folder}/past | cut -d" " -f2 | grep . || {{ echo "Invalid job id"; exit 1; }} }}
[ $name = squeue ] && cat {folder}/queue
exit 0
"""


class Cluster:
    """Fake Slurm commands that answer from files, or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("sinfo", "squeue", "scontrol", "scancel", "sacct", "srun", "sbatch"):
            (folder / name).write_text(ANSWERS.format(folder=folder))
            (folder / name).chmod(0o755)
        self.answers(True)
        self.says()

    def answers(self, whether: bool) -> None:
        (self.folder / "down").unlink(missing_ok=True) if whether else (self.folder / "down").touch()

    def says(self, queue: dict[str, str] | None = None, past: dict[str, str] | None = None) -> None:
        """The states of jobs in the queue, and of those that are over and not forgotten."""
        for name, states, form in (("queue", queue, "{} {}"), ("past", past, "{} JobState={}")):
            lines = [form.format(job, state) for job, state in (states or {}).items()]
            (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def queries(self, name: str) -> list[str]:
        return [x for x in (self.folder / "queries").read_text().splitlines() if x.startswith(name)]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(slurm, "QUERY_SECONDS", 0.0)
    return Cluster(tmp_path / "bin")


@pytest.fixture
def trials(tmp_path):
    """Three trials that an earlier command has put into the queue as jobs 5_0, 5_1 and 5_2."""
    made = trials_of([TINY.override(name=name, seed=i) for i, name in enumerate("abc")], 1, tmp_path / "s")
    write_sweep(tmp_path / "s", made)
    for i, trial in enumerate(made):
        write_note(trial, "submitted", job=f"5_{i}")
    return made


def test_an_unreachable_cluster_has_lost_no_job(tmp_path, cluster, trials):
    cluster.says(queue={"5_0": "RUNNING", "5_1": "PENDING", "5_2": "PENDING"})
    runner = Slurm(tmp_path / "s", Resources())
    cluster.answers(False)
    jobs = runner.adopt(trials)
    assert jobs.keys() == {t.name for t in trials}, "no job counts as lost, so none is submitted a second time"
    cluster.answers(True)
    cluster.says(queue={"5_0": "RUNNING"}, past={"5_1": "TIMEOUT"})
    assert [job.poll() for job in jobs.values()] == [None, 75, 75], "out of time, and unknown to the cluster"
    assert [read_note(t)["event"] for t in trials] == ["submitted", "ended", "ended"]


def test_a_cancellation_is_repeated_until_it_is_received(tmp_path, cluster, trials):
    cluster.says(queue={"5_0": "RUNNING", "5_1": "RUNNING", "5_2": "RUNNING"})
    job = Slurm(tmp_path / "s", Resources()).adopt(trials)[trials[0].name]
    cluster.answers(False)
    job.stop()
    assert job.poll() is None
    cluster.answers(True)
    assert job.poll() is None and job.poll() is None and cluster.queries("scancel") == ["scancel 5_0"]
    cluster.says(past={"5_0": "CANCELLED"})
    assert job.poll() == 75 and state_of(trials[0]).status != "cancelled", "this command stopped it"


def test_how_jobs_end(tmp_path, cluster, trials, monkeypatch):
    cluster.says(queue={"5_0": "RUNNING", "5_1": "RUNNING", "5_2": "SPECIAL_EXIT"})
    jobs = list(Slurm(tmp_path / "s", Resources()).adopt(trials).values())
    cluster.says(queue={"5_2": "STAGE_OUT"}, past={"5_0": "CANCELLED+", "5_1": "NODE_FAIL"})
    assert [job.poll() for job in jobs] == [75, 3, None]
    assert (state_of(trials[0]).status, state_of(trials[0]).why) == ("cancelled", "cancelled on the cluster (scancel)")
    assert state_of(trials[1]).status == "failed"
    assert state_of(trials[1]).why.startswith("job 5_1: NODE_FAIL; see ") and "5_1_0_log.out" in state_of(trials[1]).why
    cluster.says(past={"5_2": "COMPLETED"})
    assert jobs[2].poll() is None, "the last write of its node may not be visible yet"
    write_note(trials[2], "ended", code=2, job="5_2")
    assert jobs[2].poll() == 2


def test_a_job_that_another_command_has_replaced_is_left_alone(tmp_path, cluster, trials):
    cluster.says(queue={"5_0": "RUNNING", "5_1": "RUNNING", "5_2": "RUNNING"})
    job = Slurm(tmp_path / "s", Resources()).adopt(trials)[trials[0].name]
    write_note(trials[0], "submitted", job="6_0")
    cluster.says(past={"5_0": "CANCELLED"})
    before = json.loads(trials[0].note.read_text())
    assert job.poll() == 75 and read_note(trials[0]) == before
