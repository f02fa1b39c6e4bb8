"""Enrolment and its end: the SuperLink gets to know the key of every site, or forgets one."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence

from certs.roster import Roster
from fedqlora.errors import FederationError
from server.control import ControlClient
from server.state import Node, read_node_key

LEAVE_SECONDS = 90.0
"""How long a site may take to go offline."""

_POLL_SECONDS = 0.5


def enrol_all(control: ControlClient, roster: Roster) -> list[str]:
    """Registers the keys that are not registered yet; returns a line for each.

    Raises:
        ConfigError: a key in the roster cannot be used; none was registered.
        FederationError: the SuperLink refuses a key.
    """
    keys = {
        name: read_node_key(site.supernode.encode(), f"the roster's entry of site {name}")
        for name, site in sorted(roster.sites.items())
    }
    return [
        f"site {name}: SuperNode key registered"
        for name, key in keys.items()
        if control.enrol(key, name)
    ]


def evict_site(control: ControlClient, site: str) -> Iterator[str]:
    """Unregisters a site's SuperNode and waits until it is offline; yields what happened.

    The key is burned: the site comes back with new keys only.

    Raises:
        FederationError: the site is not registered, the SuperLink refuses, the site is still online
            after `LEAVE_SECONDS`, or another one went offline meanwhile.
    """
    before = _list_online(control.list_nodes())
    if not control.unregister(site):
        raise FederationError(
            f"No SuperNode of site {site} is registered: see `python -m server status`."
        )
    deadline = time.monotonic() + LEAVE_SECONDS
    while not (moments := _list_ends(nodes := control.list_nodes(), site)):
        if time.monotonic() > deadline:
            raise FederationError(
                f"Site {site} is unregistered but not offline after {LEAVE_SECONDS:.0f} s: restart "
                "the SuperLink."
            )
        time.sleep(_POLL_SECONDS)
    state = "offline" if site in before else "was not online, unregistered"
    yield f"site {site}: {state} since {max(moments):%Y-%m-%d %H:%M:%S} UTC, its key is burned"
    online = _list_online(nodes)
    if gone := sorted(before - online - {site}):
        raise FederationError(
            f"Meanwhile {', '.join(gone)} went offline too: see `python -m server status`."
        )
    yield f"still online: {', '.join(sorted(online)) or 'no other site'}"


def _list_online(nodes: Sequence[Node]) -> set[str]:
    """Names of the sites that are online."""
    return {node.name for node in nodes if node.status == "online"}


def _list_ends(nodes: Sequence[Node], site: str) -> list[datetime.datetime]:
    """When each of a site's nodes was unregistered; empty while one of them is not."""
    own = [node for node in nodes if node.name == site]
    if any(node.status != "unregistered" for node in own):
        return []
    return [datetime.datetime.fromisoformat(node.since).astimezone(datetime.UTC) for node in own]
