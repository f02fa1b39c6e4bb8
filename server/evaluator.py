"""The evaluator: scores an adapter on the coordinator's held-out set.

The same engine and socket service as a site's trainer, without policy or ledger: it sees no
patient's record, only the public or consented examples that the coordinator gave it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from fedqlora import protocol_pb2 as pb
from fedqlora.codec import decode
from fedqlora.config import RunConfig
from fedqlora.engine.base import resolve_base
from fedqlora.engine.device import add_device_options, open_devices
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import load_held_out
from fedqlora.engine.probe import GENERAL, score_probe
from fedqlora.engine.service import Identity, Service, serve
from fedqlora.engine.warm import WarmModel
from fedqlora.envelope import Instruction
from fedqlora.errors import DataError, FedqloraError, SignatureError
from server.evaluation import NAME

log = logging.getLogger("server")


class Scorer:
    """Carries out EVALUATE.

    Args:
        held_out: folder with the held-out set.
        models: folder of base models.
        warm: where the base model stays loaded.
    """

    def __init__(self, held_out: Path, models: Path, warm: WarmModel) -> None:
        self._held_out = held_out
        self._models = models
        self._warm = warm

    def perform(
        self,
        header: pb.Header,
        config: RunConfig,
        body: Instruction,
    ) -> pb.Evaluation:
        """Score the adapter of one instruction; see engine/service.py.

        Raises:
            FedqloraError: model, held-out set or adapter cannot be used.
        """
        if not isinstance(body, pb.Evaluate):
            raise SignatureError("the evaluator only scores; send training to a site")
        held_out = load_held_out(self._held_out, config.evaluation.max_examples)
        folder = resolve_base(config.model.base, self._models)
        base = self._warm.get(folder, config.model, config.lora)
        residual = decode(body.residual) if body.HasField("residual") else {}
        adapter = decode(body.adapter)
        scores = evaluate(
            base, adapter, held_out, config.training, residual, config.evaluation.answer_tokens
        )
        if config.evaluation.probe:
            if GENERAL in scores:
                raise DataError(
                    f"the held-out set has a file {GENERAL}.jsonl, a name that evaluation.probe "
                    "takes; rename it"
                )
            scores[GENERAL] = score_probe(base, adapter, config.training, residual)
        log.info("scored round %s of run %s", header.round, header.run)
        subsets = {name: pb.Scores(values=values) for name, values in scores.items()}
        return pb.Evaluation(subsets=subsets)

    def refused(self, header: pb.Header, refusal: pb.Refusal) -> None:
        """Nothing to add: the service has logged it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the evaluator until it is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m server.evaluator", description=__doc__)
    parser.add_argument("--held-out", required=True, type=Path, help="folder of held-out examples")
    parser.add_argument("--models", required=True, type=Path, help="folder of base models")
    parser.add_argument(
        "--keys", required=True, type=Path, help="folder with signing.key and coordinator.pub"
    )
    parser.add_argument("--state", required=True, type=Path, help="keeps the replay window")
    parser.add_argument("--socket", required=True, type=Path, help="unix socket to serve on")
    add_device_options(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    try:
        identity = Identity.load(NAME, options.keys)
        scorer = Scorer(options.held_out, options.models, WarmModel(*open_devices(options)))
        # Everything here is the coordinator's own, so every error may be said in full.
        service = Service(identity, options.state / "window", scorer, (FedqloraError,))
        serve(service, options.socket)
    except FedqloraError as error:
        if options.debug:
            raise
        sys.stderr.write(f"evaluator: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
