"""Replay: records of earlier tasks, or of a public set, that are trained on again beside the new.

A site puts them into the folder `earlier` of its records. Whether a patient is drawn depends on the
seed, the site and that patient alone, never on how many others there are: so one patient more or
less changes one patient's records, as the account of a private run (client/budget.py) assumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedqlora.engine.records import NAMELESS, Record, load_records
from fedqlora.errors import DataError

FOLDER = "earlier"
"""Name of the folder inside the folder of a site's records."""


def load_earlier(data: Path, site: str) -> list[Record]:
    """The records that may be replayed.

    Args:
        data: the folder of the site's records.
        site: the site's name, for the message.

    Raises:
        DataError: there are none, or a file cannot be used.
    """
    folder = data / FOLDER
    if not folder.is_dir():
        raise DataError(
            f"site {site} has no {folder} to replay; put records of earlier tasks or a public set "
            "there, or set continual.replay_fraction = 0"
        )
    # A row without a patient is known by its file and line, which a new record's file may share.
    return [
        replace(record, patient=f"{NAMELESS}earlier {record.patient.removeprefix(NAMELESS)}")
        if record.patient.startswith(NAMELESS)
        else record
        for record in load_records(folder, minimum=1, site=site)
    ]


def draw_replay(records: Sequence[Record], fraction: float, seed: int, site: str) -> list[Record]:
    """All records of a share of the patients, in the order given.

    Guarantees: the same patients whatever other patients there are; each with probability
    `fraction` over seeds.

    Args:
        records: of earlier tasks.
        fraction: of their patients, from 0 to 1.
        seed: the run's seed.
        site: the site's name.

    Raises:
        DataError: nobody is drawn.
    """

    def place(patient: str) -> float:
        digest = hashlib.sha256(f"replay:{seed}:{site}:{patient}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / 2.0**48

    drawn = [record for record in records if place(record.patient) < fraction]
    if not drawn:
        raise DataError(
            f"site {site}: continual.replay_fraction = {fraction:g} draws none of its earlier "
            "records; raise it, or put more of them into the folder"
        )
    return drawn
