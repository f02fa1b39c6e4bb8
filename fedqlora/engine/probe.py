"""Probe: plain questions that no task is about, to see what of a model's general ability is left.

The questions are our own. Each is answered by likelihood over the answers to all of them, among
which are three of its own kind. With 20 questions one of them is 0.05: it tells a model that has
forgotten its language from one that has not, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedqlora.adapter import Adapter
from fedqlora.engine.evaluate import evaluate
from fedqlora.engine.held_out import HeldOut
from fedqlora.engine.model import BaseModel
from fedqlora.engine.records import Record
from fedqlora.training_config import TrainingConfig

GENERAL = "general"
"""Name of its scores beside those of the held-out files."""
FIELD = "answer"


@dataclass(frozen=True)
class Question:
    """A question, its answer, and answers of the same kind that are wrong."""

    text: str
    answer: str
    others: tuple[str, ...]


QUESTIONS = (
    Question("The capital of France is", "Paris", ("London", "Rome", "Berlin")),
    Question("The capital of Japan is", "Tokyo", ("Beijing", "Seoul", "Bangkok")),
    Question("The opposite of hot is", "cold", ("tall", "loud", "heavy")),
    Question("The opposite of up is", "down", ("near", "round", "over")),
    Question("The color of grass is", "green", ("purple", "orange", "pink")),
    Question("The color of fresh snow is", "white", ("brown", "blue", "gray")),
    Question("The number that follows nine is", "ten", ("three", "fifty", "zero")),
    Question("Two plus two equals", "four", ("twelve", "seven", "eleven")),
    Question("The planet that we live on is called", "Earth", ("Mars", "Venus", "Saturn")),
    Question("The animal that barks is the", "dog", ("horse", "mouse", "snake")),
    Question("A baby cat is called a", "kitten", ("puppy", "calf", "lamb")),
    Question("The day after Monday is", "Tuesday", ("Friday", "Sunday", "Thursday")),
    Question("The first month of the year is", "January", ("August", "June", "December")),
    Question("Bees make", "honey", ("milk", "silk", "paper")),
    Question("A person who teaches in a school is a", "teacher", ("pilot", "farmer", "sailor")),
    Question("We see with our", "eyes", ("ears", "hands", "feet")),
    Question("Water freezes and becomes", "ice", ("fire", "sand", "steam")),
    Question("To cut paper you use", "scissors", ("blankets", "spoons", "pillows")),
    Question("The season after spring is", "summer", ("winter", "autumn", "night")),
    Question("The sun rises in the", "east", ("west", "north", "south")),
)


def score_probe(
    base: BaseModel,
    adapter: Adapter,
    config: TrainingConfig,
    residual: Adapter | None = None,
    questions: tuple[Question, ...] = QUESTIONS,
) -> dict[str, float]:
    """Score an adapter on the questions.

    Args:
        base: the model; its adapter is set to `adapter`.
        adapter: what is scored.
        config: `max_length` and `microbatch_tokens` are used.
        residual: what lies frozen beside the adapter; None for nothing.
        questions: what is asked.

    Returns:
        {"examples": questions, "loss": mean loss of an answer's token, "answer": share of right
        answers}.

    Raises:
        DataError: the base's tokenizer does not tell the answers apart.
    """
    records = [
        Record(
            messages=None,
            prompt=question.text,
            completion=f" {question.answer}",
            patient=f"question {number}",
            fields={FIELD: question.answer},
        )
        for number, question in enumerate(questions)
    ]
    answers = [answer for one in questions for answer in (one.answer, *one.others)]
    held_out = HeldOut({GENERAL: records}, {FIELD: tuple(dict.fromkeys(answers))})
    return evaluate(base, adapter, held_out, config, residual)[GENERAL]
