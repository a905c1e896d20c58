from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.fault_proxy import LinkFault
from tests.chaos.faults import ENDS, LEARNER, ROLES, FaultKind, schedule
from treegrpo.core.lease import SILENCE_SECONDS

pytestmark = pytest.mark.pure

SAMPLERS = ["sampler-0", "sampler-1", "sampler-2"]
LINKS = [*((name, service) for name in SAMPLERS for service in ("intake", "retriever", "broker")), ("intake", "broker")]


def test_a_seed_gives_the_same_faults_again_and_another_seed_others() -> None:
    first = schedule(7, 60, SAMPLERS, LINKS)
    assert schedule(7, 60, SAMPLERS, LINKS) == first
    assert schedule(8, 60, SAMPLERS, LINKS) != first


def test_sixty_faults_meet_every_part_in_every_way() -> None:
    faults = schedule(0, 60, SAMPLERS, LINKS)
    assert Counter(fault.kind for fault in faults) == dict.fromkeys(FaultKind, 20)
    roles = {part: "sampler" if part in SAMPLERS else part for part in (*SAMPLERS, *ROLES)}
    hit = {(fault.kind, tuple(roles[part] for part in fault.parts)) for fault in faults}
    assert {(FaultKind.KILL, LEARNER), *((kind, (role,)) for kind in (FaultKind.KILL, FaultKind.STOP) for role in ROLES)} <= hit
    cuts = {(roles[fault.parts[0]], fault.mode) for fault in faults if fault.kind is FaultKind.CUT_OFF}
    assert cuts == {(role, mode) for role in ENDS for mode in LinkFault if mode is not LinkFault.OPEN}
    stops = [fault.seconds for fault in faults if fault.kind is FaultKind.STOP]
    assert sum(seconds > SILENCE_SECONDS for seconds in stops) == 10


def test_only_links_that_are_there_are_cut() -> None:
    faults = [fault for fault in schedule(3, 60, SAMPLERS, LINKS) if fault.kind is FaultKind.CUT_OFF]
    assert all(fault.links and set(fault.links) <= set(LINKS) for fault in faults)
    for fault in faults:
        if fault.parts[0] in SAMPLERS:
            assert [client for client, _ in fault.links] == [fault.parts[0]]


def test_who_is_cut_off_is_said_with_from_whom() -> None:
    cuts = {fault.whom for fault in schedule(3, 300, SAMPLERS, LINKS) if fault.kind is FaultKind.CUT_OFF}
    assert {"intake", "intake from the broker", "retriever", "broker", "sampler-1 from the retriever"} <= cuts
