"""Central evaluation: the evaluator's scores of an adapter on the held-out set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedqlora import protocol_pb2 as pb
from fedqlora.adapter import Adapter
from fedqlora.codec import encode
from fedqlora.config import RunConfig
from fedqlora.envelope import instruction_digest, verify_reply
from fedqlora.errors import FederationError
from fedqlora.protocol_pb2_grpc import TrainerStub
from server.metrics import Metrics

log = logging.getLogger("server")

NAME = "evaluator"
ALL = "all"
"""The row of scores that is about all held-out files together."""
Scores = dict[str, dict[str, float]]
Sign = Callable[[pb.Kind, str, int, bytes], bytes]

_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Evaluator:
    """The evaluator service, reached over its unix socket.

    Args:
        socket: path of the socket.
        key: the evaluator's public signing key.
        sign: signs an instruction of this run.
    """

    def __init__(self, socket: Path, key: Ed25519PublicKey, sign: Sign) -> None:
        self._socket = socket
        self._key = key
        self._sign = sign

    def evaluate(
        self, config: RunConfig, round_: int, adapter: Adapter, residual: Adapter
    ) -> Scores:
        """Score an adapter with what lies frozen beside it: held-out file -> metric -> value.

        Raises:
            FederationError: the evaluator does not answer or refuses.
        """
        body = pb.Evaluate(
            config=config.model_dump_json(),
            adapter=encode(adapter, "float32"),
            residual=encode(residual, "float32") if residual else None,
        )
        envelope = self._sign(pb.EVALUATE, NAME, round_, body.SerializeToString())
        with grpc.insecure_channel(f"unix:{self._socket}", options=_UNLIMITED) as channel:
            try:
                answer = TrainerStub(channel).Exchange(pb.Envelope.FromString(envelope))
            except grpc.RpcError:
                raise FederationError(
                    "the evaluator does not answer; start it, or set evaluation.enabled = false"
                ) from None
        reply = verify_reply(
            answer.SerializeToString(),
            self._key,
            site=NAME,
            instruction=instruction_digest(envelope),
        )
        if reply.header.kind == pb.REFUSAL:
            refusal = pb.Refusal.FromString(reply.payload)
            raise FederationError(f"the evaluator refused: {refusal.code}: {refusal.sentence}")
        evaluation = pb.Evaluation.FromString(reply.payload)
        return {name: dict(scores.values) for name, scores in evaluation.subsets.items()}


def record_scores(metrics: Metrics, round_: int, scores: Scores, seconds: float) -> None:
    """Write down what a round's adapter scored.

    Raises:
        CheckpointError: it cannot be written.
    """
    metrics.append("evaluation", round=round_, scores=scores, seconds=round(seconds, 3))
    for name, values in scores.items():
        figures = ", ".join(f"{metric} {value:.4g}" for metric, value in sorted(values.items()))
        log.info("round %s: held-out %s: %s", round_, name, figures)
