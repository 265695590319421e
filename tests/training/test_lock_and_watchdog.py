"""One writer for a run folder; and no process of a job waits for ever for one that is dead, failing or stuck."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_run
from processes import PATIENCE, QUICK, ROOT, start, start_job, steps_logged, wait_for, wait_for_step, write_experiment

from gptjax.errors import RunError
from gptjax.training import checkpoint
from gptjax.training.lock import ALIVE_SECONDS, hold
from gptjax.training.watchdog import GONE_SECONDS

ENDLESS = {"train.steps": 100_000, "train.checkpoint_every": 10, "train.eval_every": 0, "train.log_every": 1}


@pytest.fixture
def job(tmp_path):
    """An experiment file for a run that never ends, and its folder; its remaining processes are killed."""
    started: list[subprocess.Popen] = []

    def start_one(count: int, **changes) -> tuple[list[subprocess.Popen], Path]:
        mine = write_experiment(tmp_path, tiny_run(tmp_path, **ENDLESS | changes))
        run = tmp_path / "run"
        started.extend(start_job(count, mine, run) if count > 1 else [start(mine, run)])
        wait_for_step(run, 12, started[0])
        return started, run

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def test_a_lock_is_held_by_one_and_leaves_nothing_behind(tmp_path):
    with hold(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / "lock.json").read_text())
        assert holder["pid"] == os.getpid() and holder["host"] == socket.gethostname()
        with pytest.raises(RunError, match=f"process {os.getpid()} on {socket.gethostname()} .* is training here"):
            hold(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists(), "a folder in which nothing was put goes again"
    with hold(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["file"]


def test_locks_of_other_machines_count_while_they_are_fresh(tmp_path, capfd):
    path = tmp_path / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "today"}))
    with pytest.raises(RunError, match=r"process 7 on elsewhere .*its last heartbeat was \d+ s ago"):
        hold(tmp_path).__enter__()
    assert json.loads(path.read_text())["host"] == "elsewhere", "a lock that is refused is left as it is"
    os.utime(path, (time.time() - ALIVE_SECONDS - 1,) * 2)
    with hold(tmp_path):
        assert "process 7 on elsewhere (since today), which has ended without releasing it" in capfd.readouterr().err
    path.write_text("\0\0 not JSON")  # as after a power failure
    os.utime(path, (0, 0))
    with hold(tmp_path):
        assert "took over the lock" in capfd.readouterr().err


@pytest.mark.slow
def test_a_second_process_is_refused_and_the_lock_of_a_killed_one_is_taken_over(job, tmp_path):
    (first,), run = job(1)
    second = start(tmp_path / "tiny.py", run)
    _, errors = second.communicate(timeout=PATIENCE)
    assert second.returncode == 2 and "Traceback" not in errors
    assert f"process {first.pid} on {socket.gethostname()}" in errors and "is training here" in errors
    first.kill()
    first.wait()
    third = start(tmp_path / "tiny.py", run)
    wait_for_step(run, max(steps_logged(run)) + 5, third)
    third.send_signal(signal.SIGTERM)
    _, errors = third.communicate(timeout=PATIENCE)
    assert third.returncode == 75
    assert f"took over the lock of process {first.pid} on" in errors


STUCK = """
import sys, time
from pathlib import Path
from gptjax.training.watchdog import Watchdog
watchdog = Watchdog(Path(sys.argv[1]), 3.0)
watchdog.heartbeat("step 5")
def waiting_for_data():
    time.sleep(600)
waiting_for_data()
"""


def test_a_stuck_process_shows_its_stacks_and_ends(tmp_path):
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUICK, cwd=ROOT, timeout=PATIENCE)
    assert ended.returncode == 3
    assert "stuck: no progress for" in ended.stderr and "in step 5" in ended.stderr
    assert "in waiting_for_data" in ended.stderr, "the stacks say where"


@pytest.mark.slow
@pytest.mark.parametrize("harmed", [0, 1])
@pytest.mark.parametrize("harm", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_when_one_of_two_is_killed_or_frozen_the_other_ends_and_says_so(job, harm, harmed):
    pair, run = job(2)
    other = pair[1 - harmed]
    wait_for(lambda: checkpoint.listing(run / "checkpoints"), "the first checkpoint", other)
    pair[harmed].send_signal(harm)
    began = time.monotonic()
    _, errors = other.communicate(timeout=PATIENCE)
    assert time.monotonic() - began < GONE_SECONDS + 15, "the bound that the README promises"
    if harm == signal.SIGKILL and harmed == 0:  # jax itself ends a process whose coordinator is gone, by SIGABRT
        assert other.returncode != 0 and "leader task was preempted/died/restarted" in errors
    else:
        assert other.returncode == 3, errors
        assert f"process {harmed} ({socket.gethostname()}, pid {pair[harmed].pid}) is gone" in errors
    found = checkpoint.listing(run / "checkpoints")
    assert found and all(checkpoint.problem(c) is None for c in found)


@pytest.mark.slow
def test_when_one_of_two_fails_the_other_names_its_error(tmp_path):
    mine = write_experiment(tmp_path, tiny_run(tmp_path, **ENDLESS))
    script = tmp_path / "failing.py"
    script.write_text(
        "import os\n"
        "from gptjax.data.batches import DataLoader\n"
        "whole = DataLoader.device_batch\n"
        "def device_batch(self, step, mesh):\n"
        "    if step == 20 and os.environ['JAX_PROCESS_ID'] == '1':\n"
        "        raise OSError('the disk with the text is gone')\n"
        "    return whole(self, step, mesh)\n"
        "DataLoader.device_batch = device_batch\n"
        "from gptjax.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, str(script), "train", str(mine), "--run-dir", str(tmp_path / "run")]
    pair = start_job(2, mine, tmp_path / "run", command=command)
    pair[1].wait(PATIENCE)
    failed = time.monotonic()
    errors = [process.communicate(timeout=PATIENCE)[1] for process in pair]
    assert time.monotonic() - failed < 10, "the bound that the README promises"
    assert pair[1].returncode == 1 and "OSError: the disk with the text is gone" in errors[1]
    assert pair[0].returncode == 3, errors[0]
    assert "process 1 (" in errors[0] and "failed in" in errors[0] and "the disk with the text is gone" in errors[0]


@pytest.mark.slow
def test_when_one_of_two_is_refused_all_are(tmp_path):
    """Process 0 alone looks at the folder; what it finds ends the other too, with the same message."""
    mine = write_experiment(tmp_path, tiny_run(tmp_path))
    (tmp_path / "run").write_text("a file")
    pair = start_job(2, mine, tmp_path / "run")
    errors = [process.communicate(timeout=PATIENCE)[1] for process in pair]
    assert [process.returncode for process in pair] == [2, 2], errors
    assert "is a file" in errors[0] and "process 0: " in errors[1] and "is a file" in errors[1]
