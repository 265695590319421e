"""The command line: finds the verb, and turns its errors into messages and exit codes."""

import difflib
import importlib
import os
import sys
import time
import traceback

from gptjax import __version__
from gptjax.errors import EXIT_BUG, EXIT_FAILED, EXIT_INTERRUPTED, GptjaxError

VERBS = {  # verb -> the module and function that do it
    "train": ("gptjax.commands.train", "train"),
    "sweep": ("gptjax.commands.sweep", "sweep"),
    "scale": ("gptjax.commands.scale", "scale"),
    "sample": ("gptjax.commands.sample", "sample"),
    "chat": ("gptjax.commands.sample", "chat"),
    "eval": ("gptjax.commands.evaluate", "evaluate"),
    "import": ("gptjax.commands.exchange", "import_"),
    "export": ("gptjax.commands.exchange", "export"),
    "verify": ("gptjax.commands.runs", "verify"),
    "replay": ("gptjax.commands.runs", "replay"),
    "profile": ("gptjax.commands.profile", "profile"),
    "runs": ("gptjax.commands.compare", "runs"),
    "report": ("gptjax.commands.compare", "report"),
    "diff": ("gptjax.commands.compare", "diff"),
    "repro": ("gptjax.commands.repro", "repro"),
}
LAST_SECONDS = 2.0  # of a process that ends a job, in which the others come to say why: jax aborts them when it is gone
HELP = f"""gptjax {__version__}: train GPTs from experiment files, and use them

  gptjax train FILE [--run-dir DIR] [--section.field VALUE ...]    train, or go on with, an experiment
  gptjax sweep FILE [--seeds N] [--workers N] [--on slurm] [...]   train every experiment of a file with every seed
  gptjax scale FILE [--workers N] [--wait] [--list]                predict a large run's loss from small ones
  gptjax sample MODEL PROMPT [--max-length N] [...]                continue a text
  gptjax chat MODEL                                                talk with a model in the terminal
  gptjax eval MODEL [--data FILE ...] [--tasks TASK ...] [...]     loss on its own text or another; lm-eval's tasks
  gptjax import MODEL RUN                                          make a run folder of a Hugging Face model
  gptjax export RUN FOLDER [--adapter] [...]                       write a run as a Hugging Face model or PEFT adapter
  gptjax verify RUN                                                compare every checksum of every checkpoint
  gptjax replay RUN --step N                                       make a step again, and look for NaN and Inf in it
  gptjax profile RUN|FILE [--steps N] [--out FOLDER] [--json]      where the time of a training step goes
  gptjax runs [FOLDER] [--filter val_loss<3 ...] [--sort FIELD]    what is in a folder of runs
  gptjax report RUN|SWEEP ... [--metric NAME] [--out FOLDER]       compare variants over seeds: a table and a page
  gptjax diff A B                                                  how two runs or experiment files differ
  gptjax repro [CLAIM ...] [--list] [--folder DIR] [--json]        published results, reproduced: pass or fail

  MODEL is a run folder, a Hugging Face folder, or the name of a model on the Hugging Face hub.
  gptjax VERB --help       all options of a verb; gptjax train FILE --help lists every field with its value

exit codes: 0 done, 1 a bug (with a traceback), 2 bad input or a damaged file, 3 training had to stop
            or a claim does not pass,
            75 interrupted with the state saved (the same command goes on), 130 interrupted before that
"""


def main() -> None:
    """The `gptjax` command."""
    verb, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if verb in ("-V", "--version"):
        print(__version__)
        return
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}"
        _stop(f"gptjax: no such verb: {verb!r}; {meant} (gptjax --help)", 2)
    module, function = VERBS[verb]
    try:
        getattr(importlib.import_module(module), function)(arguments)
    except GptjaxError as e:
        _stop(f"gptjax {verb}: {e}", e.exit_code)
    except KeyboardInterrupt:
        print(f"gptjax {verb}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # at once: threads that still save are not waited for
    except BrokenPipeError:  # the reader of our output went away: nothing more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        if not _is_one_of_several():
            raise
        _stop(traceback.format_exc(), EXIT_BUG)


def _stop(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    if code == EXIT_FAILED or (_is_one_of_several() and code != EXIT_INTERRUPTED):
        sys.stdout.flush()
        if code != EXIT_FAILED:  # which has waited for the others already
            time.sleep(LAST_SECONDS)
        os._exit(code)  # at once: on the usual way out jax waits for the other processes, which may be gone
    sys.exit(code)


def _is_one_of_several() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()
