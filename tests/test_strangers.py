"""A thousand mistakes: any command or file gives a result or one clear line."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import typer

from explore import figures, solve, train  # noqa: F401 - loaded before a command is timed
from explore.cli import app, main
from explore.data import train_bpe
from explore.table import save_table

N = {
    "patterns": 250,
    "models": 220,
    "experiments": 240,
    "records": 130,
    "solved": 20,
    "options": 110,
    "texts": 100,
    "long": 60,
    "sweeps": 80,
    "tables": 60,
}
"""Mutated inputs of each test."""
HANG_S = 20
LONGEST = 400

MODEL: dict[str, Any] = {
    "d_model": 32,
    "vocab_size": 257,
    "pattern": "ME*-/*E",
    "blocks": {
        "M": {"n_heads": 2, "d_head": 16, "d_state": 8, "n_groups": 1, "chunk_size": 16},
        "E": {"n_experts": 4, "top_k": 2, "d_expert": 16, "d_shared": 16, "d_latent": 16},
        "*": {"n_heads": 2, "n_kv_heads": 1, "d_head": 16, "rope_theta": 10000.0},
        "X": {"kind": "mlp", "d_ff": 48},
    },
    "mtp": {"n_depths": 1, "shared": True},
    "norm_eps": 1e-5,
}
EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "model": MODEL,
    "data": {"kind": "text", "corpus": "text.txt", "tokenizer": "bytes", "seq_len": 32, "n_shards": None},
    "train": {"tokens": 1024, "batch_size": 4, "eval_tokens": 256, "lr": 1e-3, "betas": [0.9, 0.95], "val_every": 2},
    "seed": 1,
}
RECALL = {"kind": "recall", "seq_len": 32, "n_pairs": 2, "n_queries": 2, "vocab_size": 64, "power_a": 0.1, "n_eval": 4}
RECORDS: dict[str, Any] = {
    "experiment": {"key": "0" * 64, "experiment": EXPERIMENT},
    "cost": {"family": "hybrid MoE", "params_total": 10, "flops_train": 1e3, "kv_bytes": 1.0, "ssm_state_bytes": 2.0},
    "environment": {"commit": "abc", "device": "cpu", "data": {"kind": "text", "train": "0", "val": "1", "test": "2"}},
    "trial": {"tuned": True, "residuals": {"params_total": 0.1}, "study": "s"},
    "evals": {"pairs": {"blimp": {"a": 0.5}}, "bpb": {"sotu": 2.0}, "acceptance_length": {"greedy": 1.5}},
    "merged": {"flat": {"val_bpb": 2.0}},
    "result": {"status": "finished", "val_bpb": 2.0, "test_bpb": 2.1, "flops_run": 1e9, "tokens": 10, "train_s": 1.0},
}

NUMBERS = [0, -1, 1, 2, 3, 7, 63, 64, 10**4, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e300, 1e308, -1e308]
WORDS = ["", " ", "x", "M", "e", "E", "64", "5M", "128k", "1e400", "nan", "Infinity", "-3", "moe", "mamba2", "text"]
WORDS += ["[red]", "[/]", ":rocket:", "é☃", "\udcff", "a\nb", "../..", "~", "x" * 300, "9" * 5000, "M" * 300]
WORDS += ["\\", "%s{}"]
NESTED = [None, True, [], [1, 2], ["x"], {}, {"a": 1}, {"kind": "moe"}, {"kind": []}, [[[[[[[[1]]]]]]]], [None] * 1000]
CHOICES = ["layer", "component", "megatron", "6nd", "exact,palm", "float4", "H200", "ddp", "offline", "1,2", "val_bpb"]
VALUES = [*NUMBERS, *WORDS, *NESTED]
LETTERS = "MGWLE*-|/ "
PLACES = ["missing", "folder", "fifo.json", "/dev/zero", "text.txt", "broken.json"]
PLACES += ["x" * 300, "a\udcff", "", ".", "[/].json"]


class StoppedError(ValueError):
    """Raised when a run would start training."""


class Answer(NamedTuple):
    code: int
    out: str
    err: str
    wrong: str


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"took more than {HANG_S} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ask(args: list[str]) -> Answer:
    """Runs a command in this process and reports what is wrong with its output or exit code."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    sys.argv = ["explore", *args]
    code, wrong = 0, ""
    try:
        with alarm(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 99
    except BaseException as error:
        wrong = "".join(traceback.format_exception(error)[-3:])
    printed, errors = (each.buffer.getvalue().decode() for each in (out, err))  # type: ignore[attr-defined]
    lines = errors.splitlines()
    if not wrong and code not in (0, 1, 2):
        wrong = f"exit code {code}"
    elif not wrong and code == 2 and not (lines and lines[-1].startswith("error: ") and len(lines[-1]) <= LONGEST):
        wrong = f"no short last line: {errors[-600:]}"
    elif not wrong and "Traceback" in errors:
        wrong = errors[-600:]
    return Answer(code, printed, errors, wrong)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a text and a few paths that are not files."""
    folder = tmp_path / "work"
    (folder / "folder").mkdir(parents=True)
    (folder / "text.txt").write_text("\n\n".join(f"Paragraph {i} tells of {i * i} sheep." for i in range(400)))
    (folder / "broken.json").write_text('{"name": "x", ')
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "experiment.json").write_text(json.dumps(EXPERIMENT))
    os.mkfifo(folder / "fifo.json")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["explore"])
    monkeypatch.setattr(typer.main, "get_command", lambda _: COMMANDS)  # built once, not a thousand times
    monkeypatch.setenv("EXPLORE_DATA", str(folder / "nowhere"))
    return folder


def check(place: Path, n: int, draw: Callable[[random.Random], list[str]], expect: set[int] | None = None) -> None:
    """Runs `n` random commands; none may leave files behind."""
    before = snapshot(place)
    wrong, codes = [], set()
    for seed in range(n):
        args = draw(random.Random(seed))
        between = snapshot(place)
        answer = ask(args)
        codes.add(answer.code)
        if "would be trained" in answer.err:
            shutil.rmtree(place / "runs", ignore_errors=True)
        left = "" if (after := snapshot(place)) == between else f"left {sorted(after ^ between)}"
        if answer.wrong or left:
            wrong.append(f"{seed}: explore {' '.join(map(repr, args))[:600]}\n{answer.wrong}{left}")
        for path in sorted(after - between):  # folders before their contents
            if (place / path).is_dir():
                shutil.rmtree(place / path)
            else:
                (place / path).unlink(missing_ok=True)
    assert not wrong, f"{len(wrong)} of {n}:\n\n" + "\n\n".join(wrong[:40])
    assert before == snapshot(place)
    assert codes >= (expect or {0, 2})  # some of the drawn commands are valid


def snapshot(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths inside a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [each for key, inner in items for each in ((*path, key), *paths_of(inner, (*path, key)))]


def misspelt(rng: random.Random, name: str) -> str:
    i = rng.randrange(len(name) + 1)
    return rng.choice([name[:i] + rng.choice("xE._ é") + name[i:], name[:i] + name[i + 1 :], name.upper(), name[::-1]])


def mutated(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """A copy with a few entries replaced, removed, renamed or added."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not (paths := paths_of(content)):
            break
        *path, last = rng.choice(paths)
        holder: Any = content
        for key in path:
            holder = holder[key]
        match rng.choice(["replace", "replace", "replace", "drop", "rename", "add"]):
            case "replace":
                holder[last] = rng.choice(VALUES)
            case "drop":
                del holder[last]
            case "rename" if isinstance(holder, dict):
                holder[misspelt(rng, str(last))] = holder.pop(last)
            case _ if isinstance(holder, dict):
                holder[rng.choice(["x", "kind", "E", "d_model", "lr", misspelt(rng, str(last))])] = rng.choice(VALUES)
    return content


def as_text(rng: random.Random, content: Any) -> bytes:
    """JSON, sometimes damaged."""
    raw = json.dumps(content).encode()
    i = rng.randrange(len(raw) + 1)
    damage = [
        raw[:i],
        raw[:i] + bytes([rng.randrange(256)]) + raw[i:],
        b"\xef\xbb\xbf" + raw,
        raw.replace(b"1", b"9" * 5000),
    ]
    damage += [b"[" * 100_000, b"", b"5", b"[]", raw.replace(b'"', b"'"), b"\x00" * 100]
    return rng.choice(damage) if rng.random() < 0.08 else raw


def override(rng: random.Random, content: dict[str, Any]) -> str:
    """A value of `--set`."""
    path = ".".join(map(str, rng.choice(paths_of(content))))
    if rng.random() < 0.4:
        path = misspelt(rng, path)
    value = rng.choice(VALUES)
    text = value if isinstance(value, str) else json.dumps(value)
    return rng.choice([f"{path}={text}"] * 9 + [path, f"={text}", f"{path}={'[' * 50_000}", f"{path}=="])


def pattern(rng: random.Random) -> str:
    letters = rng.choice(["MGWLE*-", "M*E-", LETTERS, LETTERS + "XQe.é[]:5"])
    return "".join(rng.choices(letters, k=rng.choice([0, 1, 2, 5, 9, 300, 3000])))


def option_of(rng: random.Random, command: Any) -> list[str]:
    """An option of a command, with a value of any kind."""
    options = [each for each in command.params if each.param_type_name == "option" and each.name not in DANGEROUS]
    if not options:
        return []
    option = rng.choice(options)
    if option.is_flag:
        return [rng.choice(option.opts)]
    value = rng.choice([*NUMBERS, *WORDS, *PLACES, *CHOICES])
    return [option.opts[0], str(value).replace("\x00", "")]


DANGEROUS = {"as_json", "as_csv", "help", "output", "figure", "save", "cluster", "storage", "notes", "runs"}
"""Options that change what is printed or write, which others hold."""


LONG = {"bench", "figures", "parity", "proxy", "prove"}
"""Commands that take their time, or serve without an end, when all is right."""

COMMANDS: Any = typer.main.get_command(app)


def with_options(rng: random.Random, name: str, args: list[str], most: int = 2) -> list[str]:
    command = COMMANDS.commands[name]
    return [name, *args, *(part for _ in range(rng.randint(0, most)) for part in option_of(rng, command))]


@pytest.mark.slow
def test_patterns_and_options(place: Path) -> None:
    def draw(rng: random.Random) -> list[str]:
        target = rng.choice(
            [pattern(rng), pattern(rng), rng.choice(["MEM*E", "M-", "nemotron-3-nano", *WORDS, *PLACES])]
        )
        sets = [part for _ in range(rng.choice([0, 0, 1, 2])) for part in ("--set", override(rng, MODEL))]
        name = rng.choice(["cost", "cost", "cost", "roofline"])
        args = with_options(rng, name, []) if rng.random() < 0.6 else [name]
        return [*args, *sets, "--", target]

    check(place, N["patterns"], draw)


@pytest.mark.slow
def test_models_in_files(place: Path) -> None:
    file = place / "model.json"

    def draw(rng: random.Random) -> list[str]:
        content = rng.choice([MODEL, MODEL, {"experiment": EXPERIMENT}])
        file.write_bytes(as_text(rng, mutated(rng, content)))
        name = rng.choice(["cost", "cost", "cost", "roofline"])
        return [*with_options(rng, name, [], most=1), *rng.choice([[], ["--json"]]), str(file)]

    check(place, N["models"], draw)


@pytest.mark.slow
def test_experiments_up_to_the_first_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise StoppedError("would be trained")

    monkeypatch.setattr("explore.train.fitting._train_and_record", stop)
    file = place / "experiment.json"

    def draw(rng: random.Random) -> list[str]:
        content = rng.choice([EXPERIMENT, EXPERIMENT, {**EXPERIMENT, "data": RECALL}])
        changed = mutated(rng, content) if rng.random() < 0.7 else content
        file.write_bytes(as_text(rng, changed))
        sets = [part for _ in range(rng.randint(0, 2)) for part in ("--set", override(rng, content))]
        return [*with_options(rng, "train", [str(file)], most=1), *sets]

    check(place, N["experiments"], draw, {2})


@pytest.mark.slow
def test_solved_sizes(place: Path) -> None:
    def draw(rng: random.Random) -> list[str]:
        file = place / "model.json"
        file.write_bytes(as_text(rng, mutated(rng, {**MODEL, "pattern": "M-E"})))
        args = {
            "--free": rng.choice(["d_ff=16:64:16", "-.d_ff=16:4000:16", "d_ff=64:32", "d_ff=::", "d_ff"]),
            "--target": rng.choice(["params_total=200k", "params_active=1M", "flops_train=2e5", "kv_bytes=1"]),
            "--": rng.choice(["M-", "-", "E-", "model.json"]),
        }
        wild = {
            "--free": f"{rng.choice(['E.top_k', 'd_model', *WORDS])}={rng.choice(NUMBERS)}:{rng.choice(NUMBERS)}",
            "--target": f"{rng.choice(['params_total', 'state_bytes', *WORDS])}={rng.choice([*NUMBERS, *WORDS])}",
            "--": pattern(rng)[:5],
        }
        for option in wild if rng.random() < 0.7 else ():
            args[option] = rng.choice([args[option], wild[option]])
        target = args.pop("--")
        more = with_options(rng, "solve", [], most=1) if rng.random() < 0.5 else ["solve"]
        return [*more, *(part for pair in args.items() for part in pair), "--", target]

    check(place, N["solved"], draw, {0, 1, 2})


@pytest.mark.slow
def test_records_of_runs(place: Path) -> None:
    runs = place / "folder"

    def draw(rng: random.Random) -> list[str]:
        for name in ("one", "[red]two"):
            (runs / name).mkdir(exist_ok=True)
            for record, content in RECORDS.items():
                changed = mutated(rng, content) if rng.random() < 0.4 else content
                (runs / name / f"{record}.json").write_bytes(as_text(rng, changed))
            metrics = "step,loss,val_bpb\n1,2.0,\n2,1.9,2.0\n" * rng.randint(0, 2) + rng.choice(
                ["", "3,x", "\x00", "a,b\n1"]
            )
            (runs / name / "metrics.csv").write_text(metrics)
        commands = {"table": 16, "export": 2, "generate": 2, "eval": 2, "merge": 1, "plot": 1}
        name = rng.choices(list(commands), list(commands.values()))[0]
        more = {"generate": ["--prompt", "x"], "eval": ["--acceptance", "1"], "export": ["--to", "megatron"]}
        place_of = runs if name in ("table", "plot") else runs / "one"
        return [*with_options(rng, name, [str(place_of)], most=1), *more.get(name, [])]

    for name in ("one", "[red]two"):
        (runs / name).mkdir()
        for record in RECORDS:
            (runs / name / f"{record}.json").touch()
        (runs / name / "metrics.csv").touch()
    monkey = ("frontier.png", "frontier.svg")
    for picture in monkey:
        (runs / picture).touch()
    check(place, N["records"], draw)


@pytest.mark.slow
def test_options_of_all_commands(place: Path) -> None:
    def draw(rng: random.Random) -> list[str]:
        name = rng.choice(sorted(set(COMMANDS.commands) - LONG))
        values = [rng.choice([*WORDS, *PLACES, "text.txt", "model.json"]) for _ in range(rng.randint(0, 2))]
        args = [*with_options(rng, name, []), "--", *values]
        return args if rng.random() < 0.9 else [misspelt(rng, name), *args[1:]]

    check(place, N["options"], draw, {2})


@pytest.mark.slow
def test_mistakes_in_commands_that_take_their_time(place: Path) -> None:
    def draw(rng: random.Random) -> list[str]:
        name = rng.choice(sorted(LONG))
        command = COMMANDS.commands[name]
        typed = [each.opts[0] for each in command.params if isinstance(each.default, int | float) and not each.is_flag]
        wrong = rng.choice(["x", "[red]", "", "1e400x", "--", "9" * 5000, "nan?", ":rocket:", "é☃"])
        mistakes = [[misspelt(rng, "--json")], ["--no-such-option", wrong], [wrong or "x", "y", "z"]]
        mistakes += [[option, wrong] for option in typed if option.startswith("--")]
        return [name, *rng.choice(mistakes)]

    check(place, N["long"], draw, {2})


@pytest.mark.slow
def test_texts(place: Path) -> None:
    file, tokenizer_file = place / "lines.jsonl", place / "tokenizer.json"
    vocabulary = json.loads(train_bpe(["Paragraph 7 tells of 49 sheep. "] * 9, 270).to_str())
    for each in (file, tokenizer_file):
        each.touch()

    def draw(rng: random.Random) -> list[str]:
        lines = [json.dumps({"text": f"A line of {i} sheep.", "id": i}).encode() for i in range(200)]
        for _ in range(rng.randint(0, 2)):
            i = rng.randrange(len(lines))
            lines[i] = as_text(
                rng, mutated(rng, json.loads(lines[i])) if rng.random() < 0.7 else {"text": lines[i].decode()}
            )
        file.write_bytes(b"\n".join(lines))
        args = with_options(rng, "data", [], most=1) if rng.random() < 0.4 else ["data"]
        tokenizers = [*["bytes"] * 50, *["tokenizer.json"] * 50, *PLACES, *WORDS]
        tokenizer, name = rng.choice(tokenizers), rng.choice([*["lines.jsonl"] * 20, *PLACES])
        tokenizer_file.write_bytes(as_text(rng, mutated(rng, vocabulary)))
        return [*args, "--tokenizer", tokenizer, "--", name]

    check(place, N["texts"], draw)


SWEEP = '''"""Does the width matter?"""
from explore import Experiment, ModelConfig, RecallData, TrainConfig
parameters = {"tokens": 1024, "widths": [32, 64], "tie": False}
objectives = {"recall": "maximize", "flops_run": "minimize"}
sampler = "grid"
grid = {"d_model": (32, 64)}
seeds = 2
def experiment(trial):
    width = trial.suggest_categorical("d_model", parameters["widths"])
    model = ModelConfig(d_model=width, vocab_size=64, pattern="*-", tie_embeddings=parameters["tie"])
    data = RecallData(seq_len=32, n_pairs=2, vocab_size=64)
    return Experiment(name="a", model=model, data=data, train=TrainConfig(tokens=parameters["tokens"], batch_size=4))
'''


@pytest.mark.slow
def test_sweep_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise StoppedError("would be trained")

    for name in ("run_gated", "preview"):
        monkeypatch.setattr(f"explore.study.{name}", stop)
    file = place / "space.py"
    file.touch()

    def draw(rng: random.Random) -> list[str]:
        code = SWEEP
        for _ in range(rng.randint(0, 2)):
            part = rng.choice(re.findall(r"\w+|[^\w\s]", code))
            other = repr(rng.choice(VALUES)).replace("inf", "1e999") if rng.random() < 0.6 else rng.choice("([{,:#x ")
            code = code.replace(part, other, 1)
        raw = code.encode(errors="surrogatepass")
        i = rng.randrange(len(raw))
        damage = [raw[:i], raw[:i] + b"\0" + raw[i:], raw[:i] + b"\xff" + raw[i:], b"\xef\xbb\xbf" + raw, b""]
        file.write_bytes(rng.choice(damage) if rng.random() < 0.2 else raw)
        names = [*["tokens", "tie", "widths"] * 3, *WORDS[:4]]
        values = ["2k", "true", "[96]", *map(str, NUMBERS), *WORDS]
        sets = [f"{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.choice([0, 0, 1, 2]))]
        options = with_options(rng, "sweep", [], most=1) if rng.random() < 0.4 else ["sweep"]
        return [*options, *(part for each in sets for part in ("--set", each)), "--", str(file)]

    check(place, N["sweeps"], draw, {2})


@pytest.mark.slow
def test_tables_of_any_bytes(place: Path) -> None:
    runs = pd.DataFrame({"run": ["a", "b"], "family": "M", "pattern": "M-", "status": "finished"})
    runs = runs.assign(flops_run=[1e9, 2e9], val_bpb=[2.0, 1.9], params_total=[10, 20], recall=[math.nan, 0.5])
    files = [place / name for name in ("frontier.png", "frontier.svg", "runs.csv", "runs.parquet")]
    for file in files:
        file.touch()

    def draw(rng: random.Random) -> list[str]:
        table = runs.copy()
        for column in rng.sample(list(table), rng.choice([0, 0, 1, 2])):
            table[column] = [rng.choice([*NUMBERS[:10], math.inf]) for _ in range(2)] if rng.random() < 0.7 else "x"
        file = rng.choice(files[2:])
        save_table(table.drop(columns=rng.sample(list(table), rng.choice([0, 0, 1, 3]))), file)
        raw = file.read_bytes()
        i = rng.randrange(len(raw))
        flipped = raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1 :]
        damage = [raw[:i], flipped, b"", raw.decode("latin1").encode("utf-16")]
        file.write_bytes(rng.choice(damage) if rng.random() < 0.5 else raw)
        name = rng.choices(["table", "plot", "replay-pruning", "replay-samplers"], [8, 1, 2, 2])[0]
        return [*with_options(rng, name, [], most=1), "--", str(file)]

    check(place, N["tables"], draw)


def test_there_are_a_thousand() -> None:
    assert sum(N.values()) >= 1000
