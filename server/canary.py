"""Canary: a round's adapter is promoted only if the held-out loss does not say otherwise.

The loss over all held-out files is compared with that of the last promoted adapter. A round that
is worse by more than `aggregation.canary` is set back: the next one starts where this one did. Who
made it worse is looked for by leaving out one site at a time, those with the longest updates first.
Everything that later rounds need of this is in the run's metrics, so a resumed run goes on alike.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter

from fedqlora.config import RunConfig
from fedqlora.errors import FederationError, UpdateError
from server.aggregation.aggregate import Aggregate
from server.checkpoint import Checkpoint
from server.evaluation import ALL, Evaluator, Scores, record_scores
from server.intake import Intake
from server.metrics import Metrics

log = logging.getLogger("server")


class Canary:
    """Judges the adapters of one run.

    Args:
        config: the run; `aggregation.canary` is set.
        bound: largest increase of the loss, as a share of it.
        evaluator: scores adapters.
        metrics: where scores and rounds that were set back are recorded.
    """

    def __init__(
        self, config: RunConfig, bound: float, evaluator: Evaluator, metrics: Metrics
    ) -> None:
        self._config = config
        self._bound = bound
        self._evaluator = evaluator
        self._metrics = metrics

    def excluded(self) -> dict[str, str]:
        """Sites that take no further part, and why."""
        often = self._config.aggregation.exclude_after
        if often is None:
            return {}
        named = Counter(
            line["site"] for line in self._metrics.read() if line["event"] == "rollback"
        )
        return {
            site: f"excluded: {count} rounds were set back because of it"
            for site, count in named.items()
            if site and count >= often
        }

    def judge(
        self, round_: int, before: Checkpoint, intake: Intake, result: Aggregate
    ) -> Aggregate:
        """The round's result, or what was before it where that is worse; both are recorded.

        Args:
            round_: the round.
            before: its starting point, which is the last promoted adapter.
            intake: the round's updates.
            result: what became of them.

        Raises:
            FederationError: the evaluator does not answer, or its first loss is no number.
        """
        promoted = self._promoted()
        started = time.monotonic()
        scores = self._score(round_, result)
        loss, usual = scores[ALL]["loss"], promoted[ALL]["loss"]
        if not math.isfinite(usual):
            raise FederationError(
                "the held-out loss at the start is not a number, so no round can be compared with "
                "it; correct the held-out set or leave aggregation.canary out"
            )
        limit = usual * (1 + self._bound)
        # Not a number is worse than anything.
        if loss <= limit:
            record_scores(self._metrics, round_, scores, time.monotonic() - started)
            return result
        trials = self._leave_one_out(round_, intake)
        culprit = _culprit(trials, loss, usual)
        self._metrics.append(
            "rollback",
            round=round_,
            loss=loss if math.isfinite(loss) else None,
            limit=limit,
            site=culprit,
            without=trials,
        )
        log.warning(
            "round %s is set back: held-out loss %.4g is over %.4g; %s",
            round_,
            loss,
            limit,
            f"without site {culprit} it is {trials[culprit]:.4g}"
            if culprit
            else "no site stands out",
        )
        record_scores(self._metrics, round_, promoted, time.monotonic() - started)
        return Aggregate(
            adapter=before.adapter,
            residual=before.residual,
            memory=before.memory,
            figures=result.figures,
            set_aside=result.set_aside,
        )

    def _promoted(self) -> Scores:
        """Scores of the adapter that the round started from: those of the newest round."""
        found = [line for line in self._metrics.read() if line["event"] == "evaluation"]
        scores: Scores = found[-1]["scores"]
        return scores

    def _score(self, round_: int, result: Aggregate) -> Scores:
        return self._evaluator.evaluate(self._config, round_, result.adapter, result.residual)

    def _leave_one_out(self, round_: int, intake: Intake) -> dict[str, float]:
        """Held-out loss without each of the sites that are tried; finite ones only."""
        trials: dict[str, float] = {}
        for site in intake.longest()[: self._config.aggregation.canary_trials]:
            try:
                loss = self._score(round_, intake.finish_without(site))[ALL]["loss"]
            except UpdateError:
                # Without it the rule has too few left.
                continue
            if math.isfinite(loss):
                trials[site] = loss
        return trials


def _culprit(trials: dict[str, float], loss: float, usual: float) -> str:
    """The site without which the loss is least, if half of the harm at least is then gone."""
    if not trials:
        return ""
    best = min(sorted(trials), key=lambda site: trials[site])
    harm = loss - usual if math.isfinite(loss) else math.inf
    return best if trials[best] - usual <= harm / 2 else ""
