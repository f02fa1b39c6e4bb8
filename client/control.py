"""Control: a site's own control variate under SCAFFOLD, its mean gradient of its last round.

Karimireddy et al., arXiv 1910.06378. It stays in the trainer; what leaves is its change, encoded
as updates are, and it moves by what was sent, so that the centre's mean stays the mean of the
sites'. A round that is carried out again starts from what the round before it kept (carried.py).

Edge cases: a site that has none yet, or lost it, starts from zero, as in the paper. A reply that is
kept out of its round (late, refused) has moved the site's and not the mean.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from client.carried import Carried
from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, add, check_update, subtract
from fedqlora.codec import decode, encode_delta
from fedqlora.config import CodecConfig


class Control:
    """The control variate of one site.

    Args:
        folder: where it is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._carried = Carried(folder, "the site's control variate")

    def correction(self, sent: pb.Tensors, spec: AdapterSpec, *, run: str, round_: int) -> Adapter:
        """What is added to each gradient of a round: all sites' variate minus the site's own.

        Args:
            sent: all sites'.
            spec: names and shapes of what trains.
            run: the run's name in the instruction.
            round_: the instruction's round.

        Raises:
            UpdateError: what was sent is not of this spec, or not finite.
            DataError: the site's own is damaged.
        """
        everyone = decode(sent)
        check_update(everyone, spec, math.inf)
        return subtract(everyone, self._own(run, round_, spec))

    def encode(self, gradient: Adapter, codec: CodecConfig, *, run: str, round_: int) -> pb.Tensors:
        """Pack the change to a round's mean gradient, and keep what it comes to.

        Args:
            gradient: uncorrected, mean over the round.
            codec: encoding, `float32` or `bfloat16`.
            run: the run's name in the instruction.
            round_: the instruction's round.

        Raises:
            DataError: the site's own is damaged.
            OSError: it cannot be written; the round has to be done again.
        """
        own = self._own(run, round_, AdapterSpec.of(gradient))
        tensors = encode_delta(subtract(gradient, own), codec)
        self._carried.keep(run, round_, add(own, decode(tensors)))
        return tensors

    def _own(self, run: str, round_: int, spec: AdapterSpec) -> Adapter:
        own = self._carried.before(run, round_, spec)
        if own is None:
            return {name: np.zeros(shape, dtype=np.float32) for name, shape in spec.shapes}
        return own
