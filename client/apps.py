"""Which app bundles may run at a site.

Flower's SuperNode runs whatever app the SuperLink ships. Where the site's policy lists digests,
any other app gets Flower's own answer to a bundle that cannot be verified, and is not stored.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.supercore.fab import Fab

logger = logging.getLogger("client")


def allow_only(digests: Sequence[str]) -> None:
    """Make this process's SuperNode refuse every app but these.

    Flower asks a register of publishers instead, which is not under the site's control, so its
    two functions that fetch and judge a bundle are given the site's own judgement.

    Args:
        digests: SHA-256 of approved bundles in hexadecimal, as `python -m server digest` prints.
    """
    from flwr.supercore.fab import Fab  # imports gRPC, which has to be prepared before
    from flwr.supernode import start_client_internal as supernode

    pull = supernode._pull_and_store_message

    def judge(fab: Fab, _trusted: object) -> bool:
        digest = hashlib.sha256(fab.content).hexdigest()
        if digest in digests:
            return True
        logger.warning("The site's policy does not approve app %s (apps.digests).", digest)
        return False

    def fetch_any(get_fab: Callable[[str, int], Fab], digest: str, run: int) -> Fab:
        fab = get_fab(digest, run)
        # Flower judges only bundles that claim to have been looked at by its register.
        return Fab(fab.hash_str, fab.content, {"valid_license": "site policy"})

    def pull_judged(**named: Any) -> int | None:
        named["get_fab"] = functools.partial(fetch_any, named["get_fab"])
        named["trusted_entities"] = {"site": "policy"}
        return pull(**named)

    vars(supernode).update(_pull_and_store_message=pull_judged, _verify_fab=judge)
