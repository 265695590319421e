"""The errors that a user can fix, with their exit codes, and warnings.

Every message says what was wrong, where, what was expected and what to do. The command line prints it without
a traceback; anything that is not a `GptjaxError` is a bug and keeps its traceback.
"""

import sys
import unicodedata

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they make a text look like another one
EXIT_DONE = 0  # the command succeeded
EXIT_BUG = 1  # an unexpected exception, with its traceback
EXIT_BAD_INPUT = 2  # invalid config, data, path or prompt
EXIT_FAILED = 3  # training failed (non-finite numbers, a failed save, a lost process), or logits disagree
EXIT_INTERRUPTED = 75  # Ctrl-C or SIGTERM: state saved, the same command resumes (sysexits' EX_TEMPFAIL)


def printable(text: str) -> str:
    """A text for a terminal: control characters, halves of surrogate pairs and changes of direction are written out.

    Spaces of other scripts (U+3000) and joiners of emoji stay.
    """

    def shown(c: str) -> str:
        is_control = unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
        return c.encode("unicode_escape").decode() if is_control or c in BIDI else c

    return "".join(map(shown, text))


def warn(message: str) -> None:
    """Prints a warning on stderr."""
    print(printable(f"warning: {message}"), file=sys.stderr, flush=True)


class GptjaxError(Exception):
    """An error that the user can fix."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(GptjaxError):
    """An invalid experiment, with all problems that were found, not only the first."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        several = f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)
        super().__init__(problems[0] if len(problems) == 1 else several)


class DataError(GptjaxError):
    """Data that cannot be found, read or tokenised."""


class RunError(GptjaxError):
    """A run folder that is missing, damaged, not writable, in use, or of another experiment."""


class ExchangeError(GptjaxError):
    """A Hugging Face model that cannot be imported exactly, or a model that cannot be exported exactly.

    Carries all problems that were found, not only the first.
    """

    def __init__(self, where: object, problems: list[str]):
        self.problems = problems
        lines = problems[0] if len(problems) == 1 else "\n" + "\n".join(f"  - {p}" for p in problems)
        super().__init__(f"{where}: {lines}")


class Disagreement(GptjaxError):
    """A model whose logits changed when it was imported or exported."""

    exit_code = EXIT_FAILED


class PromptError(GptjaxError):
    """A prompt that the model cannot continue."""


class TrainingFailed(GptjaxError):
    """Training that failed; everything up to the last checkpoint is kept."""

    exit_code = EXIT_FAILED


class Interrupted(GptjaxError):
    """A run stopped by a signal; its state is saved and the same command resumes it."""

    exit_code = EXIT_INTERRUPTED
