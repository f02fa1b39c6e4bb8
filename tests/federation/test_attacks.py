"""What an enrolled but dishonest site, or somebody on the way, can do to a real run: nothing.

Each attack goes over the real wire: TLS, SuperLink, SuperNode and ClientApp carry it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig
from fedqlora.envelope import sign
from fedqlora.keys import load_signing_key
from server.checkpoint import RunFolder
from tests.federation.conftest import Hospitals

pytestmark = pytest.mark.slow


class Liar:
    """Describes itself like an honest site; its updates are whatever `spoil` makes."""

    def __init__(self, honest: pb.Description, spoil: Callable[[Adapter], Adapter]) -> None:
        self._honest = honest
        self._spoil = spoil

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update:
        assert header.run
        if isinstance(body, pb.Describe):
            return self._honest
        assert isinstance(body, pb.Train)
        delta = {name: np.full_like(value, 0.01) for name, value in decode(body.adapter).items()}
        count = config.training.steps * config.training.batch_examples
        return pb.Update(delta=encode(self._spoil(delta), "float32"), examples=count, tokens=1)

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        pass


@pytest.fixture(scope="module")
def honest(hospitals: Hospitals) -> tuple[RunFolder, pb.Description]:
    """An undisturbed run, and what its sites described."""
    folder = hospitals.new_run(rounds=1)
    result = hospitals.run(folder)
    assert result.completed, folder.status()
    newest = folder.latest()
    assert newest is not None
    description = pb.Description(
        base_digest=newest.origin.base_digest,
        family=newest.origin.family,
        tensors=[
            pb.TensorShape(name=name, shape=newest.adapter[name].shape)
            for name in sorted(newest.adapter)
        ],
        given=encode({}, "float32"),
    )
    return folder, description


def final_bytes(folder: RunFolder) -> bytes:
    newest = folder.latest()
    assert newest is not None
    return safetensors.numpy.save(newest.adapter)


def only_a_counts(hospitals: Hospitals, folder: RunFolder, reason: str) -> None:
    """The run ended well, b's reply was refused for this reason, and a's was used."""
    assert folder.status()["status"] == "finished", folder.status()
    lines = {line["site"]: line for line in hospitals.sites(folder, 1)}
    assert lines["a"]["outcome"] == "used"
    assert lines["b"]["outcome"] == "invalid"
    assert reason in lines["b"]["reason"]


SPOILED = {
    "not finite": lambda delta: {n: np.full_like(v, np.nan) for n, v in delta.items()},
    "has shape": lambda delta: {n: v[:, :-1].copy() for n, v in delta.items()},
    "above aggregation.max_update_norm": lambda d: {n: np.full_like(v, 1e6) for n, v in d.items()},
}


@pytest.mark.parametrize("reason", SPOILED)
def test_a_poisoned_update_is_left_out_and_named(
    hospitals: Hospitals, honest: tuple[RunFolder, pb.Description], reason: str
) -> None:
    folder = hospitals.new_run(rounds=1, min_sites=1, expected_sites=2)
    with hospitals.impostor("b", Liar(honest[1], SPOILED[reason])):
        hospitals.run(folder)
    only_a_counts(hospitals, folder, reason)


def test_an_unspoiled_lie_is_used_so_the_checks_above_are_what_refuses(
    hospitals: Hospitals, honest: tuple[RunFolder, pb.Description]
) -> None:
    folder = hospitals.new_run(rounds=1, min_sites=1, expected_sites=2)
    with hospitals.impostor("b", Liar(honest[1], lambda delta: delta)):
        hospitals.run(folder)
    assert hospitals.outcomes(folder, 1) == {"a": "used", "b": "used"}
    assert final_bytes(folder) != final_bytes(honest[0])


def header_of(envelope: bytes) -> pb.Header:
    return pb.Header.FromString(pb.Envelope.FromString(envelope).header)


def test_an_enrolled_site_cannot_answer_in_another_sites_name(
    hospitals: Hospitals, honest: tuple[RunFolder, pb.Description]
) -> None:
    key = load_signing_key(hospitals.certs / "sites" / "b" / "current" / "signing.key")

    def forge(sent: bytes, service: Callable[[bytes], bytes]) -> bytes:
        reply = service(sent)
        header = header_of(reply)
        if header.kind != pb.UPDATE:
            return reply
        return sign(
            key,
            run=header.run,
            round_=header.round,
            site="a",
            kind=pb.UPDATE,
            issued=header.issued,
            payload=pb.Envelope.FromString(reply).payload,
            replies_to=header.replies_to,
        )

    folder = hospitals.new_run(rounds=1, min_sites=1, expected_sites=2)
    with hospitals.impostor("b", Liar(honest[1], lambda delta: delta)) as tap:
        tap(forge)
        hospitals.run(folder)
    only_a_counts(hospitals, folder, "in the name of a")


def test_a_payload_changed_on_its_way_out_is_refused(
    hospitals: Hospitals, honest: tuple[RunFolder, pb.Description]
) -> None:
    def tamper(sent: bytes, service: Callable[[bytes], bytes]) -> bytes:
        reply = pb.Envelope.FromString(service(sent))
        if pb.Header.FromString(reply.header).kind == pb.UPDATE:
            reply.payload = reply.payload[:-1] + bytes([reply.payload[-1] ^ 1])
        return reply.SerializeToString()

    folder = hospitals.new_run(rounds=1, min_sites=1, expected_sites=2)
    with hospitals.impostor("b", Liar(honest[1], lambda delta: delta)) as tap:
        tap(tamper)
        hospitals.run(folder)
    only_a_counts(hospitals, folder, "altered")


def test_a_reply_replayed_from_an_earlier_round_is_refused(
    hospitals: Hospitals, honest: tuple[RunFolder, pb.Description]
) -> None:
    updates: list[bytes] = []

    def replay(sent: bytes, service: Callable[[bytes], bytes]) -> bytes:
        reply = service(sent)
        if header_of(reply).kind != pb.UPDATE:
            return reply
        updates.append(reply)
        return updates[0]

    folder = hospitals.new_run(rounds=2, min_sites=1, expected_sites=2)
    with hospitals.impostor("b", Liar(honest[1], lambda delta: delta)) as tap:
        tap(replay)
        hospitals.run(folder)
    assert hospitals.outcomes(folder, 1)["b"] == "used"
    assert hospitals.outcomes(folder, 2) == {"a": "used", "b": "invalid"}
