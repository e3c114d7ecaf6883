"""A sweep in Weights & Biases, offline: the contents of its files, and the pages built by wandb-workspaces."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend, JournalStorage
from rich.console import Console

from explore import Experiment, ModelConfig, TextData, TrainConfig
from explore.cli import main
from explore.figures import family_styles
from explore.files import write_json
from explore.runs import RunFolder
from explore.study.mirroring import _notes, front_markdown, frontier_axes, runs_of, send_sweep, study_pages
from explore.table import load_runs
from explore.tracking import Pages
from explore.train import fit

BLOCK = 32_768
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def records(log: Path) -> list[Any]:
    """The records of an offline run. The file is LevelDB's log behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, part, found = log.read_bytes(), 7, b"", []
    while at < len(content):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def read_mirror(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The start record, the config and the last values of the newest offline run in a folder."""
    log = max((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    deadline = time.monotonic() + 60
    while not (found := records(log)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, "wandb's own process has not written the end of the run"
        time.sleep(0.05)
    run, config, values = None, dict[str, Any](), dict[str, Any]()
    for record in found:
        match record.WhichOneof("record_type"):
            case "run":
                run = run or record.run
                put(config, record.run.config.update)
            case "config":
                put(config, record.config.update)
            case "summary":
                put(values, record.summary.update)
            case "history":
                put(values, record.history.item)
    return run, config, values


def put(tree: dict[str, Any], items: Any) -> None:
    for item in items:
        *folders, last = item.nested_key or [item.key]
        place = tree
        for name in folders:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)


def make_run(runs: Path, pattern: str, **options: Any) -> RunFolder:
    corpus = runs / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    blocks = {"-": {"d_ff": 64}, "E": {"n_experts": 4, "top_k": 2, "d_expert": 16}}
    one = Experiment(
        name="tiny",
        model=ModelConfig(d_model=32, vocab_size=257, pattern=pattern, blocks=blocks),
        data=TextData(corpus=str(corpus), tokenizer="bytes", seq_len=32),
        train=TrainConfig(tokens=1024, batch_size=4, eval_tokens=128, val_every=4),
    )
    return fit(one, runs, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two trials, and a run that does not belong to it."""
    runs = tmp_path_factory.mktemp("experts")
    storage = JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    study = optuna.create_study(study_name="experts", storage=storage, directions=["minimize", "minimize"])
    study.set_metric_names(["val_bpb", "flops_run"])
    study.set_user_attr("question", "Do experts pay?\n\nAt equal FLOPs.")
    for pattern in ("-E", "E-E"):
        trial, folder = study.ask(), make_run(runs, pattern)
        trial.set_user_attr("key", folder.key)
        study.tell(trial, [folder.row()["val_bpb"], folder.row()["flops_run"]])
    make_run(runs, "-")
    return runs


@pytest.fixture
def study(runs: Path) -> optuna.Study:
    return optuna.load_study(
        study_name="experts", storage=JournalStorage(JournalFileBackend(str(runs / "study.journal")))
    )


@pytest.mark.slow
def test_a_trial_is_mirrored_in_the_group_of_its_study(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "-E", wandb="offline", group="experts")
    run, config, values = read_mirror(folder.path)
    assert (run.run_group, run.job_type, run.project, run.run_id) == ("experts", "trial", "explore", folder.key[:32])
    assert values["val_bpb"] == pytest.approx(folder.row()["val_bpb"])
    assert {"flops_run", "params_active", "tokens_per_s", "loss", "max_violation", "trainer/global_step"} <= set(values)
    assert (config["family"], config["pattern"], config["model"]["d_model"]) == ("MoE", "-E", 32)


def test_a_run_without_a_study_has_no_group(tmp_path: Path) -> None:
    run, *_ = read_mirror(make_run(tmp_path, "-E", wandb="offline").path)
    assert (run.run_group, run.job_type) == ("", "")


def test_a_sweep_sends_its_frontier_and_its_table_into_the_same_group(study: optuna.Study, runs: Path) -> None:
    send_sweep(study, runs, "offline", pytest.fail)
    run, _, values = read_mirror(runs)
    assert (run.run_group, run.job_type, run.notes) == ("experts", "sweep", study.user_attrs["question"])
    assert (values["frontier"]["_type"], values["runs"]["_type"]) == ("image-file", "table-file")
    (media,) = (runs / "wandb").glob("offline-run-*/files")
    assert (media / values["frontier"]["path"]).read_bytes() == (runs / "frontier.png").read_bytes()
    table = json.loads((media / values["runs"]["path"]).read_text())
    expected = runs_of(study, runs)
    assert table["columns"] == list(expected.columns)
    bits = table["columns"].index("val_bpb")
    assert [row[bits] for row in table["data"]] == pytest.approx(list(expected["val_bpb"]))
    assert values["n_runs"] == 2


def test_a_sweep_sent_again_replaces_itself(study: optuna.Study, runs: Path) -> None:
    send_sweep(study, runs, "offline", pytest.fail)
    first = read_mirror(runs)[0].run_id
    send_sweep(study, runs, "offline", pytest.fail)
    assert read_mirror(runs)[0].run_id == first


def test_a_sweep_that_cannot_be_sent_is_one_line(
    study: optuna.Study, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []

    def init(**_: Any) -> None:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr("wandb.init", init)
    send_sweep(study, runs, "online", messages.append)
    assert messages == ["no frontier for Weights & Biases: no network"]


def test_the_runs_of_a_study_are_those_of_its_trials_with_all_their_seeds(
    study: optuna.Study, runs: Path, tmp_path: Path
) -> None:
    assert list(runs_of(study, runs)["pattern"].sort_values()) == ["-E", "E-E"]
    other = make_run(tmp_path, "EE")
    assert runs_of(study, tmp_path).empty
    write_json(other.path / "trial.json", {"study": "experts", "trial": 7})
    assert list(runs_of(study, tmp_path)["pattern"]) == ["EE"]
    assert runs_of(study, tmp_path / "nothing").empty


def test_the_axes_are_the_studys_objectives(study: optuna.Study) -> None:
    assert frontier_axes(study) == ("val_bpb", ["flops_run", "params_active"])
    other = optuna.create_study(directions=["minimize", "maximize"])
    other.set_metric_names(["kv_bytes_per_token", "recall"])
    assert frontier_axes(other) == ("recall", ["kv_bytes_per_token", "flops_run", "params_active"])


def panels(spec: Any) -> Iterator[dict[str, Any]]:
    """Every panel anywhere in a specification."""
    if isinstance(spec, dict):
        if "viewType" in spec and "config" in spec:
            yield spec
        for value in spec.values():
            yield from panels(value)
    elif isinstance(spec, list):
        for value in spec:
            yield from panels(value)


def test_the_workspace_shows_the_frontier_of_the_group_and_colours_families(study: optuna.Study, runs: Path) -> None:
    workspace = study_pages(study, runs, "hybrids", "team").specs()["workspace"]
    section = workspace["spec"]["section"]
    names = [each["name"] for each in section["panelBankConfig"]["sections"]]
    assert names == ["Frontier", "Learning curves", "Throughput", "Balance of experts"]
    scatter = next(each["config"] for each in panels(workspace) if each["viewType"] == "Scatter Plot")
    assert (scatter["xAxis"], scatter["yAxis"], scatter["xAxisLogScale"]) == (
        "summary:flops_run",
        "summary:val_bpb",
        True,
    )
    (runset,) = section["runSets"]
    assert runset["grouping"] == []
    assert '"experts"' in json.dumps(runset["filters"])
    table = runs_of(study, runs)
    red, green, blue = family_styles(table["family"])["MoE"].color
    color = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    assert section["customRunColors"] == {key[:32]: color for key in table["key"]}


def test_the_report_states_the_question_the_front_and_its_limits(study: optuna.Study, runs: Path) -> None:
    report = study_pages(study, runs).specs()["report"]
    text = json.dumps(report, ensure_ascii=False)
    assert (report["displayName"], report["description"]) == ("experts", "Do experts pay?")
    blocks = report["spec"]["blocks"]
    written = [block["content"] for block in blocks if block["type"] == "markdown-block"]
    assert written[0] == "Do experts pay?\n\nAt equal FLOPs."
    assert written[1] == front_markdown(runs_of(study, runs), "flops_run", "val_bpb")
    assert "2 complete" in written[2]
    assert "One seed per point" in written[2]
    grids = [block["metadata"]["runSets"][0] for block in blocks if block["type"] == "panel-grid"]
    assert [grid["name"] for grid in grids] == ["trials", "sweep", "families"]
    assert [bool(grid["grouping"]) for grid in grids] == [False, False, True]
    assert "Media Browser" in text


NAME = "a|b\n# c <script>alert(1)</script> [x](javascript:y) `code`"
ESCAPED = r"a\|b # c &lt;script&gt;alert(1)&lt;/script&gt; \[x\](javascript:y) \`code\`"


def test_names_in_the_report_are_escaped(runs: Path) -> None:
    table = load_runs(runs).assign(family=NAME, run=NAME, pattern=NAME, corpus=NAME)
    header, _, *rows = front_markdown(table, "flops_run", "val_bpb").splitlines()
    assert rows
    for row in rows:
        assert row.startswith(f"| {ESCAPED} | {ESCAPED} | ")
        assert row.endswith(f" | {ESCAPED} |")
        assert len(re.findall(r"(?<!\\)\|", row)) == header.count("|")
    (first, *_) = _notes(table.assign(corpus="texts/" + NAME.replace("/", "")))
    assert first.endswith(f"; corpus: {ESCAPED.replace('/', '')}.")


def test_a_study_without_a_question_is_named_literally() -> None:
    pages = Pages(name='a [x](y) """', project="p")  # the package refuses names with other marks
    blocks = pages.specs()["report"]["spec"]["blocks"]
    assert all("[x]" not in block["content"] for block in blocks if block["type"] == "markdown-block")
    assert any(block["type"] == "paragraph" and block["children"][0]["text"] == pages.name for block in blocks)
    compile(pages.script(), "script.py", "exec")


def without_ids(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {name: without_ids(value) for name, value in spec.items() if name not in ("__id__", "id", "name")}
    return [without_ids(value) for value in spec] if isinstance(spec, list) else spec


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # of wandb_workspaces's import
@pytest.mark.parametrize("group", ["experts", 'it\'s "quoted"', None])
def test_the_script_builds_the_same_pages(group: str | None) -> None:
    pages = Pages(
        name="experts",
        project="p",
        group=group,
        question='Do """experts""" pay?\\',
        notes=["one"],
        colors={"a": "#fff"},
    )
    scope: dict[str, Any] = {"__name__": "script"}
    exec(compile(pages.script(), "script.py", "exec"), scope)
    built = {name: scope[f"build_{name}"](**scope["PAGE"]) for name in ("workspace", "report")}
    specs = {
        name: page._to_model().model_dump(mode="json", by_alias=True, exclude_none=True) for name, page in built.items()
    }
    assert without_ids(specs) == without_ids(pages.specs())
    assert json.dumps(group)[1:-1] in json.dumps(specs["workspace"]["spec"]["section"]["runSets"]) or group is None


def run_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str
) -> tuple[int, list[str], list[str]]:
    monkeypatch.setattr(sys, "argv", ["explore", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out.splitlines(), captured.err.splitlines()


def test_the_command_writes_code_and_sends_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pages, "save", None)
    code, out, _ = run_cli(capsys, monkeypatch, "wandb-dashboard", str(runs))
    assert (code, out) == (0, [f"wrote {runs}/wandb_dashboard.py"])
    assert "def build_workspace(" in (runs / "wandb_dashboard.py").read_text()
    spec = tmp_path / "dashboard.json"
    code, out, _ = run_cli(capsys, monkeypatch, "wandb-dashboard", str(runs), "--entity", "team", "--out", str(spec))
    written = json.loads(spec.read_text())
    assert (code, written["workspace"]["entity"], written["report"]["displayName"]) == (0, "team", "experts")


def test_the_command_takes_a_folder_of_runs_without_a_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, spec = tmp_path / "alone", tmp_path / "dashboard.json"
    alone.mkdir()
    make_run(alone, "-E")
    code, *_ = run_cli(capsys, monkeypatch, "wandb-dashboard", str(alone), "--out", str(spec))
    assert (code, json.loads(spec.read_text())["workspace"]["displayName"]) == (0, "alone")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--save"], "not logged in to Weights & Biases"),
        (["--out", "dashboard.yaml"], "--out must be a script (.py) or a specification (.json), got 'dashboard.yaml'"),
        (["--study", "other"], "STUDY: 'other' is not in "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    runs: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETRC", "/nonexistent")
    code, _, err = run_cli(capsys, monkeypatch, "wandb-dashboard", str(runs), *args)
    assert (code, len(err)) == (2, 1)
    assert message in err[0]


def test_without_wandb_workspaces_the_extra_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("wandb_workspaces", "wandb_workspaces.workspaces"):
        monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run_cli(capsys, monkeypatch, "wandb-dashboard", str(runs))
    assert (code, len(err)) == (2, 1)
    assert "pip install 'hybrid-frontier[wandb]'" in err[0]
