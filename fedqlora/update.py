"""Update: what of a reply its receipt and both audit logs mean by its content."""

from __future__ import annotations

from fedqlora import protocol_pb2 as pb


def read_content(update: pb.Update) -> bytes:
    """The bytes of an update's tensors, as they leave: encoded, masked or encrypted."""
    ciphertexts = b"".join(update.encrypted.ciphertexts)
    return ciphertexts or update.masked.values or update.delta.data
