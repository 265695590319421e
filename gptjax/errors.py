"""The errors that a user can mend, and the exit code of each; and warnings, where it is not certain that one is due.

Every message says what was wrong, where, what was expected and what to do. The command line prints it without
a traceback; anything that is not a `GptjaxError` is a bug and keeps its traceback.
"""

import sys

EXIT_DONE = 0  # the verb did all it was asked
EXIT_BUG = 1  # an unexpected exception, with its traceback
EXIT_BAD_INPUT = 2  # config, data, path or prompt refused
EXIT_FAILED = 3  # training had to stop (non-finite numbers, a failed save, a process gone), or logits disagree
EXIT_INTERRUPTED = 75  # Ctrl-C or SIGTERM: state saved, the same command continues (sysexits' EX_TEMPFAIL)


def warn(message: str) -> None:
    """Tells the user on stderr what may be wrong; the work goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class GptjaxError(Exception):
    """Something that the user can mend."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(GptjaxError):
    """An experiment that cannot be run; carries every problem that was found, not only the first."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        several = f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)
        super().__init__(problems[0] if len(problems) == 1 else several)


class DataError(GptjaxError):
    """Text that cannot be found, read or represented."""


class RunError(GptjaxError):
    """A run folder that is not one, cannot be written, is damaged, is in use, or belongs to another experiment."""


class ExchangeError(GptjaxError):
    """A model of Hugging Face that cannot be read exactly, or one of gptjax that they cannot express.

    Carries every problem that was found, not only the first.
    """

    def __init__(self, where: object, problems: list[str]):
        self.problems = problems
        lines = problems[0] if len(problems) == 1 else "\n" + "\n".join(f"  - {p}" for p in problems)
        super().__init__(f"{where}: {lines}")


class Disagreement(GptjaxError):
    """A model that says something else after it was imported or exported."""

    exit_code = EXIT_FAILED


class PromptError(GptjaxError):
    """A prompt that the model cannot continue."""


class TrainingFailed(GptjaxError):
    """Training that could not go on; everything up to the last checkpoint is kept."""

    exit_code = EXIT_FAILED


class Interrupted(GptjaxError):
    """A signal asked the run to stop; its state is saved and the same command continues."""

    exit_code = EXIT_INTERRUPTED
