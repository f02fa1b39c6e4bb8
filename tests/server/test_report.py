"""The report: its numbers are the run folder's, its texts are texts, and it says what it lacks."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from flwr.app import Error

from fedqlora import protocol_pb2 as pb
from fedqlora.config import RunConfig, validate
from fedqlora.errors import CheckpointError
from server.__main__ import main
from server.checkpoint import RunFolder
from server.comparison import compare_runs, read_runs, render_comparison
from server.history import read_history
from server.markup import Markup, element
from server.metrics import Metrics
from server.report import render_report, write_report
from server.rounds import federate
from tests.server.conftest import House, LearningSite

EVIL = '</svg><script>alert("a")</script><img src=x onerror=alert(1)>'


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, the cells of tables, all texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        return next(row for row in self.rows if tuple(row[: len(start)]) == start)


def make_run(
    runs: Path,
    sites: int = 2,
    rounds: int = 2,
    *,
    status: str = "finished",
    steps: int = 10,
    epsilon: float | None = None,
    seed: int = 1,
    loss: float = 4.0,
) -> RunFolder:
    """A run folder as the ServerApp leaves it: site i has a training loss of i/8 + round."""
    federation = {"rounds": rounds, "min_sites": 1}
    values = {
        "seed": seed,
        "model": {"base": "tiny"},
        "training": {"steps": steps},
        "federation": federation,
    }
    if epsilon is not None:
        values |= {
            "privacy": {"unit": "patient", "epsilon": epsilon},
            "training": {"steps": steps, "packing": False},
            "data": {"validation_fraction": 0},
            "aggregation": {"method": "fedavg", "weighting": "uniform"},
        }
    folder = RunFolder.create(runs, validate(RunConfig, values, "run.toml"))
    metrics = Metrics(folder.path / "metrics.jsonl")
    names = [chr(ord("a") + index) for index in range(sites)]
    for name in names:
        metrics.append("joined", site=name, software={"torch": "2.13.0"})
    score(metrics, 0, loss)
    for round_ in range(1, rounds + 1):
        for index, name in enumerate(names):
            train(metrics, round_, name, train_loss=round_ + index / 8)
        metrics.append("round", round=round_, sites=sites, seconds=7.5)
        score(metrics, round_, loss - round_)
    folder.set_status(status, round=rounds)
    return folder


def score(metrics: Metrics, round_: int, loss: float) -> None:
    held_out = {"codes": {"examples": 306, "loss": loss, "chapter": 1 / (1 + loss)}}
    metrics.append("evaluation", round=round_, seconds=2.5, scores=held_out)


def train(metrics: Metrics, round_: int, site: str, **figures: object) -> None:
    facts = {
        "outcome": "used",
        "bytes_down": 2_000_000,
        "bytes_up": 1_000_000,
        "examples": 160,
        "tokens": 1200,
        "update_norm": 0.5,
        "step_seconds": 5.0,
    }
    metrics.append("site", round=round_, site=site, **{**facts, **figures})


def page_of(folder: RunFolder) -> Page:
    return Page(write_report(folder).read_text())


def test_the_numbers_of_the_page_are_those_of_the_run_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    page = page_of(folder)
    assert page.row("untuned base") == ["untuned base", "0.200 ± 0.045", "4.000"]
    assert page.row("federated, round 2") == ["federated, round 2", "0.333 ± 0.053", "2.000"]
    used = page.row("a", "2 of 2")
    assert used[2:] == ["320", "2400", "0.5", "4.0 MB", "2.0 MB", "10.0 s"]
    for line in Metrics(folder.path / "metrics.jsonl").read():
        if line["event"] == "site":
            assert f"site {line['site']}, {line['round']}: {line['train_loss']:.4g}" in page.texts
        if line["event"] == "evaluation":
            assert f"codes, {line['round']}: {line['scores']['codes']['loss']:.4g}" in page.texts
    assert "round 1, to the sites: 4" in page.texts
    assert "round 2, moving, validating, folding in: 2.5" in page.texts
    assert page.row("training.steps") == ["training.steps", "10"]
    assert page.row("torch") == ["torch", "2.13.0", "2.13.0"]


def test_baselines_and_skew_appear_where_the_folder_has_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert not any("records of" in row for row in page_of(folder).rows)
    folder.write_json("baselines.json", {"all data pooled": {"codes": {"loss": 0.25}}})
    folder.write_json("skew.json", {"a": {"Eye": 3, "Ear": 1}, "b": {"Ear": 5}})
    page = page_of(folder)
    assert page.row("all data pooled") == ["all data pooled", "", "0.250"]
    assert page.row("all") == ["all", "4", "5"]
    assert page.row("Ear") == ["Ear", "1", "5"]


def test_what_a_hostile_site_says_stays_text(tmp_path: Path) -> None:
    lie = "it is broken & sorry"  # well-formed: it is shown as it was said
    folder = make_run(tmp_path)
    metrics = Metrics(folder.path / "metrics.jsonl")
    metrics.append("site", round=2, site="b", outcome="refused", reason=lie)
    honest = page_of(folder)
    assert honest.row("2", "b")[3] == lie
    for site, reason in (("b", EVIL), (EVIL, "late")):
        metrics.append("site", round=2, site=site, outcome="refused", reason=reason)
    metrics.append("joined", site=EVIL, software={EVIL: EVIL})
    metrics.append("unusable", site="node 1", reason=EVIL)
    folder.set_status("failed", error=EVIL)
    page = page_of(folder)
    assert EVIL in page.row("2", "b")[3]
    assert set(page.tags) == set(honest.tags)
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)


def test_without_escaping_the_same_words_would_be_a_script() -> None:
    words = "<script>alert(1)</script>"
    assert "script" in Page(element("p", Markup(words))).tags
    assert Page(element("p", words)).tags == ["p"]
    assert Page(element("p", title='"><script>')).attributes == [("title", '"><script>')]


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert not {"script", "link", "img", "iframe", "object", "use"} & set(page.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "@import" not in "".join(page.texts)
    assert "url(" not in "".join(page.texts)


def test_figures_that_no_chart_can_hold_are_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    metrics = Metrics(folder.path / "metrics.jsonl")
    for value in (float("nan"), float("inf"), 1e300, "3", None, True):
        train(metrics, 2, "b", train_loss=value, step_seconds=-4.0, anything=[1])
        page = page_of(folder)
        assert "site b, 1: 1.125" in page.texts
        assert not any(text.startswith("site b, 2") and "2.125" in text for text in page.texts)


def test_a_running_page_loads_itself_anew_and_a_finished_one_does_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path, status="running")
    with folder.claim(0):
        page = page_of(folder)
    assert ("http-equiv", "refresh") in page.attributes
    assert "running" in page.texts
    cut_off = page_of(folder)  # nobody works on it any more
    assert ("http-equiv", "refresh") not in cut_off.attributes
    assert "cut off" in cut_off.texts
    folder.set_status("finished")
    assert ("http-equiv", "refresh") not in page_of(folder).attributes


def test_a_missed_round_breaks_the_line_and_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path, sites=2, rounds=1)
    metrics = Metrics(folder.path / "metrics.jsonl")
    train(metrics, 2, "a", train_loss=1.0)
    metrics.append("site", round=2, site="b", outcome="late", reason="no reply within 9 s")
    train(metrics, 3, "a", train_loss=1.0)
    page = page_of(folder)
    assert page.row("2", "b") == ["2", "b", "late", "no reply within 9 s"]
    assert page.row("3", "b") == ["3", "b", "not asked", "it was not connected"]


@pytest.mark.parametrize("sites", [1, 26])
def test_one_site_and_twenty_six_sites_have_their_row_and_their_line(
    tmp_path: Path, sites: int
) -> None:
    page = page_of(make_run(tmp_path, sites=sites))
    assert len([row for row in page.rows if row[1:2] == ["2 of 2"]]) == sites
    # With more sites than colours, the lines are quiet and their median has the legend.
    assert ("median of the sites, 1: 2.562" in page.texts) == (sites == 26)


def test_a_new_run_says_that_there_is_nothing_yet(tmp_path: Path) -> None:
    values = {"model": {"base": "tiny"}}
    folder = RunFolder.create(tmp_path, validate(RunConfig, values, "run.toml"))
    page = page_of(folder)
    assert "No round has been asked for yet: there is nothing to show." in page.texts
    assert "svg" not in page.tags


def damage(folder: RunFolder, what: str) -> None:
    if what == "foreign":
        (folder.path / "config.json").unlink()
    if what == "other release":
        config = json.loads((folder.path / "config.json").read_text())
        folder.write_json("config.json", {**config, "colour": "red"})
        folder.write_json("versions.json", {"fedqlora": "9.1"})
    if what == "damaged line":
        (folder.path / "metrics.jsonl").write_text("{\n")
    if what == "no event":
        (folder.path / "metrics.jsonl").write_text("[1]\n")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("foreign", "is not a run folder"),
        ("other release", "of another release: 9.1"),
        ("damaged line", "metrics.jsonl is damaged"),
        ("no event", "metrics.jsonl is damaged"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence_and_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, sentence: str
) -> None:
    folder = make_run(tmp_path)
    damage(folder, what)
    assert main(["report", str(folder.path)]) == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (folder.path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="choose another OUT"):
        write_report(make_run(tmp_path), tmp_path / "nowhere" / "report.html")


def test_a_run_writes_its_report_and_a_card_that_the_hub_library_reads(house: House) -> None:
    from huggingface_hub import ModelCard

    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=5.0))
    federate(house.folder, house.exchange(), 2, None)
    page = Page((house.folder.path / "report.html").read_text())
    assert [row[0] for row in page.rows if row[1:2] == ["2 of 2"]] == ["a", "b"]
    card = ModelCard((house.folder.path / "adapter" / "README.md").read_text())
    assert card.data.base_model == "tiny"
    assert card.data.library_name == "peft"
    assert card.data.license is None
    assert card.data.datasets is None
    assert "2 sites" in card.text
    assert "in 2 rounds" in card.text
    assert "updates used: 4 of 4" in card.text
    assert f"digest `{'d' * 64}`" in card.text


class BoastingSite(LearningSite):
    """Reports figures under names that the centre writes itself."""

    def perform(
        self, header: pb.Header, config: RunConfig, body: pb.Describe | pb.Train | pb.Evaluate
    ) -> pb.Description | pb.Update:
        reply = super().perform(header, config, body)
        if isinstance(reply, pb.Update):
            reply.metrics.update({"site": 7.0, "bytes_up": 9e9, "outcome": 1.0})
        return reply


def test_a_site_cannot_write_the_centres_part_of_the_record(house: House) -> None:
    # Recorded as it comes, one such name ends the whole run.
    with pytest.raises(TypeError, match="multiple values"):
        Metrics(house.tmp_path / "m").append("site", **{"site": "a"}, **{"event": 7.0})
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", BoastingSite(target=1.0))
    federate(house.folder, house.exchange(), 2, None)
    row = Page((house.folder.path / "report.html").read_text()).row("b")
    assert row[1] == "2 of 2"
    assert row[6] == "0.0 MB"


def test_a_node_that_could_not_take_part_is_in_the_report(house: House) -> None:
    house.admit("a", LearningSite(target=1.0))
    house.admit("b", LearningSite(target=5.0))
    house.grid.nodes[3] = lambda _sent: Error(code=0, reason=EVIL)
    federate(house.folder, house.exchange(), 2, None)
    page = Page((house.folder.path / "report.html").read_text())
    assert page.row("", "node 3")[2:] == ["could not take part", f"Flower error 0: {EVIL}"]


def test_a_comparison_has_a_row_a_run_and_names_what_differs(tmp_path: Path) -> None:
    few, many = make_run(tmp_path, rounds=1, steps=5), make_run(tmp_path, steps=20)
    out = tmp_path / "page.html"
    said = compare_runs([few.path, many.path], out)
    assert said.splitlines()[-1] == f"comparison: {out}"
    cells = [cell.strip() for cell in said.splitlines()[3].strip("|").split("|")]
    row = ["finished", "2", "2 of 2", "8.0 MB", "4.0 MB", "15.0 s", "0.333", "2.000"]
    assert cells == [many.name, *row]
    page = Page(out.read_text())
    # On the page a run has its experiment's name where that tells it apart: here it does not.
    assert page.row(many.name)[1:] == [*row[:6], "0.333 ± 0.053", "2.000"]
    assert page.row("folder") == ["folder", few.name, many.name]
    assert page.row("training.steps") == ["training.steps", "5", "20"]
    assert page.row("federation.rounds") == ["federation.rounds", "1", "2"]
    # Two sites and rounds of 3 MB a site; the last score of 20 steps.
    assert f"{many.name}, 12: 2" in page.texts
    assert f"{many.name}, 20: 2" in page.texts


def test_a_comparison_of_promises_plots_the_scores_against_them(tmp_path: Path) -> None:
    runs = [make_run(tmp_path), make_run(tmp_path, epsilon=8), make_run(tmp_path, epsilon=1)]
    page = Page(render_comparison(read_runs([run.path for run in runs])))
    hints = [f"{run.name}, {x}: 2" for run, x in zip(runs, ("0", "0.125", "1"), strict=True)]
    assert set(hints) <= set(page.texts)
    guards = ("none", "epsilon 8 a patient", "epsilon 1 a patient")
    assert all(page.row(run.name, guard) for run, guard in zip(runs, guards, strict=True))
    same = Page(
        render_comparison(read_runs([run.path for run in runs[:1]] + [make_run(tmp_path).path]))
    )
    assert not any("1 / epsilon" in text or text == "protection" for text in same.texts)


def test_a_comparison_takes_runs_without_scores_and_hostile_names(tmp_path: Path) -> None:
    empty = RunFolder.create(tmp_path, validate(RunConfig, {"model": {"base": EVIL}}, "run.toml"))
    page = Page(render_comparison(read_runs([empty.path, make_run(tmp_path).path])))
    assert not {"script", "img"} & set(page.tags)
    assert page.row(empty.name)[1] == "new"


@pytest.mark.parametrize("again", [0, 1], ids=["one run", "the same twice"])
def test_a_comparison_of_one_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], again: int
) -> None:
    path = str(make_run(tmp_path).path)
    assert main(["compare", path, *[path] * again]) == 2
    assert "two or more different run folders" in capsys.readouterr().err


def test_reading_a_finished_run_changes_nothing_in_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    before = {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    render_report(read_history(folder))
    assert before == {path: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
