"""Libraries of replacements: how they start, are trained and measured, and the children built from them."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from block_variants import D_MODEL, VARIANTS
from command_line import run
from damage import DAMAGE
from small_runs import result, tiny, train, write_corpus
from torch import Tensor

from explore.blocks import AttentionConfig, BlockConfig, MLPConfig
from explore.checkpoints import load_model
from explore.compress import Cutter, Library, LibraryRequest, Plan, puzzle
from explore.compress.assembling import Children
from explore.compress.measures import Setting, measure
from explore.compress.puzzle import Limits, Puzzle
from explore.compress.replacing import block_flops, replace_one
from explore.compress.variants import Offer, pooled, variants
from explore.model import LanguageModel, ModelConfig
from explore.runs import RunFolder
from explore.train import block_library, blockwise, child_experiment, puzzle_rounds
from explore.train.blockwise import least_squares
from explore.weights import block_path

BLOCKS = {
    "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 16},
    "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 8},
    "-": {"d_ff": 48},
    "E": {"n_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 16, "d_latent": 16},
}
# All kinds of replacements: cut, pooled, linear and none.
REQUEST = LibraryRequest(
    offer=Offer(shares=(0.5,), vary=("d_ff", "n_kv_heads", "n_experts", "d_latent", "d_state", "n_groups")),
    tokens=12 * 128,
    val_tokens=384,
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    model = {"model__d_model": 32, "model__blocks": BLOCKS, "train__tokens": 60 * 128, "train__eval_tokens": 384}
    return train(tiny(corpus, "M*E-", **model), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def library(parent: RunFolder) -> Library:
    return block_library(parent, REQUEST)


@pytest.fixture(scope="module")
def solver(library: Library) -> Puzzle:
    return Puzzle(library, Setting(32))


@pytest.fixture(scope="module")
def children(parent: RunFolder, library: Library) -> Children:
    return Children(parent, library)


class Added(NamedTuple):
    """A choice, with the sums of the divergences and costs of its replacements."""

    options: tuple[int, ...]
    predicted: float
    costs: dict[str, float]


def fitting_choices(solver: Puzzle, limits: Limits, *more: str) -> list[Added]:
    """All choices that meet the limits."""
    names = [*limits.most, *more]
    rows = {name: (solver.parent_cost(name), solver.costs(name)) for name in names}
    found = []
    for options in itertools.product(*(range(len(layer)) for layer in solver.library.layers)):
        at = list(enumerate(options))
        costs = {name: whole + sum(row[i][k] for i, k in at) for name, (whole, row) in rows.items()}
        if all(costs[name] <= most for name, most in limits.most.items()) and not is_empty(solver.library, options):
            found.append(Added(options, sum(solver.divergences[i][k] for i, k in at), costs))
    return found


def is_empty(library: Library, options: tuple[int, ...]) -> bool:
    return all(layer[k].how == "none" for layer, k in zip(library.layers, options, strict=True))


# Variants


@pytest.mark.parametrize("letter", VARIANTS)
def test_variants_are_distinct_and_smaller_and_the_layer_itself_is_the_first(letter: str) -> None:
    block = VARIANTS[letter]
    found = variants(letter, block, Offer(at_once=2))
    assert (found[0].block, found[0].how) == (block, "whole")
    assert len({each.block for each in found}) == len({each.name for each in found}) == len(found)
    assert [each.how for each in found].count("none") == 1
    for each in found[1:]:
        if each.how in ("cut", "pooled"):
            assert each.block is not None
            assert params(each.block) < params(block) or each.sizes.keys() == {"top_k"}


def params(block: BlockConfig) -> int:
    return sum(entry.params for entry in block.entries(D_MODEL, 8))


def test_only_the_sizes_that_are_named_vary() -> None:
    experts = VARIANTS["E"]
    found = variants("E", experts, Offer(shares=(0.5,), vary=("E.n_experts", "top_k"), replacements=("cut",)))
    assert [each.name for each in found] == ["whole", "n_experts=4", "top_k=1"]


# Initial replacements


def test_a_linear_map_starts_as_attention_of_a_single_token() -> None:
    torch.manual_seed(0)
    mixer = AttentionConfig(n_heads=6, n_kv_heads=3, d_head=4).build(16)
    mixer.init_weights(0.3, 0.3)
    x = torch.randn(5, 1, 16)
    torch.testing.assert_close(mixer(x)[0], x @ mixer.linear_map().T)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_a_linear_map_starts_as_the_product_of_the_matrices_of_an_mlp(activation: Any) -> None:
    torch.manual_seed(0)
    mixer = MLPConfig(d_ff=24, activation=activation).build(16)
    mixer.init_weights(0.3, 0.3)
    x = torch.randn(5, 16)
    torch.testing.assert_close(mixer.down(mixer.up(x)), x @ mixer.linear_map().T)


@pytest.mark.parametrize("letter", ["*", "G"])
def test_pooling_equal_heads_changes_nothing(letter: str) -> None:
    """Key and value heads that are equal in pairs, so that their means equal them."""
    torch.manual_seed(0)
    block = {"*": AttentionConfig(n_heads=8, n_kv_heads=4, d_head=4), "G": VARIANTS["G"]}[letter]
    whole = next(each for each in variants(letter, block, Offer(shares=(0.5,))) if each.how == "pooled")
    ((axis, n),) = whole.sizes.items()
    sizes = {each.name: each.size for each in block.axes()}
    mixer = block.build(16)
    mixer.init_weights(0.3, 0.3)
    layout, weights = block.layout(), {name: weight.clone() for name, weight in mixer.state_dict().items()}
    means = {name: pooled(weight, layout[name], axis, n, sizes) for name, weight in weights.items()}
    assert whole.block is not None
    small = whole.block.build(16)
    small.load_state_dict(means)
    twice = {name: repeated(weight, layout[name], axis, n, sizes) for name, weight in means.items()}
    mixer.load_state_dict(twice)
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(small(x)[0], mixer(x)[0], atol=1e-5, rtol=1e-5)
    assert any(not torch.equal(weights[name], twice[name]) for name in weights)


def repeated(weight: Tensor, dims: Any, axis: str, n: int, sizes: dict[str, int]) -> Tensor:
    """Undoes `pooled`: repeats every index of an axis."""
    for k, dim in enumerate(dims):
        if any(axis in stretch for stretch in dim):
            parts, start = [], 0
            for stretch in dim:
                shape = [n if part == axis else part if isinstance(part, int) else sizes[part] for part in stretch]
                length = int(torch.tensor(shape).prod())
                part = weight.narrow(k, start, length).unflatten(k, shape)
                if axis in stretch:
                    part = part.repeat_interleave(sizes[axis] // n, k + stretch.index(axis))
                parts.append(part.flatten(k, k + len(shape) - 1))
                start += length
            weight = torch.cat(parts, k)
    return weight


def test_the_least_squares_fit_finds_a_linear_map_and_keeps_its_start_in_unseen_directions() -> None:
    torch.manual_seed(0)
    W, start = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    x = torch.randn(1000, 6, dtype=torch.float64)
    x[:, 5] = 0
    y = x @ W.T
    found = least_squares(x.T @ x, y.T @ x, start)
    torch.testing.assert_close(found[:, :5], W[:, :5], atol=1e-2, rtol=1e-2)
    assert torch.equal(found[:, 5], start[:, 5])


# Training and measurements of replacements


@pytest.mark.slow
def test_training_brings_every_kind_of_replacement_nearer_to_its_layer(parent: RunFolder, library: Library) -> None:
    begun = block_library(parent, REQUEST.model_copy(update={"tokens": 128}))
    trained = block_library(parent, REQUEST.model_copy(update={"tokens": 60 * 128}))
    for before, after in zip(begun.layers, trained.layers, strict=True):
        for first, last in zip(before, after, strict=True):
            if first.digest is not None:
                assert last.mse < first.mse, first.name
            assert last.digest != first.digest or first.digest is None


def test_a_replacement_does_not_depend_on_others_in_the_library(parent: RunFolder, library: Library) -> None:
    alone = REQUEST.model_copy(update={"offer": Offer(shares=(0.5,), vary=("d_latent",), replacements=("cut",))})
    (few,) = (layer for layer in block_library(parent, alone).layers if len(layer) > 1)
    many = {each.name: each.digest for layer in library.layers for each in layer}
    assert [each.name for each in few] == ["whole", "d_latent=8"]
    assert few[1].digest == many["d_latent=8"]


def test_each_divergence_is_that_of_the_parent_with_one_replacement(
    library: Library, solver: Puzzle, children: Children
) -> None:
    for i, layer in enumerate(library.layers):
        for k, each in enumerate(layer):
            options = tuple(k if j == i else 0 for j in range(len(library.layers)))
            found = children.measure(solver.choice(options, Limits({})))
            assert found.kl == pytest.approx(each.kl, abs=2e-6), each.name
    assert [layer[-1].mse for layer in library.layers] == [1.0] * 4


def test_replacements_are_measured_without_gradients(
    parent: RunFolder, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients other implementations of ops run, which round differently."""
    measured = []

    def watched(model: LanguageModel, mixers: Any, batch: Any) -> Any:
        for i, k, kl, error in replace_one(model, mixers, batch):
            measured.append(kl.requires_grad or torch.is_grad_enabled() or not kl.is_inference())
            yield i, k, kl, error

    monkeypatch.setattr(blockwise, "replace_one", watched)
    block_library(parent, REQUEST.model_copy(update={"tokens": 128, "val_tokens": 128}))
    assert measured
    assert not any(measured)


