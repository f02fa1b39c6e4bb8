"""Combinations: settings of a run that are each fine and are refused together.

Checked when a configuration is validated, so before anything starts, and at every site again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedqlora.config import RunConfig


@dataclass(frozen=True)
class Combination:
    """Settings that are each fine and are refused together."""

    is_asked_for: Callable[[RunConfig], bool]
    sentence: str
    """Why they do not go together, and what to choose instead."""


COMBINATIONS = (
    Combination(
        lambda run: run.lora.dora and run.aggregation.method in ("exact_svd", "fedsvd"),
        "lora.dora needs the factors as they were trained, for its update is not linear in B A, "
        'and this aggregation.method makes them anew; set aggregation.method = "fedavg"',
    ),
    Combination(
        lambda run: run.lora.dora and run.aggregation.method in ("ffa", "rolora"),
        "lora.dora trains a magnitude beside A and B, which this aggregation.method freezes or "
        'leaves out; set aggregation.method = "fedavg"',
    ),
    Combination(
        lambda run: run.lora.mixed_ranks and run.aggregation.method in ("fedavg", "rolora"),
        "lora.mixed_ranks gives factors of different shapes, and this aggregation.method takes "
        'the mean of factors; set aggregation.method = "exact_svd"',
    ),
    Combination(
        lambda run: run.lora.mixed_ranks and run.aggregation.method in ("ffa", "fedsvd"),
        "lora.mixed_ranks would leave columns of B that only some sites ever train under this "
        'aggregation.method; set aggregation.method = "exact_svd"',
    ),
    Combination(
        lambda run: (
            run.aggregation.residual_rank is not None and run.aggregation.method != "exact_svd"
        ),
        "aggregation.residual_rank is the rank of what exact_svd keeps, and this "
        'aggregation.method keeps nothing; leave it out or set aggregation.method = "exact_svd"',
    ),
    Combination(
        lambda run: (
            run.codec.keeps_error and run.aggregation.method in ("exact_svd", "fedsvd", "rolora")
        ),
        "codec.error_feedback adds what an update left out to the next one, which this "
        "aggregation.method makes of other factors; set codec.error_feedback = false or "
        'aggregation.method = "fedavg"',
    ),
    Combination(
        lambda run: run.lora.mixed_ranks and run.codec.update in ("int8", "nf4", "topk"),
        "this codec.update does not say at which rank a site trained, as lora.mixed_ranks needs; "
        'set codec.update = "bfloat16"',
    ),
    Combination(
        lambda run: run.privacy.unit != "none" and run.training.fewer_steps,
        "privacy.unit fixes the steps of the whole run before it starts, and training.fewer_steps "
        "would leave them to each site; set training.fewer_steps = false",
    ),
    Combination(
        lambda run: (
            run.aggregation.rule in ("median", "trimmed_mean")
            and run.aggregation.method == "exact_svd"
        ),
        "this aggregation.rule takes single values of A and B, and exact_svd averages products of "
        'both, in which such values mean nothing; set aggregation.method = "fedavg" or '
        'aggregation.rule = "geometric_median"',
    ),
    Combination(
        lambda run: (
            run.aggregation.rule in ("krum", "multi_krum")
            and run.federation.min_sites < 2 * run.aggregation.malicious_sites + 3
        ),
        "Krum against f malicious sites needs 2 f + 3 updates in every round; raise "
        "federation.min_sites, lower aggregation.malicious_sites or set aggregation.rule = "
        '"geometric_median"',
    ),
    Combination(
        lambda run: (
            run.aggregation.rule == "trimmed_mean"
            and run.federation.min_sites < 2 * run.aggregation.malicious_sites + 1
        ),
        "a trimmed mean leaves out f updates at each end and needs 2 f + 1 in every round; raise "
        "federation.min_sites or lower aggregation.malicious_sites",
    ),
    Combination(
        lambda run: (
            (
                run.server_optimizer.name in ("adam", "yogi")
                and run.aggregation.method == "exact_svd"
            )
            or (run.server_optimizer.name != "none" and run.aggregation.method == "fedsvd")
        ),
        "server_optimizer keeps moments of the values of A and B, which this aggregation.method "
        'makes anew each round; set aggregation.method = "fedavg" or "ffa", or '
        'server_optimizer.name = "momentum" with exact_svd, which keeps it of the products',
    ),
    Combination(
        lambda run: run.server_optimizer.name != "none" and run.aggregation.method == "rolora",
        "server_optimizer would move the half of the adapter that rolora holds still in a round; "
        'set aggregation.method = "fedavg" or "ffa"',
    ),
    Combination(
        lambda run: (
            run.training.control_variates and run.aggregation.method in ("exact_svd", "fedsvd")
        ),
        "training.control_variates are gradients of the values of A and B, which this "
        'aggregation.method makes anew each round; set aggregation.method = "fedavg" or "ffa"',
    ),
    Combination(
        lambda run: run.training.control_variates and run.aggregation.method == "rolora",
        "training.control_variates of a round are of the half that rolora does not train in the "
        'next; set aggregation.method = "fedavg" or "ffa"',
    ),
    Combination(
        lambda run: (
            run.training.control_variates and run.codec.update not in ("float32", "bfloat16")
        ),
        "training.control_variates travel as codec.update says, and what int8, nf4 or topk leave "
        'out of a gradient would add up; set codec.update = "bfloat16"',
    ),
    Combination(
        lambda run: run.training.control_variates and run.aggregation.rule != "mean",
        "training.control_variates are averaged over all sites, so one that lies would steer all "
        'whatever aggregation.rule says; set training.control_variates = false or rule = "mean"',
    ),
    Combination(
        lambda run: (
            run.privacy.unit != "none"
            and (run.training.control_variates or run.training.proximal > 0)
        ),
        "privacy.unit takes clipped, noised steps only, without training.proximal, and "
        "training.control_variates would release gradients without noise; leave both out",
    ),
    Combination(
        lambda run: run.aggregation.canary is not None and not run.evaluation.enabled,
        "aggregation.canary compares held-out losses, which nobody computes; set "
        "evaluation.enabled = true or leave aggregation.canary out",
    ),
    Combination(
        lambda run: run.aggregation.exclude_after is not None and run.aggregation.canary is None,
        "aggregation.exclude_after counts rounds that aggregation.canary set back; set "
        "aggregation.canary or leave it out",
    ),
    Combination(
        lambda run: run.aggregation.canary is not None and run.training.control_variates,
        "aggregation.canary sets the centre back, and training.control_variates stay at the sites "
        "where they are, so both would no longer fit; leave one of them out",
    ),
    Combination(
        lambda run: (
            run.federation.late_updates == "use" and run.aggregation.method not in ("fedavg", "ffa")
        ),
        "federation.late_updates = \"use\" adds a change of last round's A and B to this round's, "
        "which are other ones or other halves with this aggregation.method; set "
        'late_updates = "discard" or aggregation.method = "fedavg"',
    ),
    Combination(
        lambda run: (
            run.secure_aggregation.enabled
            and run.aggregation.method not in ("fedavg", "ffa", "fedsvd", "rolora")
        ),
        "secure_aggregation gives the coordinator the sum of all updates only, and this "
        'aggregation.method needs each by itself; set aggregation.method = "ffa" or "fedavg"',
    ),
    Combination(
        lambda run: run.sums_only and run.aggregation.rule != "mean",
        "secure_aggregation and homomorphic_encryption give the coordinator the sum of all updates "
        'only, and this aggregation.rule compares single ones; set aggregation.rule = "mean"',
    ),
    Combination(
        lambda run: run.sums_only and run.aggregation.canary is not None,
        "secure_aggregation and homomorphic_encryption show no site's own update, so "
        "aggregation.canary could blame nobody; leave one of them out",
    ),
    Combination(
        lambda run: run.sums_only and run.training.control_variates,
        "secure_aggregation and homomorphic_encryption hide updates, and training.control_variates "
        "are gradients that would travel beside them in the clear; set "
        "training.control_variates = false",
    ),
    Combination(
        lambda run: run.sums_only and run.federation.late_updates == "use",
        "secure_aggregation and homomorphic_encryption open a round's sum once, and a late update "
        'is in no sum; set federation.late_updates = "discard"',
    ),
    Combination(
        lambda run: run.sums_only and run.codec.update == "topk",
        "secure_aggregation and homomorphic_encryption add all sites' values position by position, "
        'and topk sends other positions from each; set codec.update = "bfloat16"',
    ),
    Combination(
        lambda run: run.sums_only and run.codec.update in ("int8", "nf4"),
        "secure_aggregation and homomorphic_encryption need one scale for all sites, and this "
        'codec.update has another for each block of each site; set codec.update = "bfloat16"',
    ),
    Combination(
        lambda run: run.sums_only and run.lora.mixed_ranks,
        "secure_aggregation and homomorphic_encryption add updates of one shape, and "
        "lora.mixed_ranks gives sites different ones; set lora.mixed_ranks = false",
    ),
    Combination(
        lambda run: run.sums_only and run.federation.min_sites < 3,
        "secure_aggregation or homomorphic_encryption of fewer than three sites tells each of two "
        "the other's update; set federation.min_sites to at least 3",
    ),
    Combination(
        lambda run: (
            run.sums_only and max(run.federation.min_sites, run.federation.expected_sites or 0) > 50
        ),
        "secure_aggregation and homomorphic_encryption sum vectors that leave room, and have keys, "
        "for 50 sites, so they are built for up to 50; lower federation.expected_sites and "
        "federation.min_sites",
    ),
    Combination(
        lambda run: run.sums_only and 50 * run.most_weight >= 2**31,
        "secure_aggregation and homomorphic_encryption sum weights in 31 bits, and this many "
        "steps, examples and tokens of fifty sites do not fit; set aggregation.weighting = "
        '"examples" or lower training.steps',
    ),
    Combination(
        lambda run: run.homomorphic_encryption.enabled and run.secure_aggregation.enabled,
        "homomorphic_encryption and secure_aggregation both hide updates from the coordinator, "
        "each in its own way; enable one of them",
    ),
    Combination(
        lambda run: run.homomorphic_encryption.enabled and run.aggregation.method != "ffa",
        "homomorphic_encryption makes an update 8 times as large and adds only, so it is for B "
        'with a fixed A; set aggregation.method = "ffa"',
    ),
    Combination(
        lambda run: (
            run.homomorphic_encryption.enabled
            and (run.federation.sample_fraction < 1 or run.federation.sample_sites is not None)
        ),
        "homomorphic_encryption needs its key_site in every round, and a sample may lack it; leave "
        "federation.sample_fraction and federation.sample_sites out",
    ),
    Combination(
        lambda run: (
            not run.continual.earlier
            and (
                run.continual.replay_fraction > 0
                or run.continual.penalty > 0
                or run.continual.orthogonal
                or run.continual.max_forgetting is not None
            )
        ),
        "continual.replay_fraction, penalty, orthogonal and max_forgetting are about earlier "
        "tasks, and this run continues none; start it by `make continue FROM=runs/...`, or leave "
        "them out",
    ),
    Combination(
        lambda run: run.task in run.continual.earlier,
        "continual.task (without it, name) names a task that was learned before, so its scores "
        "could not be told apart; set continual.task to another name",
    ),
    Combination(
        lambda run: run.continual.orthogonal and run.aggregation.method not in ("ffa", "fedavg"),
        "continual.orthogonal keeps the rows of A apart from earlier ones, and this "
        'aggregation.method makes or trains A anew; set aggregation.method = "ffa", which is '
        'exact, or "fedavg"',
    ),
    Combination(
        lambda run: (
            run.continual.orthogonal
            and run.aggregation.method == "fedavg"
            and (
                run.aggregation.rule in ("median", "trimmed_mean")
                or run.server_optimizer.name in ("adam", "yogi")
            )
        ),
        "continual.orthogonal holds for sums of A, and this aggregation.rule or "
        "server_optimizer.name changes single values of it; set aggregation.method = "
        '"ffa" or aggregation.rule = "mean"',
    ),
    Combination(
        lambda run: run.continual.orthogonal and run.continual.penalty > 0,
        "continual.orthogonal freezes what continual.penalty would hold in place, so the penalty "
        "would only shrink the new task; leave one of them out",
    ),
    Combination(
        lambda run: (
            run.privacy.unit != "none" and (run.continual.penalty > 0 or run.continual.orthogonal)
        ),
        "privacy.unit takes clipped, noised steps only, without continual.penalty or "
        "continual.orthogonal; set continual.replay_fraction instead, which the ledger is charged "
        "for",
    ),
    Combination(
        lambda run: (
            run.lora.dora
            and (
                run.continual.penalty > 0
                or run.continual.orthogonal
                or run.continual.frozen_rank > 0
            )
        ),
        "lora.dora is not linear in B A, so that no product holds or freezes an earlier task; set "
        "lora.dora = false or keep it by continual.replay_fraction",
    ),
    Combination(
        lambda run: (
            (run.continual.max_forgetting is not None or run.continual.max_general_loss is not None)
            and not run.evaluation.enabled
        ),
        "continual.max_forgetting and max_general_loss compare held-out scores, which nobody "
        "computes; set evaluation.enabled = true or leave them out",
    ),
    Combination(
        lambda run: run.continual.max_general_loss is not None and not run.evaluation.probe,
        "continual.max_general_loss needs the plain questions; set evaluation.probe = true or "
        "leave it out",
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.aggregation.method == "exact_svd",
        "site_privacy clips and noises A and B, of which exact_svd then takes products, in which "
        'one site would count without bound; set aggregation.method = "fedavg" or "ffa"',
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.aggregation.rule != "mean",
        "site_privacy bounds what one site adds to a sum, and this aggregation.rule takes none; "
        'set aggregation.rule = "mean"',
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.sums_only,
        "site_privacy clips each update at the coordinator, which under secure_aggregation or "
        "homomorphic_encryption sees none; leave one of them out",
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.aggregation.weighting != "uniform",
        "site_privacy hides a site only where all count the same, and counts would be released; "
        'set aggregation.weighting = "uniform"',
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.federation.expected_sites is None,
        "site_privacy divides by a number that does not depend on who takes part; set "
        "federation.expected_sites",
    ),
    Combination(
        lambda run: (
            run.site_privacy.enabled
            and (run.federation.expected_sites or 0) < 30
            and not run.site_privacy.few_sites
        ),
        "site_privacy with fewer than 30 sites leaves no signal: its noise is hundreds of times as "
        'long as the mean; set privacy.unit = "patient" instead, or site_privacy.few_sites = true '
        "if you want it all the same",
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.aggregation.canary is not None,
        "site_privacy promises that no round depends on one site, and aggregation.canary sets "
        "rounds back because of one; leave one of them out",
    ),
    Combination(
        lambda run: run.site_privacy.enabled and run.training.control_variates,
        "site_privacy noises updates, and training.control_variates would send all sites their "
        "mean gradient without noise; set training.control_variates = false",
    ),
    Combination(
        lambda run: (
            run.site_privacy.enabled
            and (run.federation.sample_fraction < 1 or run.federation.sample_sites is not None)
        ),
        "site_privacy counts every site in every round, and in a sample of a fixed size one site "
        "takes another's place; leave federation.sample_fraction and federation.sample_sites out",
    ),
    Combination(
        lambda run: (
            run.site_privacy.enabled
            and run.continual.orthogonal
            and run.aggregation.method != "ffa"
        ),
        "site_privacy adds noise to A, which is then no longer apart from earlier tasks as "
        'continual.orthogonal keeps it; set aggregation.method = "ffa"',
    ),
)
"""All combinations that a run's configuration refuses; a test has one case for each."""
