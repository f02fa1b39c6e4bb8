"""The coordinating centre: SuperLink, rounds, aggregation, evaluator, run folder."""
