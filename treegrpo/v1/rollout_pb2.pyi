from treegrpo.v1 import tree_pb2 as _tree_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_KIND_UNSPECIFIED: _ClassVar[LeaseKind]
    LEASE_KIND_TRAIN: _ClassVar[LeaseKind]
    LEASE_KIND_EVAL: _ClassVar[LeaseKind]

class LeaseEndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEASE_END_REASON_UNSPECIFIED: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_COMPLETE: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_STOPPED: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_BUDGET: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_FAILED: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_LOST: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_RETURNED: _ClassVar[LeaseEndReason]
    LEASE_END_REASON_INTERRUPTED: _ClassVar[LeaseEndReason]
LEASE_KIND_UNSPECIFIED: LeaseKind
LEASE_KIND_TRAIN: LeaseKind
LEASE_KIND_EVAL: LeaseKind
LEASE_END_REASON_UNSPECIFIED: LeaseEndReason
LEASE_END_REASON_COMPLETE: LeaseEndReason
LEASE_END_REASON_STOPPED: LeaseEndReason
LEASE_END_REASON_BUDGET: LeaseEndReason
LEASE_END_REASON_FAILED: LeaseEndReason
LEASE_END_REASON_LOST: LeaseEndReason
LEASE_END_REASON_RETURNED: LeaseEndReason
LEASE_END_REASON_INTERRUPTED: LeaseEndReason

class RolloutRequest(_message.Message):
    __slots__ = ("hello", "demand", "subtree", "lease_end", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    SUBTREE_FIELD_NUMBER: _ClassVar[int]
    LEASE_END_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    demand: Demand
    subtree: _tree_pb2.Subtree
    lease_end: LeaseEnd
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ..., subtree: _Optional[_Union[_tree_pb2.Subtree, _Mapping]] = ..., lease_end: _Optional[_Union[LeaseEnd, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class RolloutResponse(_message.Message):
    __slots__ = ("welcome", "lease", "ack", "stop_expanding", "drain")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    STOP_EXPANDING_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    lease: Lease
    ack: Ack
    stop_expanding: StopExpanding
    drain: Drain
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., lease: _Optional[_Union[Lease, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., stop_expanding: _Optional[_Union[StopExpanding, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("sampler", "incarnation", "engine", "capacity", "version", "leases")
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    sampler: str
    incarnation: int
    engine: str
    capacity: int
    version: _tree_pb2.PolicyVersion
    leases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, sampler: _Optional[str] = ..., incarnation: _Optional[int] = ..., engine: _Optional[str] = ..., capacity: _Optional[int] = ..., version: _Optional[_Union[_tree_pb2.PolicyVersion, _Mapping]] = ..., leases: _Optional[_Iterable[str]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("run", "version", "void_leases", "plan")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VOID_LEASES_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: _tree_pb2.PolicyVersion
    void_leases: _containers.RepeatedScalarFieldContainer[str]
    plan: Plan
    def __init__(self, run: _Optional[str] = ..., version: _Optional[_Union[_tree_pb2.PolicyVersion, _Mapping]] = ..., void_leases: _Optional[_Iterable[str]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ...) -> None: ...

class Demand(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: int
    def __init__(self, leases: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("version", "waits_for", "waited_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: _tree_pb2.PolicyVersion
    waits_for: str
    waited_seconds: float
    def __init__(self, version: _Optional[_Union[_tree_pb2.PolicyVersion, _Mapping]] = ..., waits_for: _Optional[str] = ..., waited_seconds: _Optional[float] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("id", "source", "prompt", "targets", "family")
    ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    id: str
    source: str
    prompt: _containers.RepeatedCompositeFieldContainer[Message]
    targets: _containers.RepeatedScalarFieldContainer[str]
    family: str
    def __init__(self, id: _Optional[str] = ..., source: _Optional[str] = ..., prompt: _Optional[_Iterable[_Union[Message, _Mapping]]] = ..., targets: _Optional[_Iterable[str]] = ..., family: _Optional[str] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("trees", "rounds", "expansions", "max_turns", "max_action_tokens", "max_context", "temperature")
    TREES_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    EXPANSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_TURNS_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    trees: int
    rounds: int
    expansions: int
    max_turns: int
    max_action_tokens: int
    max_context: int
    temperature: float
    def __init__(self, trees: _Optional[int] = ..., rounds: _Optional[int] = ..., expansions: _Optional[int] = ..., max_turns: _Optional[int] = ..., max_action_tokens: _Optional[int] = ..., max_context: _Optional[int] = ..., temperature: _Optional[float] = ...) -> None: ...

class Budget(_message.Message):
    __slots__ = ("tokens", "tool_calls")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOOL_CALLS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    tool_calls: int
    def __init__(self, tokens: _Optional[int] = ..., tool_calls: _Optional[int] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "kind", "question", "plan", "grant", "seed", "min_version", "accepted")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: LeaseKind
    question: Question
    plan: Plan
    grant: Budget
    seed: int
    min_version: _tree_pb2.PolicyVersion
    accepted: _containers.RepeatedCompositeFieldContainer[_tree_pb2.Subtree]
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[_Union[LeaseKind, str]] = ..., question: _Optional[_Union[Question, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., grant: _Optional[_Union[Budget, _Mapping]] = ..., seed: _Optional[int] = ..., min_version: _Optional[_Union[_tree_pb2.PolicyVersion, _Mapping]] = ..., accepted: _Optional[_Iterable[_Union[_tree_pb2.Subtree, _Mapping]]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("lease", "tree", "index", "refusal")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    lease: str
    tree: int
    index: int
    refusal: str
    def __init__(self, lease: _Optional[str] = ..., tree: _Optional[int] = ..., index: _Optional[int] = ..., refusal: _Optional[str] = ...) -> None: ...

class StopExpanding(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: str
    def __init__(self, lease: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaseEnd(_message.Message):
    __slots__ = ("lease", "reason", "forgone", "unaccounted", "error")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FORGONE_FIELD_NUMBER: _ClassVar[int]
    UNACCOUNTED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    lease: str
    reason: LeaseEndReason
    forgone: int
    unaccounted: _tree_pb2.Cost
    error: str
    def __init__(self, lease: _Optional[str] = ..., reason: _Optional[_Union[LeaseEndReason, str]] = ..., forgone: _Optional[int] = ..., unaccounted: _Optional[_Union[_tree_pb2.Cost, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...
