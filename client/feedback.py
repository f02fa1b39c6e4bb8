"""Feedback: what a lossy encoding left out of a site's updates, kept for its next one.

Error feedback (arXiv 1809.07599): a round sends the encoding of its delta plus what earlier
rounds left out.

Guarantees, each restated by a test in tests/client/test_feedback.py:

- What was sent and what is kept sum to the run's deltas, also across a restart.
- A round that is carried out again loses nothing and sends nothing twice (carried.py).

Edge cases: an update that is kept out of a round (late, refused) is lost, as it is in any
encoding.
"""

from __future__ import annotations

from pathlib import Path

from client.carried import Carried
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, add, subtract
from fedqlora.codec import decode_delta, encode_delta
from fedqlora.config import CodecConfig


class Feedback:
    """What is left out at one site.

    Args:
        folder: where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._carried = Carried(folder, "what the last update left out")

    def encode(self, delta: Adapter, codec: CodecConfig, *, run: str, round_: int) -> pb.Tensors:
        """Pack a delta with what earlier rounds left out, and keep what this one leaves out.

        Args:
            delta: the round's own change.
            codec: the encoding; where it keeps no error nothing is read or written.
            run: the run's name in the instruction.
            round_: the instruction's round.

        Raises:
            UpdateError: a value cannot be encoded; nothing was changed.
            DataError: a file is damaged.
            OSError: what is left out cannot be written; the round has to be done again.
        """
        if not codec.keeps_error:
            return encode_delta(delta, codec)
        spec = AdapterSpec.of(delta)
        carried = self._carried.before(run, round_, spec)
        whole = delta if carried is None else add(delta, carried)
        tensors = encode_delta(whole, codec)
        self._carried.keep(run, round_, subtract(whole, decode_delta(tensors, spec)))
        return tensors
