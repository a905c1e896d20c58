"""Exceptions: every error that this project raises on purpose.

    TreeGrpoError
    ├── ConfigError       (ValueError)       a key or value of the configuration
    ├── DataError         (ValueError)       a row of a question, corpus or demonstration file
    │   └── RunFileError                     a file of a run's directory that is not what the run has written there
    ├── ModelError        (ValueError)       a model directory or its weights
    ├── WeightsError      (ValueError)       a policy version that arrived broken
    ├── ContractError     (ValueError)       a message that breaks the contract between services
    │   └── TreeError                        a tree, or a part of one, that cannot be trained on
    ├── JournalError      (OSError)          a journal that cannot be written or read
    ├── DiskError         (OSError)          a disk that is full or fails for now; what was being written is not there
    ├── AddressInUseError (OSError)          a port that another process uses
    ├── UnavailableError  (ConnectionError)  a peer that is not there
    ├── DeadlineError     (TimeoutError)     a wait that ran out of time
    ├── RankError         (RuntimeError)     another process of the trainer failed
    ├── RunError          (RuntimeError)     the run makes no progress
    │   └── PartError                        a part of the run ended, and with it the run
    ├── EngineError       (RuntimeError)     generation failed; the node is retried, then excluded
    │   └── EngineAwayError                  the engine is not there; it is waited for
    ├── ToolError         (RuntimeError)     a tool failed; the node is retried, then excluded
    │   └── ToolAwayError                    a tool is not there; it is waited for
    ├── AwayError                            base of the two above; the request itself is not the cause
    └── EnvironmentFaultError (RuntimeError) an environment did what none may do; the node is excluded

The message of each is one sentence that names the file, key or address and says what to do. A process that ends with
one prints that sentence; its exit code says whether it is worth while to start it again (`treegrpo.runtime.entrypoint`).
Nothing else catches the base class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class TreeGrpoError(Exception):
    """Base of all errors raised on purpose."""

    is_transient: bool = False
    """Whether a retry may succeed without an operator's help."""


class ConfigError(TreeGrpoError, ValueError):
    """A key or value of the configuration is not acceptable."""


class DataError(TreeGrpoError, ValueError):
    """A row of a data file is not acceptable."""


class RunFileError(DataError):
    """A file of a run's directory cannot be used, or another program has changed it."""


class ModelError(TreeGrpoError, ValueError):
    """A model directory cannot be used."""


class WeightsError(TreeGrpoError, ValueError):
    """A policy version is incomplete, corrupt or does not fit the model."""

    is_transient = True


class ContractError(TreeGrpoError, ValueError):
    """A message between services breaks the contract in protos/treegrpo/v1."""


class TreeError(ContractError):
    """A tree, or a part of one, cannot be trained on; the message names group (or lease), tree, node and field."""

    def __init__(self, message: str, field: str) -> None:
        """``field``: the invalid field of `Subtree`, `Step` or `Leaf`; a metric's label."""
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


class JournalError(TreeGrpoError, OSError):
    """The journal cannot be written or read."""


class DiskError(TreeGrpoError, OSError):
    """A write failed since the disk is full or does not work now; nothing partial is left, and the write can be retried."""

    is_transient = True

    def __init__(self, number: int, message: str) -> None:
        """``number``: the system's errno, by which these errors are counted."""
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


class AddressInUseError(TreeGrpoError, OSError):
    """An address to listen on is taken."""


class UnavailableError(TreeGrpoError, ConnectionError):
    """A required service does not answer at its address."""

    is_transient = True


class DeadlineError(TreeGrpoError, TimeoutError):
    """A wait reached its deadline."""

    is_transient = True


class RankError(TreeGrpoError, RuntimeError):
    """Another rank of the trainer failed and has reported the reason."""

    is_transient = True


class RunError(TreeGrpoError, RuntimeError):
    """The run cannot continue without an operator: it makes no progress, or a part failed again after restarts."""


class PartError(RunError):
    """A part of the run failed permanently, or too often to be restarted; the run ends."""

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        """``is_transient``: that of the part's own error."""
        super().__init__(message)
        self.is_transient = is_transient


class EngineError(TreeGrpoError, RuntimeError):
    """The engine could not generate."""

    is_transient = True


class ToolError(TreeGrpoError, RuntimeError):
    """A tool of the environment could not answer."""

    is_transient = True


class AwayError(TreeGrpoError):
    """A server is unavailable: down, restarting or overloaded. The call can be repeated when it is available again."""

    is_transient = True

    def __init__(self, part: str, address: str, reason: str, *, certain: bool) -> None:
        """Name the unavailable server and the symptom.

        Args:
            part: one word for metrics and messages, such as ``retriever``.
            address: of the server.
            reason: completes the message after part and address: ``does not answer (ConnectError)``.
            certain: the call itself cannot be the cause. A time-out or a crash may be caused by the call: then the server
                counts as unavailable only if a health check fails too.
        """
        super().__init__(part, address, reason)
        self.part = part
        self.certain = certain
        self.what = f"the {part} at {address}"
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} {self.reason}"


class EngineAwayError(AwayError, EngineError):
    """The engine's server is unavailable."""


class ToolAwayError(AwayError, ToolError):
    """A tool's server is unavailable."""


class EnvironmentFaultError(TreeGrpoError, RuntimeError):
    """An environment raised an unexpected exception, or returned a result that cannot be trained on."""


DESCRIBED_CHARACTERS = 1000
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def describe(error: BaseException) -> str:
    """An exception as one line of text for a message: its own text, or its type's name if it has none.

    Example:
        >>> describe(TimeoutError())
        'TimeoutError'
    """
    words = " ".join(str(error).split())
    if not isinstance(error, TreeGrpoError):
        words = _shortened(words).rstrip(".")
    return words or type(error).__name__


def _shortened(words: str) -> str:
    """Shorten text to `DESCRIBED_CHARACTERS` at the end of a sentence, or else of a word, so that no address or path is cut."""
    if len(words) <= DESCRIBED_CHARACTERS:
        return words
    return _fitting(_SENTENCE_END.split(words)) or f"{_fitting(words.split(' ')) or words[:DESCRIBED_CHARACTERS]} …"


def _fitting(parts: Sequence[str]) -> str:
    """As many of the first ``parts`` as fit, joined by blanks."""
    kept = ""
    for part in parts:
        longer = f"{kept} {part}".lstrip()
        if len(longer) > DESCRIBED_CHARACTERS:
            break
        kept = longer
    return kept
