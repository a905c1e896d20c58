"""Every error this project raises on purpose.

    TreeGrpoError
    ├── ConfigError       (ValueError)       a key or value of the configuration
    ├── DataError         (ValueError)       a row of a question, corpus or demonstration file
    ├── ModelError        (ValueError)       a model directory or its weights
    ├── WeightsError      (ValueError)       a policy version that arrived broken
    ├── ContractError     (ValueError)       a message that breaks the contract between services
    │   └── TreeError                        a tree, or a part of one, that cannot be trained on
    ├── JournalError      (OSError)          a journal that cannot be written or read
    ├── AddressInUseError (OSError)          a port that somebody else holds
    ├── UnavailableError  (ConnectionError)  a peer that is not there
    ├── DeadlineError     (TimeoutError)     a wait that ran out of time
    ├── RankError         (RuntimeError)     another process of the trainer failed
    ├── EngineError       (RuntimeError)     generation failed; the node is retried, then excluded
    └── ToolError         (RuntimeError)     a tool failed; the node is retried, then excluded

The message of each is one sentence that names the file, key or address and says what to do. The command line
prints that sentence and exits with code 2; nothing else catches the base class.
"""


class TreeGrpoError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(TreeGrpoError, ValueError):
    """A key or value of the configuration is not acceptable."""


class DataError(TreeGrpoError, ValueError):
    """A row of a data file is not acceptable."""


class ModelError(TreeGrpoError, ValueError):
    """A model directory cannot be used."""


class WeightsError(TreeGrpoError, ValueError):
    """A policy version is incomplete, corrupt or does not fit the model."""


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


class AddressInUseError(TreeGrpoError, OSError):
    """An address to listen on is taken."""


class UnavailableError(TreeGrpoError, ConnectionError):
    """A service that is needed does not answer at its address."""


class DeadlineError(TreeGrpoError, TimeoutError):
    """A wait ended without what was waited for."""


class RankError(TreeGrpoError, RuntimeError):
    """Another rank of the trainer failed, for a reason that it gives itself."""


class EngineError(TreeGrpoError, RuntimeError):
    """The engine could not generate."""


class ToolError(TreeGrpoError, RuntimeError):
    """A tool of the environment could not answer."""
