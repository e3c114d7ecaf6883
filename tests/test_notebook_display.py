"""Representations of objects: one short line each, and HTML in notebooks."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from explore import Experiment, ModelConfig, TextData, TrainConfig, formatting, preset
from explore.compress import Plan as Cuts
from explore.files import write_json
from explore.formatting.html import Html, chip, curve, paint, progress, strip, table
from explore.plan import Cluster, Layout, Plan, Run
from explore.presets import PRESETS
from explore.runs import RunFolder
from explore.terminal import NotebookOutput

MODEL = ModelConfig(d_model=64, vocab_size=257, pattern="MEM*E", blocks={"E": {"n_experts": 8, "top_k": 2}})
EXPERIMENT = Experiment(name="<b>mine</b>", model=MODEL, data=TextData(), train=TrainConfig(tokens=200_000))
VOID = {"path", "polyline", "br", "meta"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed by another one, and collects the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def record(folder: Path, **result: Any) -> RunFolder:
    write_json(folder / "experiment.json", {"key": "a" * 64, "experiment": EXPERIMENT.model_dump(mode="json")})
    write_json(folder / "cost.json", {"family": MODEL.family, **MODEL.cost(256).to_dict()})
    rows = "".join(f"{i},{i * 4096},{6 / (i + 1) + 2},\n" for i in range(50))
    (folder / "metrics.csv").write_text("step,tokens,loss,val_bpb\n" + rows)
    if result:
        write_json(folder / "result.json", {"status": "finished", **result})
    return RunFolder(folder)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.of(preset("nemotron-3-nano"), Run(), Layout(ep=8), Cluster.named("H100x64"))


def test_reprs_are_one_short_line_that_names_the_counts(tmp_path: Path, plan: Plan) -> None:
    cuts = Cuts.keep_all(MODEL.build())
    run = record(tmp_path / "run-aaaaaaaa", val_bpb=2.25)
    texts = {
        "ModelConfig(MEM*E, d_model=64, ": MODEL,
        "LanguageModel(MEM*E, d_model=64, ": MODEL.build(),
        "Cost(seq_len=256, ": MODEL.cost(256),
        "Ledger(MEM*E, seq_len=256, ": MODEL.ledger(256),
        "Experiment('<b>mine</b>', MEM*E, 201k tokens of austen, seed 0)": EXPERIMENT,
        "Plan(": plan,
        "Plan(of ": cuts,
        f"RunFolder({run.path}, finished, val_bpb 2.2500)": run,
        "TrainConfig(tokens=200000)": EXPERIMENT.train,
    }
    for begins, each in texts.items():
        assert repr(each).startswith(begins)
        assert "\n" not in repr(each)
        assert len(repr(each)) < 160 + len(str(run.path))
    assert all(len(repr(preset(name))) < 140 for name in PRESETS)


def test_the_repr_of_a_config_shows_non_defaults_and_can_be_evaluated() -> None:
    train = TrainConfig(tokens=1000, lr=1e-3)
    assert repr(train) == str(train) == "TrainConfig(tokens=1000, lr=0.001)"
    assert eval(repr(train)) == train
    block = MODEL.blocks["M"]
    assert eval(repr(block), {type(block).__name__: type(block)}) == block


def test_html_is_well_formed_and_has_the_counts(tmp_path: Path, plan: Plan) -> None:
    cost = MODEL.cost(4096)
    shown = Balanced(MODEL._repr_html_()).text
    assert f"{formatting.count(cost.params_total)} parameters" in shown
    assert re.sub(r"\s", "", shown).count("MEM*E") == 1
    ledger = Balanced(MODEL.ledger(256)._repr_html_()).text
    for component in {row.entry.component for row in MODEL.ledger(256)}:
        assert component in ledger
    totals = Balanced(MODEL.cost(256)._repr_html_()).text
    assert "params_active" in totals
    assert formatting.count(MODEL.cost(256).params_active) in totals
    assert "rank 0" in Balanced(plan._repr_html_()).text
    assert "<b>mine</b>" in Balanced(EXPERIMENT._repr_html_()).text  # as text, not as a tag
    Balanced(preset("nemotron-3-super")._repr_html_())


def test_a_run_shows_its_curve_and_its_numbers(tmp_path: Path) -> None:
    html = record(tmp_path / "run-aaaaaaaa", val_bpb=2.25)._repr_html_()
    shown = Balanced(html).text
    assert "2.2500" in shown
    assert "Training loss" in shown
    assert html.count("<polyline") == 1
    for broken in ("", "{", '{"experiment": 3}', '{"experiment": {"model": {"pattern": "MX"}}}'):
        folder = tmp_path / "broken"
        folder.mkdir(exist_ok=True)
        (folder / "experiment.json").write_text(broken)
        assert "broken" in Balanced(RunFolder(folder)._repr_html_()).text


def test_a_curve_falls_from_left_to_right_and_omits_infinite_values() -> None:
    points = [(float(i), 9.0 - i) for i in range(10)]
    html = curve([*points, (10.0, float("nan"))], "steps", "loss", ("0", "9"))
    drawn = [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]*)"', html)[0].split()]
    assert len(drawn) == 10
    assert all(after[0] > before[0] and after[1] >= before[1] for before, after in pairwise(drawn))
    assert curve(points[:1], "steps", "loss", ("", "")) == ""


def test_untrusted_text_is_escaped() -> None:
    nasty = "<img src=x onerror=alert(1)>"
    pieces = table(("a",), [(nasty,)]), strip(nasty, {}), progress(0.5, nasty), table((nasty,), [("x",)])
    assert not any("<img" in piece for piece in pieces)
    assert "<span" in table(("a",), [(Html(chip("M", paint((1.0, 0.0, 0.0)))),)])


def test_text_is_readable_on_every_colour() -> None:
    assert paint((1.0, 1.0, 1.0)) == ("#ffffff", "#111")
    assert paint((0.0, 0.0, 0.0)) == ("#000000", "#fff")


def test_output_of_a_notebook_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    display = pytest.importorskip("IPython.display")
    shown: list[str] = []

    class Handle:
        def update(self, html: Any) -> None:
            shown[-1] = html.data

    def begin(html: Any, display_id: bool) -> Handle:
        shown.append(html.data)
        return Handle()

    monkeypatch.setattr(display, "display", begin)
    output = NotebookOutput()
    assert output.is_due()
    output.show("one")
    assert not output.is_due()
    output.show("two")
    assert shown == ["two"]


def test_a_progress_bar_has_the_length_of_its_share() -> None:
    assert "width:25.0%" in progress(0.25, "1 of 4")
    assert "width:100.0%" in progress(7)
    assert Balanced(progress(0.25, "1 of 4")).text.strip() == "1 of 4"
