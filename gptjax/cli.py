"""The command line: runs the command, and turns its errors into messages and exit codes."""

import difflib
import importlib
import os
import sys
import time
import traceback

from gptjax import __version__
from gptjax.errors import EXIT_BUG, EXIT_FAILED, EXIT_INTERRUPTED, GptjaxError, printable

COMMANDS = {  # command -> its module and function
    "new": ("gptjax.commands.new", "new"),
    "train": ("gptjax.commands.train", "train"),
    "sweep": ("gptjax.commands.sweep", "sweep"),
    "scale": ("gptjax.commands.scale", "scale"),
    "sample": ("gptjax.commands.sample", "sample"),
    "chat": ("gptjax.commands.chat", "chat"),
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
EXIT_DELAY = 2.0  # seconds before a process ends its job, in which the others report errors: jax then aborts them
HELP = f"""gptjax {__version__}: train GPT models from experiment files, and use them

  gptjax new NAME [--from quickstart|sweep|finetune|claim]         write a starting file NAME.py to edit
  gptjax train FILE [--run-dir DIR] [--section.field VALUE ...]    train or resume an experiment
  gptjax sweep FILE [--seeds N] [--workers N] [--status] [...]     train every experiment of a file with every seed
  gptjax scale FILE [--workers N] [--external] [--status]          predict a large run's loss from small runs
  gptjax sample MODEL PROMPT [--max-length N] [...]                continue a text
  gptjax chat MODEL                                                chat with a model in the terminal
  gptjax eval MODEL [--data FILE ...] [--tasks TASK ...] [...]     loss on its validation text or other text; tasks
  gptjax import MODEL RUN [--tokenizer PATH|byte|NAME]             make a run folder from a Hugging Face model
  gptjax export RUN FOLDER [--adapter] [...]                       write a run as a Hugging Face model or PEFT adapter
  gptjax verify RUN                                                check the checksums of all checkpoints
  gptjax replay RUN --step N                                       recompute a step, and find NaN and Inf in it
  gptjax profile RUN|FILE [--steps N] [--out FOLDER] [--json]      profile training steps
  gptjax runs [FOLDER] [--filter val_loss<3 ...] [--sort FIELD]    list the runs of a folder
  gptjax report RUN|SWEEP ... [--metric NAME] [--out FOLDER]       compare variants over seeds: a table and a page
  gptjax diff A B                                                  how two runs or experiment files differ
  gptjax repro [CLAIM ...] [--list] [--folder DIR] [--json]        reproduce published results: pass or fail

  MODEL is a run folder, a Hugging Face folder, or the name of a model on the Hugging Face hub.
  gptjax COMMAND --help    all options of a command; gptjax train FILE --help lists every field with its value

exit codes: 0 done, 1 a bug (with a traceback), 2 bad input or a damaged file, 3 training failed
            or a claim does not pass, 75 interrupted with the state saved (the same command resumes),
            130 interrupted before that
"""


def main() -> None:
    """The `gptjax` command."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    arguments = sys.argv[2:]
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    if command in ("-V", "--version"):
        print(__version__)
        return
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        _stop(f"gptjax: no such command: {command!r}; {hint} (gptjax --help)", 2)
    module, function = COMMANDS[command]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m gptjax` does, for modules that an experiment names
    try:
        getattr(importlib.import_module(module), function)(arguments)
    except GptjaxError as e:
        _stop(f"gptjax {command}: {e}", e.exit_code)
    except KeyboardInterrupt:
        print(f"gptjax {command}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # immediately, without waiting for threads that still save
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception:
        if not _is_distributed():
            raise
        _stop(traceback.format_exc(), EXIT_BUG)


def _stop(message: str, code: int) -> None:
    print(printable(message), file=sys.stderr, flush=True)
    if code == EXIT_FAILED or (_is_distributed() and code != EXIT_INTERRUPTED):
        sys.stdout.flush()
        if code != EXIT_FAILED:  # training has already waited for the others
            time.sleep(EXIT_DELAY)
        os._exit(code)  # a normal exit would make jax wait for the other processes, which may be gone
    sys.exit(code)


def _is_distributed() -> bool:
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()
