"""The result's table: one row a model, numbers of examples in the head."""

from __future__ import annotations

from server.table import render


def test_the_table_has_a_row_for_each_model_and_the_number_of_examples() -> None:
    codes = {"loss": 1.23456, "loss_error": 0.1, "examples": 306, "chapter": 0.5, "category": 0.125}
    rows = {
        "untuned base": {"codes": codes, "wordings": {**codes, "examples": 136}, "all": codes},
        "federated": {"codes": {**codes, "chapter": 0.77}},
    }
    table, sure = render(rows).split("\n\n")
    head, rule, first, second = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert head[:4] == ["model", "held-out codes (306): category", "chapter", "loss"]
    assert head[4:] == ["held-out wordings (136): category", "chapter", "loss"]
    assert set("".join(rule)) == {"-", ":"}
    assert first == ["untuned base", "0.125", "0.500", "1.235", "0.125", "0.500", "1.235"]
    assert second == ["federated", "0.125", "0.770", "1.235", "", "", ""]
    # The widest of a column: of 0.5, not of 0.77; 1.96 standard errors of the loss.
    assert sure == (
        "95 % intervals are within: codes: category ± 0.037, chapter ± 0.056, loss ± 0.196; "
        "wordings: category ± 0.056, chapter ± 0.083, loss ± 0.196."
    )


def test_without_options_the_table_has_the_loss_alone() -> None:
    table = render({"federated": {"notes": {"examples": 3, "loss": 2.0}}})
    assert table.splitlines()[0] == "| model     | held-out notes (3): loss |"
