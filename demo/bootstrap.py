"""Bootstrap of a development cluster: what is missing is made, and each party gets its own.

    <deal>/certs                              every party's keys, for this command alone
    <deal>/superlink  coordinator  evaluator  root  sites/<site>/supernode  sites/<site>/trainer
    <deal>/models  held-out  sites/<site>/data  sites/<site>/policy  sites/<site>/state

Each folder is a volume that one service mounts. What exists is never replaced: a rerun adds what
new sites need, also to the pinned peers of a policy that is as it was dealt, and otherwise prints
`nothing to do`. A hospital would do none of this: it makes its own keys, has its own records, and
pins whom it has called.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from certs.files import CURRENT, CertificateError
from certs.fingerprint import name_signing
from certs.parties import list_sites
from demo.keys import make_keys
from demo.model import NAME, make_model
from demo.names import site_names
from demo.policy import render_policy
from demo.shares import list_shares
from fedqlora.config import load_run
from fedqlora.engine.base import base_digest
from fedqlora.errors import ConfigError, DataError, FedqloraError
from fedqlora.files import write_durably
from fedqlora.keys import load_signing_key

HOSTS = ("superlink", "control")
"""Names of the SuperLink in the cluster's networks."""

_CENTRE = ("certs", "superlink", "coordinator", "evaluator", "root", "models", "held-out")
_SITE = ("supernode", "trainer", "data", "policy", "state")
_RECORD = "deal.json"  # written last into held-out: how the records were dealt


def bootstrap(deal: Path, sites: Sequence[str], experiment: Path) -> list[str]:
    """Make what a development cluster of these sites lacks; returns a line for each thing made.

    Args:
        deal: holds a folder for each volume.
        sites: a, b, c, ... without a gap.
        experiment: the TOML file whose seed deals the records.

    Raises:
        CertificateError: a volume holds other keys than `deal/certs`, or they have expired;
            nothing was written into any party's volume.
        FedqloraError: a volume is missing or cannot be written, the records that are there were
            dealt by another seed, or a site's ledger of privacy spent is lost.
    """
    sites = list(sites)
    if sites != site_names(len(sites)):
        raise ConfigError(f"--sites {','.join(sites)} are not the letters from a on; write a,b,c")
    _check_volumes(deal, sites)
    seed = _read_seed(deal, experiment)
    certs = deal / "certs"
    if not (certs / "authority").exists():
        for share in list_shares(deal, sites):
            if share.is_dealt():
                raise CertificateError(
                    f"{share.volume} holds keys but {certs} is empty; restore the volume that was "
                    "replaced, or remove all of them (`make down`) and start again"
                )
    else:
        for share in list_shares(deal, [name for name in sites if name in list_sites(certs)]):
            share.check()
    advice = "remove the development volumes (`make down`) and start again: all is made anew"
    lines = make_keys(certs, sites, HOSTS, advice)
    for share in list_shares(deal, sites):
        if share.deal():
            lines.append(f"{share.volume}: {', '.join(share.files)}")
    lines += _deal_data(deal, sites, seed)
    model = deal / "models" / NAME
    if make_model(model):
        lines.append(f"{model}: base model")
    lines += _deal_policies(deal, sites, model)
    return lines + _make_ledgers(deal, sites)


def _check_volumes(deal: Path, sites: Sequence[str]) -> None:
    """Refuse a folder that is not there: what is written to it would be lost."""
    folders = [deal / name for name in _CENTRE]
    folders += [deal / "sites" / site / name for site in sites for name in _SITE]
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{folder} is not a folder that user {os.getuid()} can write; mount its volume "
                "there and give it to that user"
            )


def _read_seed(deal: Path, experiment: Path) -> int:
    """The seed of the records: that of the experiment, and of what was dealt before."""
    seed = load_run(experiment).seed
    record = deal / "held-out" / _RECORD
    if record.exists() and (dealt := json.loads(record.read_text())["seed"]) != seed:
        # Another seed draws another held-out set: texts of it would be among the records.
        raise ConfigError(
            f"the records in {deal} were dealt with seed {dealt}, {experiment} has seed {seed}; "
            "set it back, or remove the development volumes (`make down`)"
        )
    return seed


