"""An option is applied or refused: no command drops one, and every value is read in one way."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import typer
from command_line import run
from small_sweeps import write_sweep
from typer.main import get_command

from explore.cli import app
from explore.cli.errors import cut_values
from explore.cli.rules import Apart, Needs, Only, Options, option_name
from explore.foreign import ECHO_CHARS, shorten

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
RECORDS = str(Path(__file__).parents[1] / "sweeps" / "records" / "latent_or_not.parquet")
LAYOUT = "--tp 1 --cp 1 --pp 1 --vpp 1 --ep 1 --micro-batch 1"
NO_PATTERN = "must come with a pattern, got 'nemotron-3-nano"


@pytest.fixture
def explore(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return partial(run, capsys, monkeypatch)


def refused(explore: Any, *args: str) -> str:
    """The line with which a command refuses its arguments."""
    code, out, err = explore(*args)
    assert (code, out) == (2, ""), err
    assert (err.count("\n"), err[:7]) == (1, "error: ")
    assert len(err) <= 400
    return str(err)


# Options that have no effect


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("compare nemotron-3-nano nemotron-3-super --d-model 512", f"--d-model: {NO_PATTERN}, nemotron-3-super'; use"),
        ("compare nemotron-3-nano nemotron-3-super --vocab-size 1000", f"--vocab-size: {NO_PATTERN}"),
        ("cost --patterns PRESETS --d-model 512", f"--d-model: {NO_PATTERN}"),
        ("cost --patterns TWICE", "line 2: every model must be named once, got 'M*' twice"),
        ("cost --list --published", "--published: must not be combined with --list, which takes only --json"),
        ("cost --list --csv", "--csv: must not be combined with --list"),
        ("cost --list --d-model 512 --set d_model=banana", "--d-model: must not be combined with --list"),
        ("cost --list --seq-len 4096", "--seq-len: must not be combined with --list"),  # the default, but given
        ("cost --published --seq-len 100 --csv", "--seq-len: must not be combined with --published"),
        ("cost M* --diff exact,megatron --csv", "--csv: must not be combined with --diff"),
        ("cost M* --diff exact,megatron --saved", "--saved: must not be combined with --diff"),
        ("cost M* --diff exact,megatron --convention palm", "--convention: must not be combined with --diff"),
        ("cost M* --saved --csv", "--csv: must not be combined with --saved"),
        ("cost M* --saved --by layer", "--by: must not be combined with --saved"),
        ("cost M* --csv --by component", "--csv: must not be combined with --by"),
        ("cost M* --csv --convention megatron", "--csv: must not be combined with --convention"),
        ("cost M* --json --by layer", "--json: must not be combined with --by"),
        ("cost --patterns PRESETS --convention megatron", "--convention: must not be combined with --patterns"),
        ("cost --patterns PRESETS --by layer", "--by: must not be combined with --patterns"),
        ("cost M --patterns PRESETS", "TARGET: must not be combined with --patterns"),
        ("data --train-bpe 300 --out x.json", "--train-bpe: must come with CORPUS"),
        ("data --tokenizer nosuch", "--tokenizer: must come with CORPUS"),
        ("data --shards 2 --json", "--shards: must come with CORPUS"),
        ("data --ngram 3", "--ngram: must come with CORPUS"),
        ("data TEXT --train-bpe 300 --out x.json --ngram 3", "--train-bpe: must not be combined with --ngram"),
        ("data TEXT --train-bpe 300 --out x.json --tokenizer bytes", "--train-bpe: must not be combined with --tok"),
        ("roofline nemotron-3-nano --published", "TARGET: must not be combined with --published, which takes only"),
        ("roofline --published --hardware nosuch", "--hardware: must not be combined with --published"),
        ("roofline --published --json --batch-sizes banana", "--batch-sizes: must not be combined with --published"),
        ("roofline E --activation-dtype float8", "--activation-dtype: must come with --expert-parallel"),
        ("plan nemotron-3-nano --published", "MODEL: must not be combined with --published, which takes only --json"),
        ("plan --published --cluster nosuch --tokens 1k", "--cluster: must not be combined with --published"),
        ("plan M- --world-size 5", "--world-size: must come with --megatron-args"),
        ("plan M- --free d_ff", "--free: must come with --largest model"),
        ("plan M- --free d_ff --largest batch", "--free: must come with --largest model, got --largest batch"),
        ("plan M- --json --csv", "--csv: must not be combined with --json"),
        ("plan M- --megatron --csv", "--megatron: must not be combined with --csv"),
        ("plan M- --megatron --tokens 25T", "--megatron: must not be combined with --tokens"),
        ("plan M- --largest batch --top 2", "--largest: must not be combined with --top"),
        ("plan M- --largest batch --micro-batch 2", "--micro-batch: must not be combined with --largest batch"),
        ("plan M- --largest context --seq-len 2k", "--seq-len: must not be combined with --largest context"),
        (f"plan M- {LAYOUT} --top 3", "--top: must come with a search, got one layout"),
        (f"plan M- {LAYOUT} --objective gpus", "--objective: must come with a search, got one layout"),
        ("plan M- M-", "MODEL must be different models, got 'M- M-'"),
        ("plan M- --megatron-args a.json --world-size 8", "MODEL: must not be combined with --megatron-args"),
        ("plan --megatron-args a.json --world-size 8 --tp 2", "--tp: must not be combined with --megatron-args"),
        ("plan --megatron-args a.json --world-size 8 --seq-len 2k", "--seq-len: must not be combined with --megatron"),
        ("plan --megatron-args a.json --world-size 8 --d-model 64", "--d-model: must not be combined with --megatron"),
        ("plan --megatron-args a.json --world-size 8 --cluster H100x64", "--cluster must have the GPUs of"),
        ("plot RECORDS --html p.html --by-seed", "--by-seed: must not be combined with --html without --out"),
        ("plot RECORDS --curves --by-seed", "--by-seed: must not be combined with --curves"),
        ("plot RECORDS --curves --html p.html", "--html: must not be combined with --curves"),
        ("plot RECORDS --curves --count-parent", "--count-parent: must not be combined with --curves"),
        ("table RECORDS --sort recall", "--sort must be a column with values, got 'recall'"),
        ("table RECORDS --json --columns seed", "--json: must not be combined with --columns"),
        ("table RECORDS --json --by-seed", "--json: must not be combined with --by-seed"),
        ("runs aaaa --remove --json", "--json: must not be combined with --remove"),
        ("runs aaaa --yes", "--yes: must come with --remove"),
        ("sweep a.py --cluster-option a=1", "--cluster-option: must come with --cluster"),
        ("sweep SWEEP --ungated --workers 1", "--ungated: must come with a sweep file that has a gate, got"),
        ("bench --what ops --family moe", "--family: must come with --what train, profile, decode, curves, trials"),
        ("bench --steps 9", "--steps: must come with --what curves, got --what train"),
        ("bench --megabytes 9", "--megabytes: must come with --what text, got --what train"),
        ("bench --what text --seconds 9", "--seconds: must come with --what train, profile, neighbours, sharing, prec"),
        ("bench --what compress --shape tiny", "--shape: must come with --what train, profile, decode, ops, curves, t"),
        ("bench --what train --new-tokens 9", "--new-tokens: must come with --what decode, got --what train"),
        ("watch nowhere --once --every 3", "--once: must not be combined with --every"),
        ("watch nowhere --study a --storage sqlite:///a.db", "--study: must not be combined with --storage"),
        ("wandb-dashboard nowhere --study a --storage sqlite:///a.db", "--study: must not be combined with --storage"),
        ("wandb-dashboard EMPTY --study a", "--study: must come with a folder that has a study.journal, got"),
        ("parity --prompt x", "--prompt: must come with RUN"),
        ("parity a.json --cases 3", "--cases: must not be combined with RUN"),
        ("generate a.json --prompt x --compile --speculate", "--compile: must not be combined with --speculate"),
        ("cut a.json --keep d_ff=8 --tolerance 0.1", "--tolerance: must come with --target"),
        ("cut a.json --keep d_ff=8 --context 1k", "--context: must come with --target"),
        ("cut a.json --free d_ff", "--free: must come with --target"),
        ("cut a.json --keep d_ff=8 --seed 3", "--seed: must come with --by random or --one-by-one"),
        ("cut a.json --keep d_ff=8 --effect kl", "--effect: must come with --drop-layers or --free depth"),
        ("cut a.json --keep d_ff=8 --show --json", "--show: must not be combined with --json"),
        ("cut a.json --show --val-tokens 5", "--val-tokens: must not be combined with --show without sizes"),
        ("cut llama-3.1-70b --published --like qwen3-8b", "--like: must not be combined with --published"),
        ("cut llama-3.1-70b --like qwen3-8b --keep d_ff=8", "--like: must not be combined with --keep"),
        ("cut llama-3.1-70b --like qwen3-8b --out a.json", "--out: must not be combined with a preset, which takes"),
        ("puzzle a.json --max params_total=50% --differ 2", "--differ: must come with --solutions"),
        ("puzzle a.json --max params_total=50% --round-tokens 5", "--round-tokens: must come with --rounds"),
        ("quantize a.json --precision nvfp4 --seed 3 --kv fp8", "--seed: must come with stochastic rounding"),
        ("eval a.json --whole --limit 3", "--limit: must come with --pairs"),
    ],
)  # fmt: skip
def test_an_option_without_an_effect_is_refused_and_nothing_is_written(
    args: str, message: str, explore: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets.txt").write_text("nemotron-3-nano\nnemotron-3-super\n")
    (tmp_path / "twice.txt").write_text("M*\nM*\n")
    (tmp_path / "empty").mkdir()
    names = {"PRESETS": "presets.txt", "TWICE": "twice.txt", "TEXT": "corpus.txt", "EMPTY": "empty", "RECORDS": RECORDS}
    names["SWEEP"] = str(write_sweep(tmp_path).relative_to(tmp_path))  # and its corpus
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(explore, *(names.get(arg, arg) for arg in args.split()))
    assert sorted(tmp_path.rglob("*")) == before


def test_every_rule_names_options_that_exist() -> None:
    for command in COMMANDS.values():
        names = {option_name(parameter) for parameter in command.params}
        for rule in command.rules:
            for part in " ".join(filter(None, rule)).split():
                assert part.partition("=")[0] in names, (command.name, part)


def kind_of(command: Any, parameter: Any) -> Any:
    """The type of one value of a parameter."""
    annotation = inspect.signature(command.callback).parameters[parameter.name].annotation
    kind = get_args(annotation)[0]
    while get_origin(kind) in (Union, UnionType, list):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    return kind


def example(command: Any, condition: str) -> list[str]:
    """Arguments that meet a condition, with a value that the command's parser accepts."""
    name, _, value = condition.partition("=")
    (parameter,) = (each for each in command.params if option_name(each) == name)
    kind = kind_of(command, parameter)
    if kind is bool:
        return [name]
    simple = {int: "300" if name == "--train-bpe" else "3", float: "3", Path: "a.json"}
    value = value or (get_args(kind)[0] if get_origin(kind) is Literal else simple.get(kind, "a.json"))
    return [name, value] if name.startswith("--") else [value]


