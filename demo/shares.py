"""Shares: each party's own keys out of the folder of all parties, put into that party's volume.

A volume's folder is a mount point: it can be neither made nor renamed, so everything is written
inside it under a temporary name and renamed there. The keys that a party is known by are never
replaced; what `python -m certs` renews (TLS keys and certificates, what they are checked against,
the roster) follows as a new version behind `current`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from certs.files import (
    CURRENT,
    CertificateError,
    read_certificates,
    read_file,
    replace_file,
)
from certs.versions import list_versions, prune_versions, stage_version, switch_version
from fedqlora.files import sync_folder

_ROSTER = ("roster.json", "roster.sig")
_LASTING = ("signing.key", "supernode.key", "supernode.pub", "coordinator.pub")
_TRUSTED = ("ca.crt", "root.crt")  # a rollover adds to them before it takes away


@dataclass(frozen=True, kw_only=True)
class Share:
    """One party's files."""

    volume: Path
    """The party's own folder, a mount point."""
    files: Mapping[str, Path]
    """All that the party needs and nothing else: a file's name, and where it lies in the folder of
    all parties."""
    versioned: bool
    """Whether they go into `v1/`, `v2/`, ... behind `current`, or lie in the volume itself."""

    @property
    def _held(self) -> Path:
        """Where the party reads them."""
        return self.volume / CURRENT if self.versioned else self.volume

    def is_dealt(self) -> bool:
        """Whether the volume holds any of the files."""
        return any((self._held / name).exists() for name in self.files)

    def check(self) -> None:
        """Compare what the volume holds with the folder of all parties.

        Raises:
            CertificateError: it holds the key of another party, or trusts other authorities only.
        """
        for name, source in self.files.items():
            held = self._held / name
            if not held.exists():
                continue
            same = True
            if name in _LASTING:
                same = read_file(held) == read_file(source)
            elif name in _TRUSTED:
                same = not set(read_certificates(held)).isdisjoint(read_certificates(source))
            if not same:
                raise CertificateError(
                    f"{held} belongs to another set of keys than {source}; restore the "
                    "volume that was replaced, or remove all of them (`make down`) and start again"
                )

    def deal(self) -> bool:
        """Write what the volume lacks; returns whether that was anything.

        Raises:
            CertificateError: the volume cannot be written.
        """
        linked = not self.versioned or self._link_last()
        missing = [name for name in self.files if self._is_outdated(name)]
        if missing and self.versioned:
            # All of them: a reader finds one complete version.
            version = stage_version(
                self.volume, {name: read_file(source) for name, source in self.files.items()}
            )
            switch_version(self.volume, version)
            prune_versions(self.volume)
        elif missing:
            for name in missing:
                replace_file(self.volume / name, read_file(self.files[name]))
            sync_folder(self.volume)
        return bool(missing) or not linked

    def _link_last(self) -> bool:
        """Link a version that an interrupted call has left without; whether there was no need."""
        versions = list_versions(self.volume)
        if versions and not (self.volume / CURRENT).exists():
            switch_version(self.volume, versions[-1])
            return False
        return True

    def _is_outdated(self, name: str) -> bool:
        held = self._held / name
        return not held.exists() or read_file(held) != read_file(self.files[name])


def list_shares(deal: Path, sites: Sequence[str]) -> list[Share]:
    """The shares of the centre's parties and of these sites.

    Args:
        deal: holds `certs`, with all parties' keys, and the volumes.
        sites: names of the sites.
    """
    certs = deal / "certs"
    server = certs / "superlink" / CURRENT
    roster = {name: certs / "coordinator" / name for name in _ROSTER}
    shares = [
        _share(
            deal / "superlink",
            server,
            *("server.key", "server.crt", "ca.crt", "root.crt", "crl.pem"),
            *("coordinator.pub", *_ROSTER),
        ),
        _share(deal / "coordinator", certs / "coordinator", "signing.key", *_ROSTER),
        _share(deal / "evaluator", certs / "evaluator", "signing.key", "coordinator.pub"),
        _share(deal / "root", server, "root.crt"),
    ]
    for site in sites:
        keys, volumes = certs / "sites" / site / CURRENT, deal / "sites" / site
        connection = ("client.key", "client.crt", "ca.crt", "supernode.key", "supernode.pub")
        shares.append(_share(volumes / "supernode", keys, *connection))
        # The roster is where a trainer looks for the peers that its policy pins.
        own = ("signing.key", "coordinator.pub")
        shares.append(_share(volumes / "trainer", keys, *own, elsewhere=roster))
    return shares


def _share(
    volume: Path, source: Path, *files: str, elsewhere: Mapping[str, Path] = MappingProxyType({})
) -> Share:
    """Files of one folder, and some that lie elsewhere."""
    versioned = volume.name in ("superlink", "supernode", "trainer")
    named = {name: source / name for name in files}
    return Share(volume=volume, files={**named, **elsewhere}, versioned=versioned)