def _deal_data(deal: Path, sites: Sequence[str], seed: int) -> list[str]:
    """Records for sites that have none, and the held-out set, which is the same for any number."""
    empty = [site for site in sites if not _holds_any(deal / "sites" / site / "data")]
    held_out = deal / "held-out"
    if not empty and (held_out / _RECORD).exists():
        return []
    # Imported here: seconds, which a rerun that has nothing to deal does not need.
    from demo.data import make_data

    lines = []
    try:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "data"
            rows = make_data(made, len(sites), seed)
            for site in empty:
                _copy(made / site, deal / "sites" / site / "data")
                lines.append(f"{deal / 'sites' / site / 'data'}: {len(rows[site])} records")
            if not (held_out / _RECORD).exists():
                _copy(made / "held-out", held_out)
                write_durably(held_out / _RECORD, json.dumps({"seed": seed}).encode(), 0o600)
                lines.append(f"{held_out}: held-out set")
    except OSError as error:
        raise DataError(
            f"the records cannot be written ({error.strerror}: {error.filename}); free space"
        ) from None
    kept = [site for site in sites if site not in empty]
    if kept and empty:
        lines.append(
            f"sites {', '.join(kept)} keep the records that they had; those of "
            f"{', '.join(empty)} come from a deal among {len(sites)}: unless the others do too, "
            "some texts are at two sites (`make down` first deals all anew)"
        )
    return lines


def _deal_policies(deal: Path, sites: Sequence[str], model: Path) -> list[str]:
    """A policy that approves the demo's model and pins all sites, where there is no other."""
    keys = deal / "certs" / "sites"
    peers = {name: _name_key(keys / name / CURRENT) for name in list_sites(deal / "certs")}
    lines = []
    for site in sites:
        path = deal / "sites" / site / "policy" / "policy.toml"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text and all(fingerprint in text for fingerprint in peers.values()):
            continue
        digest = base_digest(model)
        if not text:
            lines.append(f"{path}: approves {NAME}, pins {', '.join(peers)}")
        elif text in _dealt_before(digest, peers):
            lines.append(f"{path}: pins {', '.join(peers)}; start trainer-{site} again")
        else:
            continue
        write_durably(path, render_policy(digest, peers=peers).encode())
    return lines


def _dealt_before(digest: str, peers: Mapping[str, str]) -> set[str]:
    """Policies as they were dealt when there were fewer sites: nobody has edited these."""
    known = list(peers.items())
    return {render_policy(digest, peers=dict(known[:count])) for count in range(len(known))}


def _name_key(keys: Path) -> str:
    """The fingerprint of a site's signing key."""
    public = load_signing_key(keys / "signing.key").public_key()
    return name_signing(public.public_bytes_raw().hex())


def _make_ledgers(deal: Path, sites: Sequence[str]) -> list[str]:
    """A ledger of privacy spent, for sites that never had one."""
    states = {site: deal / "sites" / site / "state" for site in sites}
    if all((state / "ledger.jsonl").exists() for state in states.values()):
        return []
    # Imported here: a second, which a rerun that has nothing to make does not need.
    from client.ledger import make_ledger

    lines = []
    for site, state in states.items():
        key = load_signing_key(deal / "certs" / "sites" / site / CURRENT / "signing.key")
        if make_ledger(site, state, key):
            lines.append(f"{state}: ledger of privacy spent")
    return lines


def _holds_any(folder: Path) -> bool:
    """Whether a folder holds anything but what an interrupted call has left."""
    return any(path.suffix != ".new" and path.name != "lost+found" for path in folder.iterdir())


def _copy(source: Path, target: Path) -> None:
    """Copy files into a volume, each whole; nobody but its user reads them."""
    for path in sorted(source.iterdir()):
        write_durably(target / path.name, path.read_bytes(), 0o600)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and carry it out; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m demo.bootstrap", description=__doc__)
    parser.add_argument("--sites", required=True, help="names of the sites: a,b,c")
    parser.add_argument("--deal", type=Path, default=Path("/deal"), help="folder of the volumes")
    parser.add_argument(
        "--experiment",
        type=Path,
        default=Path(__file__).parents[1] / "experiments" / "icd10.toml",
        help="TOML file whose seed deals the records",
    )
    options = parser.parse_args(arguments)
    try:
        lines = bootstrap(options.deal, options.sites.split(","), options.experiment)
    except (FedqloraError, CertificateError) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    print("\n".join(lines or ["nothing to do"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
