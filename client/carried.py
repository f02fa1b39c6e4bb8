"""Carried: what a site keeps of one round for its next, in files that a new attempt cannot spoil.

Values come from the site's records, so they stay in the trainer's state.

Guarantees:

- A round that is carried out again, by the same instruction or a new one, is given what the
  rounds before it kept, not what its own first attempt did. For that a round's file is written
  whole, before the reply is, and the file of the round before it stays.
- Nothing passes to another run or to an adapter of other names or shapes. Only the newest
  run's files are kept.

Edge cases: a run set back by more than one round starts from nothing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter, AdapterSpec
from fedqlora.codec import decode, encode
from fedqlora.errors import DataError, UpdateError
from fedqlora.files import write_durably


class Carried:
    """The files of one purpose.

    Args:
        folder: holds a folder for the newest run, with a file for each of its last two rounds;
            made when the first is written.
        loss: what removing a damaged file loses, for the message.
    """

    def __init__(self, folder: Path, loss: str) -> None:
        self._folder = folder
        self._loss = loss

    def before(self, run: str, round_: int, spec: AdapterSpec) -> Adapter | None:
        """What the newest round before this one kept; None if that was nothing of this spec.

        Args:
            run: the run's name in the instruction.
            round_: the instruction's round.
            spec: names and shapes wanted.

        Raises:
            DataError: a file is damaged.
        """
        files = self._files(run)
        newest = _newest_before(files, round_)
        if newest is None:
            return None
        try:
            kept = decode(pb.Tensors(encoding="float32", data=files[newest].read_bytes()))
        except UpdateError:
            raise DataError(
                f"{files[newest]} is damaged; remove it, which loses {self._loss}"
            ) from None
        return kept if AdapterSpec.of(kept) == spec else None

    def keep(self, run: str, round_: int, adapter: Adapter) -> None:
        """Keep arrays for the rounds after this one.

        Raises:
            OSError: they cannot be written; the round has to be done again.
        """
        files = self._files(run)
        before = _newest_before(files, round_)
        # Rounds that are done anew: were one of them skipped this time, it would still count.
        _remove(files, [number for number in files if number > round_])
        folder = self._run_folder(run)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = encode(adapter, "float32").data
        write_durably(folder / f"{round_}.safetensors", data, mode=0o600)
        _remove(files, [number for number in files if before is not None and number < before])
        for other in self._folder.iterdir():
            if other != folder:
                shutil.rmtree(other)

    def _run_folder(self, run: str) -> Path:
        # A digest, since a run's name comes from outside.
        return self._folder / hashlib.sha256(run.encode()).hexdigest()

    def _files(self, run: str) -> dict[int, Path]:
        return {int(path.stem): path for path in self._run_folder(run).glob("*.safetensors")}


def _newest_before(files: Mapping[int, Path], round_: int) -> int | None:
    return max((number for number in files if number < round_), default=None)


def _remove(files: Mapping[int, Path], numbers: Iterable[int]) -> None:
    for number in numbers:
        files[number].unlink()
