"""What is said on the broker by somebody who may say it, and is wrong: heard by nobody, fatal to nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import pytest

from learner.intake.coordinator.sampler_sessions import SamplerSessions
from tests.intake.server_harness import no_versions
from treegrpo.core.step import PolicyVersion
from treegrpo.errors import ContractError
from treegrpo.wire import control
from treegrpo.wire.control import LIMITS, ControlLimits, ControlPlane, Member
from treegrpo.wire.trainer_protocol import check_step_report, decode_message

S7 = "s7@0000000000000007"
GOOD: dict[str, Any] = {"id": "s7", "role": "sampler", "incarnation": 7, "metrics": "127.0.0.1:1", "alive": False}


def plane(limits: ControlLimits = LIMITS) -> ControlPlane:
    return ControlPlane("127.0.0.1:1", "r", Member("learner", "learner", 1), limits=limits)


def hear(listener: ControlPlane, row: object, topic: str = f"members/sampler/{S7}") -> None:
    payload: Any = msgpack.packb(row)
    listener._handle_message(topic, payload)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    "change",
    [
        {"incarnation": "seven"},
        {"incarnation": None},
        {"incarnation": -1},
        {"incarnation": 7.5},
        {"incarnation": True},
        {"alive": "no"},
        {"metrics": ["a"]},
        {"metrics": "x" * 1000},
        {"more": 1},
        {"id": b"s7"},
    ],
)
def test_presence_of_the_wrong_type_is_ignored_and_breaks_nothing(change: dict[str, Any]) -> None:
    """The intake wrote an incarnation in hexadecimal, whatever it was: one message of a sampler ended it."""
    listener = plane()
    hear(listener, {**GOOD, **change})
    assert not listener.members
    hear(listener, GOOD)
    assert list(listener.members) == [S7]
    SamplerSessions(set(), lambda _: None).apply_last_wills(listener.members.values())


@pytest.mark.parametrize("row", [[], 7, "s7", None, {}, {1: 2}, [GOOD]])
def test_presence_that_is_no_map_is_ignored(row: object) -> None:
    listener = plane()
    hear(listener, row)
    assert not listener.members


def test_what_is_wrong_is_logged_once_and_shortly(caplog: pytest.LogCaptureFixture) -> None:
    listener = plane()
    for number in range(100):
        listener._handle_message("state", f"x{number}".encode() * 1000)  # pyright: ignore[reportPrivateUsage]
    assert len(caplog.records) == 1
    assert len(caplog.records[0].getMessage()) < 400


def test_members_that_left_make_room_for_those_who_come() -> None:
    """Samplers that are named by host and process start again for months."""
    listener = plane(ControlLimits(members=2))
    for name, alive in (("s1", True), ("s2", False), ("s3", True), ("s4", True)):
        hear(listener, {**GOOD, "id": name, "alive": alive}, f"members/sampler/{name}@{7:016x}")
    assert [member.id for member in listener.members.values()] == ["s1", "s3"]


def test_one_name_takes_no_room_of_others_by_many_incarnations() -> None:
    listener = plane(ControlLimits(members=control.INCARNATIONS + 2))
    hear(listener, {**GOOD, "alive": True})
    for incarnation in range(100, 200):
        row = {**GOOD, "id": "many", "incarnation": incarnation, "alive": True}
        hear(listener, row, f"members/sampler/many@{incarnation:016x}")
    hear(listener, {**GOOD, "id": "s8", "alive": True}, f"members/sampler/s8@{7:016x}")
    newest = [member.incarnation for member in listener.members.values() if member.id == "many"]
    assert {"s7", "s8"} <= {member.id for member in listener.members.values()}
    assert newest == list(range(200 - control.INCARNATIONS, 200))


def test_a_member_for_whom_there_is_no_room_keeps_its_presence() -> None:
    """Were it removed, it would be said again, and removed again, without end."""
    owner = ControlPlane("127.0.0.1:1", "r", Member("learner", "learner", 1, run="r"), limits=ControlLimits(members=1))
    for name in ("s1", "s2"):
        hear(owner, {**GOOD, "id": name, "alive": True}, f"members/sampler/{name}@{7:016x}")
    hear(owner, {**GOOD, "id": "s1"}, "members/sampler/another")
    assert [member.id for member in owner.members.values()] == ["s1"]
    assert owner._topics_to_clear == {"members/sampler/another"}  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("text", ["1.4294967296", "1." + "9" * 5000, "١.٢", "1.2.3", "1", ".", "1.", "-1.2", " 1.2"])
def test_a_version_beyond_what_the_contract_can_say_is_refused(text: str) -> None:
    with pytest.raises(ContractError, match="is not a policy version") as refusal:
        PolicyVersion.parse(text)
    assert len(str(refusal.value)) < 200
    assert PolicyVersion.parse("1.4294967295").step == (1 << 32) - 1


@pytest.mark.parametrize(
    "row",
    [
        [],
        {"type": "Nothing"},
        {"type": []},
        {},
        {"type": "Take", "position": "3", "count": 1},
        {"type": "Take", "position": True, "count": 1},
        {"type": "Take", "position": 3},
        {"type": "Covered", "position": 3, "more": 1},
        {"type": "Taken", "groups": ["text"], "state": "running"},
        {"type": "Report", "values": []},
        {b"type": "Take"},
    ],
)
def test_what_is_no_message_of_the_local_socket_is_refused_in_a_sentence(row: object) -> None:
    body: Any = msgpack.packb(row)
    with pytest.raises(ContractError, match="trainer and intake must be of one version"):
        decode_message(body)


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\xdf\xff\xff\xff\xff", b"\x91" * 2000 + b"\xc0", b"\x81\xa4type\xa1\xff"])
def test_bytes_that_are_none_are_refused_in_a_sentence(body: bytes) -> None:
    with pytest.raises(ContractError, match="invalid message"):
        decode_message(body)


@pytest.mark.parametrize("values", [{"step": [1]}, {"version": {}}, {"reward": b"x"}, {"x": {1: b"y"}}])
def test_a_record_that_is_no_json_or_names_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="record of a step"):
        check_step_report(values)
    check_step_report({"kind": "step", "step": 1, "version": "1.1", "reward": 0.5})


async def test_weights_that_are_not_there_are_refused_in_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path("a\0b")):
        with pytest.raises(ContractError, match=r"Version 1\.0 cannot be served .*publish a directory that is there"):
            await no_versions().publish_version(PolicyVersion(1, 0), path, 0)
