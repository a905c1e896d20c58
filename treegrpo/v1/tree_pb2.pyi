from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StepStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_STATUS_UNSPECIFIED: _ClassVar[StepStatus]
    STEP_STATUS_OK: _ClassVar[StepStatus]
    STEP_STATUS_TRUNCATED: _ClassVar[StepStatus]
    STEP_STATUS_ENGINE_ERROR: _ClassVar[StepStatus]
    STEP_STATUS_TOOL_ERROR: _ClassVar[StepStatus]
    STEP_STATUS_ENVIRONMENT_ERROR: _ClassVar[StepStatus]
STEP_STATUS_UNSPECIFIED: StepStatus
STEP_STATUS_OK: StepStatus
STEP_STATUS_TRUNCATED: StepStatus
STEP_STATUS_ENGINE_ERROR: StepStatus
STEP_STATUS_TOOL_ERROR: StepStatus
STEP_STATUS_ENVIRONMENT_ERROR: StepStatus

class PolicyVersion(_message.Message):
    __slots__ = ("lineage", "step")
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    lineage: int
    step: int
    def __init__(self, lineage: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class VersionSpan(_message.Message):
    __slots__ = ("version", "start", "end")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    version: PolicyVersion
    start: int
    end: int
    def __init__(self, version: _Optional[_Union[PolicyVersion, _Mapping]] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("prefilled", "cached", "decoded", "tool_calls", "seconds")
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    DECODED_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    prefilled: int
    cached: int
    decoded: int
    tool_calls: int
    seconds: float
    def __init__(self, prefilled: _Optional[int] = ..., cached: _Optional[int] = ..., decoded: _Optional[int] = ..., tool_calls: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("node", "parent", "action", "logprobs", "observation", "spans", "status", "tool", "tool_arguments", "valid", "cost")
    NODE_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    TOOL_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    VALID_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    node: int
    parent: int
    action: bytes
    logprobs: bytes
    observation: bytes
    spans: _containers.RepeatedCompositeFieldContainer[VersionSpan]
    status: StepStatus
    tool: str
    tool_arguments: str
    valid: bool
    cost: Cost
    def __init__(self, node: _Optional[int] = ..., parent: _Optional[int] = ..., action: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., observation: _Optional[bytes] = ..., spans: _Optional[_Iterable[_Union[VersionSpan, _Mapping]]] = ..., status: _Optional[_Union[StepStatus, str]] = ..., tool: _Optional[str] = ..., tool_arguments: _Optional[str] = ..., valid: _Optional[bool] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ...) -> None: ...

class Leaf(_message.Message):
    __slots__ = ("node", "rewards", "metrics")
    class RewardsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    node: int
    rewards: _containers.ScalarMap[str, float]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, node: _Optional[int] = ..., rewards: _Optional[_Mapping[str, float]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Subtree(_message.Message):
    __slots__ = ("lease", "tree", "index", "parent", "steps", "leaves", "prompt")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    lease: str
    tree: int
    index: int
    parent: int
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    leaves: _containers.RepeatedCompositeFieldContainer[Leaf]
    prompt: bytes
    def __init__(self, lease: _Optional[str] = ..., tree: _Optional[int] = ..., index: _Optional[int] = ..., parent: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., leaves: _Optional[_Iterable[_Union[Leaf, _Mapping]]] = ..., prompt: _Optional[bytes] = ...) -> None: ...
