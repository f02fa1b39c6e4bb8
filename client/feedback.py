"""Feedback: what a lossy encoding left out of a site's updates, kept for its next one.

Error feedback (arXiv 1809.07599): a round sends the encoding of its delta plus what earlier
rounds left out. Values come from the site's records, so they stay in the trainer's state.

Guarantees, each restated by a test in tests/client/test_feedback.py:

- What was sent and what is kept sum to the run's deltas, also across a restart.
- A round that is carried out again, by the same instruction or a new one, takes what the
  rounds before it left out, not what its own first attempt did: nothing is lost or sent
  twice. For that a round's file is written whole, before the reply is, and the file of the
  round before it stays.
- Nothing passes to another run or to an adapter of other names or shapes. Only the newest
  run's files are kept.

Edge cases: an update that is kept out of a round (late, refused) is lost, as it is in any
encoding. A run set back by more than one round starts from nothing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec, add, subtract
from fedqlora.codec import decode, decode_delta, encode, encode_delta
from fedqlora.config import CodecConfig
from fedqlora.errors import DataError, UpdateError
from fedqlora.files import write_durably


class Feedback:
    """The files of one site.

    Args:
        folder: holds a folder for the newest run, with a file for each of its last two rounds;
            made when the first is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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
        # A digest, since a run's name comes from outside.
        folder = self._folder / hashlib.sha256(run.encode()).hexdigest()
        files = {int(path.stem): path for path in folder.glob("*.safetensors")}
        before = max((number for number in files if number < round_), default=None)
        carried = None if before is None else _read(files[before])
        whole = delta
        if carried is not None and AdapterSpec.of(carried) == spec:
            whole = add(delta, carried)
        tensors = encode_delta(whole, codec)
        left_out = subtract(whole, decode_delta(tensors, spec))
        # Rounds that are done anew: were one of them skipped this time, it would still count.
        _remove(files, [number for number in files if number > round_])
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = encode(left_out, "float32").data
        write_durably(folder / f"{round_}.safetensors", data, mode=0o600)
        _remove(files, [number for number in files if before is not None and number < before])
        for other in self._folder.iterdir():
            if other != folder:
                shutil.rmtree(other)
        return tensors


def _read(path: Path) -> Adapter:
    try:
        return decode(pb.Tensors(encoding="float32", data=path.read_bytes()))
    except UpdateError:
        raise DataError(
            f"{path} is damaged; remove it, which loses what the last update left out"
        ) from None


def _remove(files: Mapping[int, Path], numbers: Iterable[int]) -> None:
    for number in numbers:
        files[number].unlink()
