"""The result's table: one row a model, numbers of examples in the head."""

from __future__ import annotations

from demo.table import render


def test_the_table_has_a_row_for_each_model_and_the_number_of_examples() -> None:
    codes = {"examples": 306, "chapter": 0.5, "category": 0.125, "loss": 1.23456}
    rows = {
        "untuned base": {"codes": codes, "wordings": {**codes, "examples": 136}, "all": codes},
        "federated": {"codes": {**codes, "chapter": 0.77}},
    }
    head, rule, first, second = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in render(rows).splitlines()
    ]
    assert head[:4] == ["model", "unseen codes (306): chapter accuracy", "category exact", "loss"]
    assert head[4:] == ["unseen wordings (136): chapter accuracy", "category exact", "loss"]
    assert set("".join(rule)) == {"-", ":"}
    assert first == ["untuned base", "0.500", "0.125", "1.235", "0.500", "0.125", "1.235"]
    assert second == ["federated", "0.770", "0.125", "1.235", "", "", ""]
