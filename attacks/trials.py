"""Trials: each attack on real rounds, without protection, with secure aggregation, with DP-SGD.

The aggregator is curious: it writes the run's configuration and chooses the adapter that it sends,
within what a default policy allows. It tells nobody and it attacks the first site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attacks import audit, span
from attacks.exposure import exposure
from attacks.membership import Separation, separate
from attacks.setting import OPEN, PRIVATE, PROTECTIONS, SUM, Setting
from attacks.sites import Rows, Sites
from attacks.texts import flatten, read_rows, text_gradients, text_losses
from fedqlora.adapter import Adapter, add
from fedqlora.config import RunConfig
from fedqlora.privacy.accountant import calibrate_noise


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What the span test gave back.

    Attributes:
        tokens: number of different tokens in the first site's texts.
        texts: number of its texts.
        vocabulary: number of tokens that were tried.
        shares: protection -> share of the tokens that were named.
        wrong: protection -> number of tokens that were named and are in no site's texts.
        distances: protection -> of the site's tokens from the span, sorted.
        usual: the share without protection where the run trains as the demo does.
    """

    tokens: int
    texts: int
    vocabulary: int
    shares: Mapping[str, float]
    wrong: Mapping[str, int]
    distances: Mapping[str, NDArray[np.float64]]
    usual: float


def try_span(setting: Setting, records: Mapping[str, Rows]) -> Recovered:
    """One round on all texts at once.

    Args:
        setting: its rank is a third of the number of tokens or more.
        records: eight texts or more of each site.
    """
    sites = Sites(setting.folder / "span", setting.models, setting.base, records)
    batch = len(next(iter(records.values())))
    config = setting.one_step(OPEN, batch)
    base, adapter = sites.base(config), sites.start(config)
    inputs = span.first_inputs(base)
    tokens = [
        # What follows the last token is not predicted, so nothing depends on it.
        {token for text in read_rows(base, rows, config.training)
         for token in (*text.prompt, *text.completion[:-1])}
        for rows in records.values()
    ]  # fmt: skip
    own, anybodys = sorted(tokens[0]), set().union(*tokens)

    def look(config: RunConfig) -> tuple[NDArray[np.float64], set[int]]:
        seen = sites.see(config, adapter)
        tried = [span.distances(span.first_rows(d), inputs) for d in (seen.alone, seen.mean)]
        best = min(tried, key=lambda found: float(found[own].sum()))
        return best, span.recover_tokens(best)

    looks = {name: look(setting.one_step(name, batch)) for name in PROTECTIONS}
    usual = setting.configure(OPEN, {"steps": 1, "batch_examples": batch}, "bfloat16")
    return Recovered(
        tokens=len(own),
        texts=batch,
        vocabulary=len(inputs),
        shares={name: len(found & tokens[0]) / len(own) for name, (_, found) in looks.items()},
        wrong={name: len(found - anybodys) for name, (_, found) in looks.items()},
        distances={name: np.sort(far[own]) for name, (far, _) in looks.items()},
        usual=len(look(usual)[1] & tokens[0]) / len(own),
    )


