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
    ├── AddressInUseError (OSError)          a port that somebody else holds
    ├── UnavailableError  (ConnectionError)  a peer that is not there
    ├── DeadlineError     (TimeoutError)     a wait that ran out of time
    ├── RankError         (RuntimeError)     another process of the trainer failed
    ├── RunError          (RuntimeError)     the run leads nowhere
    │   └── PartError                        a part of the run ended, and with it the run
    ├── EngineError       (RuntimeError)     generation failed; the node is retried, then excluded
    │   └── EngineAwayError                  the engine is not there; it is waited for
    ├── ToolError         (RuntimeError)     a tool failed; the node is retried, then excluded
    │   └── ToolAwayError                    a tool is not there; it is waited for
    ├── AwayError                            either of these two: no fault of what was asked
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
    """Whether the same, tried again a little later, may go well without anybody's help."""


class ConfigError(TreeGrpoError, ValueError):
    """A key or value of the configuration is not acceptable."""


class DataError(TreeGrpoError, ValueError):
    """A row of a data file is not acceptable."""


class RunFileError(DataError):
    """A file of a run's directory is not what the run has written there, or cannot be used; another program has touched it."""


class ModelError(TreeGrpoError, ValueError):
    """A model directory cannot be used."""


class WeightsError(TreeGrpoError, ValueError):
    """A policy version is incomplete, corrupt or does not fit the model."""

    is_transient = True


class ContractError(TreeGrpoError, ValueError):
    """A message between services breaks the contract in protos/treegrpo/v1."""


class TreeError(ContractError):
    """A tree, or a part of one, cannot be trained on; the sentence names group (or lease), tree, node and field."""

    def __init__(self, message: str, field: str) -> None:
        """``field`` is the part that is wrong, of `Subtree`, `Step` or `Leaf`: few values, fit for a metric's label."""
        super().__init__(message, field)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[0])


class JournalError(TreeGrpoError, OSError):
    """The journal cannot be written or read."""


class DiskError(TreeGrpoError, OSError):
    """A disk is full or fails for now; nothing is left of what was being written, which may be tried again."""

    is_transient = True

    def __init__(self, number: int, message: str) -> None:
        """``number`` is the system's errno, by which such errors are counted."""
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


class AddressInUseError(TreeGrpoError, OSError):
    """An address to listen on is taken."""


class UnavailableError(TreeGrpoError, ConnectionError):
    """A service that is needed does not answer at its address."""

    is_transient = True


class DeadlineError(TreeGrpoError, TimeoutError):
    """A wait ended without what was waited for."""

    is_transient = True


class RankError(TreeGrpoError, RuntimeError):
    """Another rank of the trainer failed, for a reason that it gives itself."""

    is_transient = True


class RunError(TreeGrpoError, RuntimeError):
    """The run cannot go on without help: its work leads nowhere, or a part ended and starting it again did not help."""


class PartError(RunError):
    """A part of the run ended, and the run with it: for a reason that stays, or too often."""

    def __init__(self, message: str, *, is_transient: bool = False) -> None:
        """``is_transient`` as the part's own error says."""
        super().__init__(message)
        self.is_transient = is_transient


class EngineError(TreeGrpoError, RuntimeError):
    """The engine could not generate."""

    is_transient = True


class ToolError(TreeGrpoError, RuntimeError):
    """A tool of the environment could not answer."""

    is_transient = True


class AwayError(TreeGrpoError):
    """Something that is needed is not there, or says so itself. What was asked of it may be asked again when it is back."""

    is_transient = True

    def __init__(self, part: str, address: str, reason: str, *, certain: bool) -> None:
        """What is away, and how that shows.

        Args:
            part: one word for metrics and sentences, like ``retriever``.
            address: where it should be.
            reason: how the sentence goes on after part and address: ``does not answer (ConnectError)``.
            certain: no question can be at fault. A time-out or a crash may be the doing of what was asked: then it counts
                as away only if it does not answer a harmless question either.
        """
        super().__init__(part, address, reason)
        self.part = part
        self.certain = certain
        self.what = f"the {part} at {address}"
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what} {self.reason}"


class EngineAwayError(AwayError, EngineError):
    """The engine's server is not there, restarts or is overloaded."""


class ToolAwayError(AwayError, ToolError):
    """A tool is not there, restarts or is overloaded."""


class EnvironmentFaultError(TreeGrpoError, RuntimeError):
    """An environment raised what it should not, or gave what nobody could train on."""


DESCRIBED_CHARACTERS = 1000
_SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def describe(error: BaseException) -> str:
    """The text of an exception for a sentence: one line, never empty, its type where it has no words of its own.

    Example:
        >>> describe(TimeoutError())
        'TimeoutError'
    """
    words = " ".join(str(error).split())
    if not isinstance(error, TreeGrpoError):
        words = _shortened(words).rstrip(".")
    return words or type(error).__name__


def _shortened(words: str) -> str:
    """The sentences that fit in `DESCRIBED_CHARACTERS`, else the words, so that no address or path is cut."""
    if len(words) <= DESCRIBED_CHARACTERS:
        return words
    return _fitting(_SENTENCE_END.split(words)) or f"{_fitting(words.split(' ')) or words[:DESCRIBED_CHARACTERS]} …"


def _fitting(parts: Sequence[str]) -> str:
    """The first of ``parts`` that fit together, with blanks between them."""
    kept = ""
    for part in parts:
        longer = f"{kept} {part}".lstrip()
        if len(longer) > DESCRIBED_CHARACTERS:
            break
        kept = longer
    return kept