def test_choosing_the_original_layers_gives_the_parent(parent: RunFolder, library: Library) -> None:
    model = load_model(parent)
    child = library.child(model, [0] * 4, parent.path)
    tokens = torch.randint(0, 250, (2, 32))
    assert torch.equal(child(tokens), model(tokens))
    assert library.plan([0] * 4).key() == Plan.keep_all(model).key()


def test_the_library_is_reused_and_records_its_cost(parent: RunFolder, library: Library) -> None:
    assert block_library(parent, REQUEST) == library
    layers = library.parent_model.layers
    trained = [each for layer in library.layers for each in layer if each.digest is not None]
    passes = sum(block_flops(block, 32, 32) for block in layers)
    learnt = 12 * 128 * (passes + 3 * sum(block_flops(each.block, 32, 32) for each in trained if each.block))
    scores = Cutter.of(parent).whole.flops  # of the parent, with which smaller blocks begin
    assert scores > 0
    assert learnt < library.flops - scores < 3 * learnt


KILLED = """
import os, signal, sys
import torch; torch.set_num_threads(1)
from explore.compress import LibraryRequest
from explore.train import blockwise
blockwise.SAVE_EVERY_S, saves, save = -1.0, [], blockwise._Maker._save
def count(self, content):
    save(self, content)
    saves.append(1)
    if len(saves) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
blockwise._Maker._save = count
blockwise.block_library(sys.argv[1], LibraryRequest.model_validate_json(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("n_saves", [5, 13], ids=["training", "measuring"])
def test_a_killed_library_resumes_without_loss(parent: RunFolder, n_saves: int) -> None:
    """Saved after each of 11 steps, at the end of training, and after each of 3 batches of measuring.

    All three processes are alike.
    """
    request = REQUEST.model_copy(update={"seed": 1})
    for path in parent.path.glob("library-*"):
        path.unlink()

    def make(n: int) -> int:
        command = [sys.executable, "-c", KILLED, str(parent.path), request.model_dump_json(), str(n)]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode

    assert make(n_saves) == -signal.SIGKILL
    assert [path.suffix for path in parent.path.glob("library-*")] == [".partial"]
    assert make(0) == 0
    (path,) = parent.path.glob("library-*")
    resumed = path.read_text()
    path.unlink()
    assert make(0) == 0
    assert path.read_text() == resumed


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_damaged_state_of_a_killed_library_is_dropped_with_one_note(
    parent: RunFolder, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offer = Offer(shares=(0.5,), vary=("d_ff",), replacements=("cut",))
    request = REQUEST.model_copy(update={"offer": offer, "tokens": 4 * 128, "val_tokens": 128})
    whole, save = block_library(parent, request), blockwise._Maker._save
    (path,) = parent.path.glob(f"library-{whole.key[:8]}.json")
    path.unlink()

    def killed(self: Any, content: Any) -> None:
        save(self, content)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "SAVE_EVERY_S", -1.0)
        patch.setattr(blockwise._Maker, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            block_library(parent, request)
    partial = path.with_suffix(".partial")
    partial.write_bytes(DAMAGE[damage](partial.read_bytes()))
    capsys.readouterr()
    assert block_library(parent, request) == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {partial}: is damaged (")
    assert line.endswith("; it is removed, and the work starts over")


# Choices


def test_the_solution_is_the_best_of_all_children(solver: Puzzle) -> None:
    limits = Limits({"params_active": 0.6 * solver.parent_cost("params_active"), "state_bytes": 3000})
    fitting = fitting_choices(solver, limits)
    (found,) = solver.solve(limits)
    best = min(fitting, key=lambda each: each.predicted)
    assert found.predicted == pytest.approx(best.predicted, rel=1e-6)
    assert found.options in [each.options for each in fitting]
    assert "Optimal" in found.status
    assert found.gap == 0


def test_costs_of_layers_sum_to_the_cost_of_the_child(solver: Puzzle) -> None:
    for name in ("params_total", "flops_train", "state_bytes", "decode_bytes", "memory_bytes", "decode_s"):
        for options in [(0, 1, 2, 1), (2, 0, 1, 2), (1, 3, 1, 3)]:
            child = solver.library.plan(options).model()
            added = sum(row[k] for row, k in zip(solver.costs(name), options, strict=True))
            assert measure(name, child, solver.setting) == pytest.approx(solver.parent_cost(name) + added, rel=1e-9)


@pytest.mark.slow
def test_show_names_what_replaces_each_layer_of_a_plan_and_of_its_child(
    parent: RunFolder,
    library: Library,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hows = ("pooled", "linear", "whole", "none")
    pairs = zip(library.layers, hows, strict=True)
    options = [next(k for k, each in enumerate(layer) if each.how == how) for layer, how in pairs]
    plan = library.plan(options)
    plan.save(tmp_path / "plan.json")
    first, second = (str(library.layers[i][options[i]].digest)[:8] for i in (0, 1))
    expected = [
        f"layer 0 M: replaced by n_groups 2 -> 1, trained in the library (block {first})",
        f"layer 1 *: replaced by linear_map, trained in the library (block {second})",
        "layer 2 E: kept",
        "layer 3 -: left out",
        f"child: {plan.model().pattern}, {plan.model().cost(1).params_total:,} parameters",
    ]
    code, printed, _ = run(capsys, monkeypatch, "cut", tmp_path / "plan.json", "--show")
    assert (code, printed.splitlines()) == (0, expected)
    child = train(child_experiment(tmp_path / "plan.json", 128, parent=parent.path), tmp_path / "runs")
    code, printed, _ = run(capsys, monkeypatch, "cut", child.path, "--show")
    assert (code, printed.splitlines()[-5:]) == (0, expected)
    assert printed.startswith(f"{child.path}: cut from ")
    code, printed, _ = run(capsys, monkeypatch, "cut", child.path, "--drop-mtp", "--show")  # a cut of the child itself
    assert (code, "replaced" in printed) == (0, False)


def test_further_solutions_differ_and_get_worse(solver: Puzzle) -> None:
    found = solver.solve(Limits({"params_active": 22_000}), solutions=4, differ=2)
    assert [each.predicted for each in found] == sorted(each.predicted for each in found)
    for one, other in itertools.combinations(found, 2):
        assert sum(a != b for a, b in zip(one.options, other.options, strict=True)) >= 2


def test_the_requested_number_of_layers_is_dropped(solver: Puzzle, library: Library) -> None:
    for n in range(4):
        (found,) = solver.solve(Limits({}, drop=n))
        assert len(library.plan(found.options).model().pattern) == 4 - n


def test_baselines_meet_the_budgets_and_predict_no_better(solver: Puzzle) -> None:
    limits = Limits({"params_active": 22_000, "flops_train": 110_000})
    (best,) = solver.solve(limits)
    found = dict(solver.baselines(limits))
    assert list(found) == ["greedy", "random", "most parameters", "whole layers only"]
    for choice in found.values():
        assert choice.predicted >= best.predicted - 1e-6
        assert all(choice.costs[name] <= most for name, most in limits.most.items())
    sizes = [each.costs["params_total"] for each in fitting_choices(solver, limits, "params_total")]
    largest = solver.library.plan(found["most parameters"].options).model()
    assert solver.cost_of(largest, "params_total") == max(sizes)


def test_a_layer_of_one_letter_replaced_like_all_others_is_the_best_such_child() -> None:
    model = ModelConfig.model_validate({"d_model": 32, "vocab_size": 64, "pattern": "M*M-E-", "blocks": BLOCKS})
    sketch, rng = Library.sketch(model, REQUEST.offer), random.Random(0)
    layers = [[each.model_copy(update={"kl": rng.random()}) for each in layer] for layer in sketch.layers]
    layers = [[layer[0].model_copy(update={"kl": 0.0}), *layer[1:]] for layer in layers]
    solver = Puzzle(Library.model_validate({**sketch.model_dump(), "layers": layers}), Setting(32))
    for share in (0.4, 0.6, 0.8):
        limits = Limits({"params_active": share * solver.parent_cost("params_active")}, same=True)
        (found,) = solver.solve(limits)
        alike = [each for each in fitting_choices(solver, limits) if is_homogeneous(solver.library, each.options)]
        assert found.options == min(alike, key=lambda each: each.predicted).options
        kept = {letter: {found.options[i] for i in at} for letter, at in (("M", (0, 2)), ("-", (3, 5)))}
        nothing = {letter: len(solver.library.layers[i]) - 1 for letter, i in (("M", 0), ("-", 3))}
        assert all(len(options - {nothing[letter]}) <= 1 for letter, options in kept.items())


def is_homogeneous(library: Library, options: tuple[int, ...]) -> bool:
    """Whether all kept layers of a letter have the same replacement."""
    kept: dict[str, set[int]] = {}
    for letter, layer, k in zip(library.parent_model.pattern, library.layers, options, strict=True):
        if layer[k].how != "none":
            kept.setdefault(letter, set()).add(k)
    return all(len(each) == 1 for each in kept.values())


def test_budgets_that_only_conflict_together_are_named_with_the_least_of_each(solver: Puzzle) -> None:
    names = ("params_active", "state_bytes")
    least = {name: min(each.costs[name] for each in fitting_choices(solver, Limits({}), name)) for name in names}
    message = str(solver._unmet(Limits({name: value + 1000.0 for name, value in least.items()})))
    assert message == (
        f"no child meets params_active={least['params_active'] + 1000:,.0f}, state_bytes=1,000 together; "
        f"the least of each alone is params_active={least['params_active']:,.0f}, state_bytes=0"
    )


def test_the_message_and_the_gap_of_the_solver_are_in_the_plan(solver: Puzzle) -> None:
    limits = Limits({"params_active": 22_000})
    (choice,) = solver.solve(limits)
    origin = solver.plan(choice, limits).origin
    assert "Optimal" in str(origin["status"])
    assert origin["gap"] == 0


def test_dropping_the_only_attention_layer_is_noted(solver: Puzzle, children: Children, library: Library) -> None:
    none = len(library.layers[1]) - 1
    without, whole = ((0, k, 0, 0) for k in (none, 0))
    assert "no attention layer left" in children.notes(solver.choice(without, Limits({})))[0]
    assert children.notes(solver.choice(whole, Limits({}))) == []


def test_a_plan_of_a_library_is_read_back_and_distilled(parent: RunFolder, library: Library, tmp_path: Path) -> None:
    plan, choice = puzzle(library, {"params_active": 22_000})
    assert choice.costs["params_active"] == plan.model().cost(32).params_active <= 22_000
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").key() == plan.key()
    assert any(layer.block is not None for layer in plan.layers)
    child = train(child_experiment(tmp_path / "plan.json", 256, parent=parent.path), tmp_path / "runs")
    assert result(child)["before"][plan.key()] == plan.flops == library.flops
    digest = next(layer.block.digest for layer in plan.layers if layer.block is not None)
    path = block_path(parent.path, digest)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(
        ValueError, match=r"start.plan: the block that replaces layer \d must be at .*, which is missing"
    ):
        train(child_experiment(tmp_path / "plan.json", 512, parent=parent.path), tmp_path / "runs")
    path.write_bytes(content)


@pytest.mark.slow
def test_rounds_lower_the_budget_in_steps_and_count_earlier_cost(parent: RunFolder, library: Library) -> None:
    setting, limits = Setting(32), Limits({"params_active": 20_000})
    last, _ = puzzle_rounds(parent, limits, REQUEST, setting, 3, 256)
    half = last.load_experiment()
    whole = measure("params_active", library.parent_model, setting)
    part = whole * (20_000 / whole) ** (2 / 3)
    assert half.model.cost(32).params_active <= part
    assert half.name == "tiny-round-2"
    before = result(last)["before"]
    assert len(before) == 4  # two parents, two plans
    assert result(last)["flops_before"] == pytest.approx(sum(before.values()))
    assert half.train.objective.teacher.path == str(parent.path)  # type: ignore[union-attr]
