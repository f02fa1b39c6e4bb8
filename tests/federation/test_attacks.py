"""What an enrolled but dishonest site, or somebody on the way, can do to a real run: nothing.

One run over the real wire (TLS, SuperLink, SuperNode, ClientApp) in which site b's trainer was
replaced by one that has b's real key and misbehaves in another way in every round. In round 1
its made-up update is well formed and is used: what follows is refused by the checks alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.codec import decode, encode
from fedqlora.config import RunConfig
from fedqlora.envelope import sign
from fedqlora.keys import load_signing_key
from server.checkpoint import RunFolder
from tests.federation.conftest import Hospitals

pytestmark = pytest.mark.slow

SPOILED: dict[int, Callable[[Adapter], Adapter]] = {
    2: lambda delta: {name: np.full_like(value, np.nan) for name, value in delta.items()},
    3: lambda delta: {name: value[:, :-1].copy() for name, value in delta.items()},
    4: lambda delta: {name: np.full_like(value, 1e6) for name, value in delta.items()},
}
FORGED, TAMPERED, REPLAYED = 5, 6, 7
REASONS = {
    2: "not finite",
    3: "has shape",
    4: "above aggregation.max_update_norm",
    FORGED: "in the name of a",
    TAMPERED: "altered",
    REPLAYED: "another instruction",
}


class Liar:
    """Describes itself as the honest site did; its updates are made up."""

    def __init__(self, honest: pb.Description) -> None:
        self._honest = honest

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update:
        if isinstance(body, pb.Describe):
            return self._honest
        assert isinstance(body, pb.Train)
        delta = {name: np.full_like(value, 0.01) for name, value in decode(body.adapter).items()}
        spoil = SPOILED.get(header.round, lambda delta: delta)
        count = config.training.steps * config.training.batch_examples
        return pb.Update(delta=encode(spoil(delta), "float32"), examples=count, tokens=1)

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        pass


def describe(folder: RunFolder) -> pb.Description:
    """What an honest site of a finished run has described."""
    newest = folder.latest()
    assert newest is not None
    return pb.Description(
        base_digest=newest.origin.base_digest,
        family=newest.origin.family,
        tensors=[
            pb.TensorShape(name=name, shape=newest.adapter[name].shape)
            for name in sorted(newest.adapter)
        ],
        given=encode({}, "float32"),
    )


@pytest.fixture(scope="module")
def attacked(hospitals: Hospitals) -> RunFolder:
    """A finished run of two honest sites, then the attacked one, which is returned."""
    honest = hospitals.new_run(rounds=1)
    assert hospitals.run(honest).completed, honest.status()
    key = load_signing_key(hospitals.certs / "sites" / "b" / "current" / "signing.key")
    updates: list[bytes] = []

    def misbehave(sent: bytes, service: Callable[[bytes], bytes]) -> bytes:
        reply = pb.Envelope.FromString(service(sent))
        header = pb.Header.FromString(reply.header)
        updates.append(reply.SerializeToString())
        if header.round == FORGED:
            return sign(
                key,
                run=header.run,
                round_=header.round,
                site="a",
                kind=pb.UPDATE,
                issued=header.issued,
                payload=reply.payload,
                replies_to=header.replies_to,
            )
        if header.round == TAMPERED:
            reply.payload = reply.payload[:-1] + bytes([reply.payload[-1] ^ 1])
            return reply.SerializeToString()
        return updates[1] if header.round == REPLAYED else updates[-1]

    folder = hospitals.new_run(rounds=REPLAYED, min_sites=1, expected_sites=2)
    with hospitals.impostor("b", Liar(describe(honest))) as tap:
        tap(misbehave)
        assert hospitals.run(folder).completed, folder.status()
    return folder


def test_a_well_formed_lie_is_used_so_it_is_the_checks_that_refuse(
    hospitals: Hospitals, attacked: RunFolder
) -> None:
    assert hospitals.outcomes(attacked, 1) == {"a": "used", "b": "used"}


@pytest.mark.parametrize(
    "round_",
    REASONS,
    ids=["nan", "wrong shape", "too large", "in another site's name", "tampered", "replayed"],
)
def test_an_attack_is_refused_and_named_and_the_honest_site_is_used(
    hospitals: Hospitals, attacked: RunFolder, round_: int
) -> None:
    lines = {line["site"]: line for line in hospitals.sites(attacked, round_)}
    assert lines["a"]["outcome"] == "used"
    assert lines["b"]["outcome"] == "invalid"
    assert REASONS[round_] in lines["b"]["reason"]