@dataclass(frozen=True, kw_only=True)
class Secret:
    """A text that only one patient's records hold.

    Attributes:
        row: as it stands in the records.
        candidates: other completions that it could have had.
    """

    row: Mapping[str, object]
    candidates: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What longer training left in the update.

    Attributes:
        members: number of texts of the first site, beside the secrets.
        others: number of texts that nobody trained on.
        exposures: protection -> bits of each secret.
        most: bits of a secret that is likelier than every candidate.
        separations: protection -> members against others.
    """

    members: int
    others: int
    exposures: Mapping[str, Sequence[float]]
    most: float
    separations: Mapping[str, Separation]


def try_memory(
    setting: Setting,
    records: Mapping[str, Rows],
    others: Rows,
    secrets: Sequence[Secret],
    *,
    training: Mapping[str, object],
    repeats: int,
) -> Remembered:
    """One round of many steps, as a run trains; afterwards exposure and membership.

    Args:
        setting: the model.
        records: of each site, without the secrets.
        others: texts of the first site that it does not train on.
        secrets: go into the first site's records.
        training: steps, batch and learning rate.
        repeats: how often each secret stands in its patient's records.
    """
    first, *rest = records
    planted = [secret.row for secret in secrets for _ in range(repeats)]
    given = {first: [*records[first], *planted], **{name: records[name] for name in rest}}
    sites = Sites(setting.folder / "memory", setting.models, setting.base, given)
    config = setting.configure(OPEN, training, "bfloat16")
    base, adapter = sites.base(config), sites.start(config)
    members = len(records[first])
    texts = read_rows(base, [*records[first], *others], config.training)
    possible = [
        read_rows(
            base,
            [secret.row, *({**secret.row, "completion": one} for one in secret.candidates)],
            config.training,
        )
        for secret in secrets
    ]
    before = text_losses(base, adapter, texts, config.training)
    exposures: dict[str, list[float]] = {}
    separations = {}
    for name in PROTECTIONS:
        seen = sites.see(setting.configure(name, training, "bfloat16"), adapter)
        after = add(adapter, seen.mean)
        fallen = before - text_losses(base, after, texts, config.training)
        separations[name] = separate(fallen[:members], fallen[members:])
        exposures[name] = []
        for candidates in possible:
            secret, *false = text_losses(base, after, candidates, config.training).tolist()
            exposures[name].append(exposure(secret, false))
    return Remembered(
        members=members,
        others=len(others),
        exposures=exposures,
        most=exposure(0.0, [1.0] * len(secrets[0].candidates)),
        separations=separations,
    )


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What one-run auditing shows.

    Attributes:
        canaries: how many there were.
        bounds: protection -> lower bound of epsilon.
        most: the bound of an update that gives all tosses away.
    """

    canaries: int
    bounds: Mapping[str, float]
    most: float


def try_audit(setting: Setting, canaries: Rows, others: Mapping[str, Rows]) -> Audited:
    """One step on all the canaries that a coin let in.

    The private step is the Gaussian mechanism itself, once, and how many canaries it had is not
    hidden: guesses do not depend on an update's size.

    Args:
        setting: the model.
        canaries: one patient each.
        others: records of the other sites, as many as there are canaries; half of them are used.
    """
    tosses = np.random.default_rng().random(len(canaries)) < 0.5
    count = int(tosses.sum())
    given = {name: rows[:count] for name, rows in others.items()}
    mine = [row for row, included in zip(canaries, tosses, strict=True) if included]
    sites = Sites(setting.folder / "audit", setting.models, setting.base, {"a": mine, **given})
    config = setting.one_step(OPEN, count)
    base, adapter = sites.base(config), sites.start(config)
    texts = read_rows(base, canaries, config.training)
    gradients = text_gradients(base, adapter, texts, config.training)
    lengths = np.linalg.norm(gradients, axis=1)
    # The other sites' gradients point anywhere.
    strange = float(lengths.mean() * np.sqrt(len(given) * count / gradients.shape[1]))
    noise = calibrate_noise(setting.epsilon, setting.delta, 1.0, 1)
    bounds = {}
    for name in PROTECTIONS:
        seen = sites.see(setting.one_step(name, count), adapter)
        added, spread = {
            OPEN: (gradients, 0.0),
            SUM: (gradients, strange),
            PRIVATE: (gradients / lengths[:, None], noise),
        }[name]
        # Of a masked round both what the site sent and what the sum says are tried.
        tried = [seen.mean] if seen.mean is seen.alone else [seen.alone, seen.mean]
        bounds[name] = max(
            audit_delta(delta, tosses, added, spread, setting.delta) for delta in tried
        )
    return Audited(
        canaries=len(canaries),
        bounds=bounds,
        most=audit.lower_bound(tosses, tosses.astype(np.float64), setting.delta),
    )


def audit_delta(
    update: Adapter,
    tosses: NDArray[np.bool_],
    gradients: NDArray[np.float64],
    noise: float,
    delta: float,
) -> float:
    """Lower bound of epsilon from the update of one plain gradient step.

    Args:
        update: what the aggregator has seen.
        tosses: (m,) which canaries were let in.
        gradients: (m, D) what each adds to the step, up to one factor.
        noise: standard deviation of the noise in one place, of the same size.
        delta: the promise's delta.
    """
    return audit.lower_bound(
        tosses, audit.score_canaries(-flatten(update), gradients, noise), delta
    )