def broken() -> Iterator[Any]:
    """A name, arguments and the start of a message for every way to break a rule."""
    for command in COMMANDS.values():
        required = {option_name(each): example(command, option_name(each)) for each in command.params if each.required}
        for rule in command.rules:
            if isinstance(rule, Only):
                taken = {*rule.takes.split(), rule.mode}
                ways = [[name, rule.mode] for name in map(option_name, command.params) if name not in taken]
            elif isinstance(rule, Needs):
                ways = [[name] for name in rule.options.split()]
            else:
                assert isinstance(rule, Apart)
                ways = [[rule.option, other] for other in rule.others.split()]
            for conditions in ways:
                given = dict(required)
                for condition in conditions:
                    given[condition.partition("=")[0]] = example(command, condition)
                if isinstance(rule, Needs) and rule.others.startswith("--what"):
                    used = [other.partition("=")[2] for other in rule.others.split()]
                    (what,) = (each for each in command.params if each.name == "what")
                    unused = next(each for each in get_args(kind_of(command, what)) if each not in used)
                    given["--what"] = ["--what", unused]
                yield pytest.param(command.name, [*chain(*given.values())], id=f"{command.name} {' '.join(conditions)}")


@pytest.mark.parametrize(("name", "args"), list(broken()))
def test_every_rule_is_kept(name: str, args: list[str], explore: Any) -> None:
    line = refused(explore, name, *args)
    assert "must not be combined with" in line or "must come with" in line


