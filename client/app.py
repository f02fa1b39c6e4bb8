"""The ClientApp: a byte pipe between Flower and the site's trainer.

This code is shipped by the coordinator at run time, so a site lets it see nothing: it moves
one opaque signed envelope from the Flower message to the trainer's socket and back.
"""

import os
import time

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedqlora import protocol_pb2 as pb
from fedqlora.protocol_pb2_grpc import TrainerStub

# A trainer that was killed is restarted by its supervisor and loads its model again; the
# same instruction is then carried out once more, so it is worth waiting for.
WAIT_SECONDS = float(os.environ.get("FEDQLORA_TRAINER_WAIT_SECONDS", "120"))
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:  # noqa: ARG001
    """Pass the instruction on and return what the trainer signed."""
    reply = exchange(os.environ["FEDQLORA_TRAINER_SOCKET"], unwrap(message))
    return reply_with(message, reply)


def unwrap(message: Message) -> bytes:
    """The envelope in a message."""
    return bytes(message.content.array_records["envelope"]["envelope"].numpy().tobytes())


def reply_with(message: Message, envelope: bytes) -> Message:
    """The reply message that carries an envelope."""
    array = Array(np.frombuffer(envelope, dtype=np.uint8))
    content = RecordDict({"envelope": ArrayRecord({"envelope": array})})
    return Message(content, reply_to=message)


def exchange(socket: str, envelope: bytes) -> bytes:
    """One instruction in, one reply out; tries again while the trainer is away."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with grpc.insecure_channel(f"unix:{socket}", options=UNLIMITED) as channel:
            try:
                reply = TrainerStub(channel).Exchange(pb.Envelope.FromString(envelope))
                return bytes(reply.SerializeToString())
            except grpc.RpcError as error:
                away = error.code() is grpc.StatusCode.UNAVAILABLE
                if not away or time.monotonic() > deadline:
                    # Flower sends an error's text to the server as it is: a fixed one only.
                    raise RuntimeError("the site's trainer does not answer") from None
        time.sleep(1)
