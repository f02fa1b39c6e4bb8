"""A simulated site's answer, by its trainer and what it keeps on disk, in any of Ray's workers."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from client.peers import load_peers
from client.policy import load_policy
from client.worker import SiteWorker
from demo.simulation import SimulatedSite
from fedqlora.audit import AuditLog
from fedqlora.engine.service import Identity, Service
from fedqlora.engine.warm import WarmModel
from fedqlora.envelope import claimed_header


def answer(site: SimulatedSite, models: Path, envelope: bytes) -> bytes:
    """One instruction in, one signed reply out, by the trainer of a site.

    Raises:
        RuntimeError: the site does not answer in this round.
    """
    if _is_away(site, envelope):
        raise RuntimeError("the site's trainer does not answer")
    identity = Identity.load(site.name, site.keys)
    audit = AuditLog(site.state / "audit.jsonl", identity.key)
    policy = load_policy(site.policy)
    trainer = SiteWorker(
        site=site.name,
        data=site.data,
        models=models,
        state=site.state,
        policy=policy,
        peers=load_peers(policy, site.keys, site.name),
        key=identity.key,
        audit=audit,
        warm=_warm_model(),
    )
    return Service(identity, site.state / "window", trainer, audit=audit).exchange(envelope)


@functools.cache
def _warm_model() -> WarmModel:
    """This worker's base model, which all sites that it plays share."""
    return WarmModel()


def _is_away(site: SimulatedSite, envelope: bytes) -> bool:
    """Whether a site misses a round; it never misses the beginning of a run."""
    header = claimed_header(envelope)
    draw = hashlib.sha256(f"away:{header.run}:{site.name}:{header.round}".encode()).digest()
    return header.round > 0 and int.from_bytes(draw[:8], "big") < site.unreliability * 2**64
