"""Envelopes: each guarantee of the module, restated."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedqlora import protocol_pb2 as pb
from fedqlora.envelope import (
    ReplayWindow,
    Verified,
    instruction_digest,
    sign,
    verify,
    verify_reply,
)
from fedqlora.errors import ConfigError, EnvelopeError, ReplayError, SignatureError, VersionError

COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes(32))
SITE = Ed25519PrivateKey.from_private_bytes(b"s" * 32)


def instruction(issued: int = 1, payload: bytes = b"train", run: str = "r", **more: int) -> bytes:
    return sign(
        COORDINATOR,
        run=run,
        round_=1,
        site="a",
        kind=pb.TRAIN,
        issued=issued,
        payload=payload,
        **more,
    )


def opened(data: bytes) -> Verified:
    return verify(data, COORDINATOR.public_key(), kinds=[pb.TRAIN])


def reply(to: bytes, site: str = "a", key: Ed25519PrivateKey = SITE) -> bytes:
    return sign(
        key,
        run="r",
        round_=1,
        site=site,
        kind=pb.UPDATE,
        issued=1,
        payload=b"delta",
        replies_to=instruction_digest(to),
    )


def test_a_genuine_envelope_opens() -> None:
    verified = opened(instruction())
    assert (verified.header.run, verified.header.round, verified.payload) == ("r", 1, b"train")


@given(st.data())
def test_no_byte_of_an_envelope_can_be_changed(data: st.DataObject) -> None:
    envelope = bytearray(instruction())
    position = data.draw(st.integers(0, len(envelope) - 1))
    envelope[position] ^= data.draw(st.integers(1, 255))
    try:
        verified = opened(bytes(envelope))
    except EnvelopeError:
        return
    # A changed protobuf tag can only turn a field into an ignored unknown one, in which
    # case what is left has to be what was signed.
    assert (verified.header.issued, verified.payload) == (1, b"train")


def test_another_key_and_an_unexpected_kind_are_refused() -> None:
    with pytest.raises(SignatureError, match="not signed by the expected key"):
        verify(instruction(), SITE.public_key(), kinds=[pb.TRAIN])
    with pytest.raises(SignatureError, match="no place here"):
        verify(instruction(), COORDINATOR.public_key(), kinds=[pb.UPDATE])


def test_an_exchanged_payload_is_refused() -> None:
    envelope = pb.Envelope.FromString(instruction())
    envelope.payload = b"other"
    with pytest.raises(SignatureError, match="altered"):
        opened(envelope.SerializeToString())


def test_another_protocol_version_is_told_apart_from_a_forgery() -> None:
    with pytest.raises(VersionError, match="version 2, this side speaks 1"):
        opened(instruction(version=2))


def test_a_reply_fits_one_instruction_of_one_site() -> None:
    sent, other = instruction(1), instruction(2)
    key = SITE.public_key()
    digest = instruction_digest(sent)
    assert verify_reply(reply(sent), key, site="a", instruction=digest).payload == b"delta"
    with pytest.raises(SignatureError, match="another instruction"):
        verify_reply(reply(other), key, site="a", instruction=digest)
    with pytest.raises(SignatureError, match="in the name of b"):
        verify_reply(reply(sent, site="b"), key, site="a", instruction=digest)
    with pytest.raises(SignatureError, match="expected key"):
        verify_reply(reply(sent, key=COORDINATOR), key, site="a", instruction=digest)


def test_an_instruction_is_not_a_reply() -> None:
    with pytest.raises(SignatureError, match="no place here"):
        verify_reply(instruction(), COORDINATOR.public_key(), site="a", instruction=b"")


def test_an_older_instruction_is_refused_also_after_a_restart(tmp_path: Path) -> None:
    window = ReplayWindow(tmp_path)
    old, new = opened(instruction(1)), opened(instruction(2))
    assert window.admit(old) is None
    assert window.admit(new) is None
    for again in (window, ReplayWindow(tmp_path)):
        with pytest.raises(ReplayError, match="older than the newest"):
            again.admit(old)


def test_another_instruction_with_the_newest_number_is_refused(tmp_path: Path) -> None:
    window = ReplayWindow(tmp_path)
    window.admit(opened(instruction(1)))
    with pytest.raises(ReplayError):
        window.admit(opened(instruction(1, payload=b"other")))


def test_the_newest_instruction_again_gets_its_stored_reply(tmp_path: Path) -> None:
    window = ReplayWindow(tmp_path)
    newest = opened(instruction(1))
    window.admit(newest)
    # Stopped in mid-training: nothing was stored, so it is carried out again.
    assert ReplayWindow(tmp_path).admit(newest) is None
    window.keep(newest, b"signed reply")
    assert ReplayWindow(tmp_path).admit(newest) == b"signed reply"
    following = opened(instruction(2))
    assert window.admit(following) is None
    assert window.admit(following) is None


def test_runs_do_not_disturb_each_other(tmp_path: Path) -> None:
    window = ReplayWindow(tmp_path)
    window.admit(opened(instruction(9, run="one")))
    assert window.admit(opened(instruction(1, run="two/../.."))) is None
    assert {path.parent for path in tmp_path.rglob("*")} == {tmp_path}


def test_a_damaged_window_stops_the_site_instead_of_forgetting(tmp_path: Path) -> None:
    (tmp_path / "window.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        ReplayWindow(tmp_path)