def test_a_rule_counts_what_is_given_not_what_it_equals(explore: Any) -> None:
    assert explore("cost", "M*", "--csv", "--seq-len", "4096")[0] == 0
    assert "--by" in refused(explore, "cost", "M*", "--csv", "--by", "letter")
    context = typer.Context(COMMANDS["bench"])
    context.params = {"what": "decode"}
    assert Options(context).meet("--what=decode")
    assert not Options(context).meet("--what")


def test_sizes_still_apply_to_the_patterns_among_several_models(explore: Any) -> None:
    code, out, _ = explore("compare", "M*", "nemotron-3-nano", "--d-model", "512", "--json")
    sizes = {row["model"]: row["d_model"] for row in json.loads(out)["models"]}
    assert (code, sizes) == (0, {"M*": 512, "nemotron-3-nano": 2688})


def test_a_tokenizer_is_trained_with_json_output(explore: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    written = tmp_path / "bpe.json"
    code, out, _ = explore("data", tmp_path / "text.txt", "--train-bpe", "0.3k", "--out", written, "--json")
    assert (code, json.loads(out)["vocab_size"], json.loads(out)["tokenizer"]) == (0, 300, str(written))
    assert len(json.loads(written.read_text())["model"]["vocab"]) == 300


def test_a_column_that_is_asked_for_is_shown_without_values_too(explore: Any) -> None:
    code, out, _ = explore("table", RECORDS, "--columns", "pattern,recall")
    assert (code, "recall" in out) == (0, True)


# Dry runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sampler nosuch", "sampler"),
        ("--sampler grid", "grid"),
        ("--storage nosuch://x", "--storage: nosuch://x cannot be opened: "),
        ("--storage grpc://here", "a gRPC proxy is named as grpc://host"),
        ("--records here.csv", "records: the suffix must be .parquet, got 'here.csv'"),
        ("--records broken.parquet", "broken.parquet: is not a table of records"),
        ("--cluster-option a=1", "--cluster-option: must come with --cluster"),
        ("--cluster local --cluster-option a", "--cluster-option must be of the form NAME=VALUE"),
        ("--cluster local --cluster-option nosuch_option=1", "--cluster: local: "),
        ("--set nosuch=1", "nosuch"),
    ],
)
def test_a_dry_run_of_a_sweep_refuses_what_the_sweep_would_refuse(
    options: str, message: str, explore: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_text("no table")
    file = write_sweep(tmp_path, replaced={"grid = {": "unused = {"} if "grid" in options else None)
    before = sorted(tmp_path.rglob("*"))
    line = refused(explore, "sweep", str(file), "--workers", "1", "--dry-run", *options.split())
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_a_sweep_connects_to_no_server_and_writes_nothing(
    explore: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise ValueError("all options are valid")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("explore.study.preview", stop)
    file = write_sweep(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for options in (
        "--storage sqlite:///new.db --sampler tpe --new-study",
        "--storage postgresql+psycopg://user@nowhere.invalid/db",
        "--storage grpc://nowhere.invalid:13000",
        "--records new.parquet --cluster local --cluster-option timeout_min=5",
    ):
        line = refused(explore, "sweep", str(file), "--workers", "1", "--dry-run", *options.split())
        assert line == "error: all options are valid\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_of_training_refuses_what_training_would_refuse(explore: Any, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    content = {
        "name": "one",
        "model": {"d_model": 32, "vocab_size": 257, "pattern": "-"},
        "data": {"kind": "text", "corpus": str(tmp_path / "corpus.txt"), "tokenizer": "bytes", "seq_len": 32},
        "train": {"tokens": 256, "batch_size": 1},
    }
    file = tmp_path / "one.json"
    file.write_text(json.dumps(content))
    for option, message in (("--devices=3", "multiple of 3"), ("--split-batch", "split_batch must be False")):
        assert message in refused(explore, "train", str(file), "--dry-run", option)


# Numbers


def of_type(kind: Any) -> list[Any]:
    return [
        pytest.param(command, parameter, id=f"{name} {option_name(parameter)}")
        for name, command in COMMANDS.items()
        for parameter in command.params
        if kind_of(command, parameter) is kind
    ]


@pytest.mark.parametrize(("command", "parameter"), of_type(int))
def test_every_whole_number_may_have_a_suffix(command: Any, parameter: Any) -> None:
    context = typer.Context(command)

    def read(text: str) -> Any:
        try:
            return parameter.process_value(context, [text] if parameter.multiple else text)
        except typer.BadParameter as error:
            return error.message.partition(", got ")[0]

    for short, plain in (("4k", "4000"), ("0.004M", "4000"), ("0.003k", "3"), ("2e3", "2000"), ("4000.0", "4000")):
        assert read(short) == read(plain)
    for text in ("", "k", "1.5", "12q", "nan", "1e400", "0x10"):
        assert read(text) == "must be a whole number, with or without k, M, B or T"
    assert "must be at most" in str(read("9" * 400))
    assert "must be at least" in str(read("-5"))


def test_numbers_in_texts_may_have_a_suffix(explore: Any) -> None:
    short = explore(
        "solve", "M-", "--free", "d_ff=1k:4k", "--target", "params_total=1M", "--d-model", "1.024k", "--json"
    )
    plain = explore(
        "solve", "M-", "--free", "d_ff=1000:4000", "--target", "params_total=1M", "--d-model", "1024", "--json"
    )
    assert short == plain
    assert json.loads(plain[1])["model"]["d_model"] == 1024
    plan = ("plan", "M-", "--d-model", "1024", "--cluster", "H100x8", "--json")
    shown = [
        explore(*plan, "--global-batch", n, "--tokens", tokens)
        for n, tokens in (("1.024k", "1.5T"), ("1024", "1500000000000"))
    ]  # fmt: skip
    assert shown[0] == shown[1]
    assert shown[0][0] == 0


# Paths


@pytest.mark.parametrize(("command", "parameter"), of_type(Path))
def test_no_path_may_be_empty(command: Any, parameter: Any) -> None:
    several = parameter.multiple if parameter.param_type_name == "option" else parameter.nargs != 1
    with pytest.raises((typer.BadParameter, FileNotFoundError), match=r"must be .*, got ''"):
        parameter.process_value(typer.Context(command), [""] if several else "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("table", ""), "RUNS must be a folder"),
        (("plot", RECORDS, ""), "RUNS must be a folder"),
        (("plot", RECORDS, "--out", ""), "--out must be a path, got ''"),
        (("runs", "--runs", ""), "--runs must be a path, got ''"),
        (("data", ""), "CORPUS must not be empty"),
        (("train", ""), "run must be a folder"),
        (("score", ""), "run must be a folder"),
        (("cost", ""), "TARGET must not be empty"),
        (("cost", "M", "--precision", ""), "--precision must not be empty"),
        (("cost", "--patterns", ""), "--patterns must not be empty"),
        (("compare", "M", ""), "TARGET must not be empty"),
        (("watch", ""), "STUDY must not be empty"),
        (("proxy", ""), "STORAGE must not be empty"),
        (("wandb-dashboard", ""), "STUDY_OR_RUNS must not be empty"),
        (("sweep", ""), "FILE must be a path, got ''"),
        (("cut", ""), "RUN must not be empty"),
    ],
)
def test_an_empty_text_is_refused(args: tuple[str, ...], message: str, explore: Any) -> None:
    assert message in refused(explore, *args)


# Values in messages


@pytest.mark.parametrize("n", [100, 300, 5000])
@pytest.mark.parametrize(
    "args",
    [
        ("cost", "M*", "--by", "LONG"), ("cost", "M*", "--kv-dtype", "LONG"), ("cost", "LONG"),
        ("cost", "LONG/LONG"), ("cost", "M*", "--LONG"), ("LONG",), ("cost", "M*", "N*", "LONG"),
        ("table", "LONG"), ("table", "LONG/LONG"), ("plot", "LONG"), ("plot", RECORDS, "--y", "LONG"),
        ("table", RECORDS, "--out", "LONG"), ("sweep", "LONG"), ("train", "LONG.json"), ("train", "./LONG/LONG.json"),
        ("eval", "a.json", "--whole", "--pairs", "LONG"), ("export", "LONG", "LONG"), ("data", "LONG"),
        ("roofline", "M", "--hardware", "LONG"), ("plan", "M-", "--cluster", "LONG"), ("watch", "LONG"),
        ("plan", "M-", "--expert-groups", "LONG"), ("cut", "LONG", "--keep", "LONG"),
        ("distil", "LONG", "--tokens", "LONG"),
        ("table", RECORDS, "--where", "LONG"), ("bench", "--path", "LONG"), ("cost", "M", "--set", "LONG"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_value_in_a_message_has_at_most_80_characters(
    args: tuple[str, ...], n: int, explore: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(explore, *(arg.replace("LONG", "d" * n) for arg in args))
    assert max(map(len, line.split())) <= ECHO_CHARS + 3  # with quotation marks and a colon
    assert "Errno" not in line


def test_a_name_that_is_too_long_is_a_plain_sentence(explore: Any, tmp_path: Path) -> None:
    line = refused(explore, "table", RECORDS, "--out", str(tmp_path / ("o" * 300 + ".csv")))
    assert "the name of a file must have at most 255 bytes, got 3" in line


def test_only_values_are_cut() -> None:
    folder = f"{Path(__file__).parent}/nothing.json: cannot be read"
    prose = "the run's data are not those of its parent, since the parent's corpus has other documents than the child's"
    for line in (folder, prose, f"'{'a' * 78}' is not one of 'letter', 'layer', 'component'"):
        assert cut_values(line) == line
    assert cut_values(f"got '{'a b ' * 99}' there") == f"got {shorten(repr('a b ' * 99))} there"
    assert len(cut_values("x" * 999)) == ECHO_CHARS
    assert len(cut_values(f"/nowhere/{'x' * 99}/{'y' * 99}")) == ECHO_CHARS
