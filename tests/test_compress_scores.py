"""Scores of a trained parent, and plans made from them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import command_line
import pandas as pd
import pytest
import torch
from damage import DAMAGE
from small_runs import tiny, train, write_corpus
from torch import Tensor
from torch.nn import functional as F

import explore.compress.scores as scoring
from explore.checkpoints import load_model
from explore.compress import METHODS, Cutter, LayerCut, Plan, Scores, cut, score, weak_halves
from explore.compress.candidates import candidates, free_size
from explore.compress.measures import Setting, measure
from explore.compress.observing import Observer
from explore.compress.ranking import ByMagnitude, ByScores
from explore.compress.zero_shot import Validation
from explore.data import Batch
from explore.model import LanguageModel
from explore.runs import DIGEST, RunFolder

BLOCKS = {
    "M": {"n_heads": 4, "d_head": 8, "d_state": 8, "n_groups": 2, "chunk_size": 16},
    "*": {"n_heads": 4, "n_kv_heads": 2, "d_head": 8},
    "-": {"d_ff": 24},
    "E": {"n_experts": 6, "top_k": 2, "d_expert": 6, "d_shared": 16, "d_latent": 8},
    "G": {"n_heads": 4, "n_key_heads": 2, "d_k": 8, "d_v": 8, "chunk_size": 16},
    "L": {"n_heads": 4, "q_rank": 12, "kv_rank": 16, "d_nope": 8, "d_rope": 4, "d_v": 8},
}
TOKENS = 4 * 8 * 32
"""Four batches."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    model = {"model__d_model": 32, "model__blocks": BLOCKS, "train__tokens": 3 * 128}
    return train(tiny(corpus, "M-*EGL", **model), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def found(run: RunFolder) -> Scores:
    return score(run, tokens=TOKENS)[0]


@pytest.fixture(scope="module")
def parent(run: RunFolder) -> LanguageModel:
    return load_model(run)


@pytest.fixture(scope="module")
def batches(run: RunFolder) -> list[Batch]:
    source = run.load_experiment().data.open(0)
    return [source.batch(step, 8) for step in range(4)]


@torch.no_grad()
def stream(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """The inputs of every layer and of the last norm."""
    x = [model.embedding(batch.inputs)]
    for layer in model.layers:
        x.append(layer(x[-1])[0])
    return x


def by_sequence(activations: list[Tensor]) -> list[float]:
    """Mean size over a sequence, then the L2 norm over all sequences."""
    means = torch.cat([each.double().abs().mean(1) for each in activations])
    return means.norm(dim=0).tolist()  # type: ignore[no-any-return]


# Published values


@torch.no_grad()
def test_a_neuron_is_scored_by_the_input_of_the_down_projection(
    parent: LanguageModel, batches: list[Batch], found: Scores
) -> None:
    layer = parent.layers[1]
    inner = [F.relu(layer.mixer.up(layer.norm(stream(parent, batch)[1]))).square() for batch in batches]  # type: ignore[operator, union-attr]
    assert found.values("activation", 1, "d_ff") == pytest.approx(by_sequence(inner), rel=1e-5)


@torch.no_grad()
def test_a_channel_of_the_stream_is_scored_by_all_norms_of_the_network(
    parent: LanguageModel, batches: list[Batch], found: Scores
) -> None:
    norms = [*(layer.norm for layer in parent.layers), parent.norm]
    streams = [stream(parent, batch) for batch in batches]
    parts = [by_sequence([norm(x[i]) for x in streams]) for i, norm in enumerate(norms)]  # type: ignore[operator]
    assert found.values("activation", -1, "d_model") == pytest.approx([sum(each) for each in zip(*parts, strict=True)])


@torch.no_grad()
def test_attention_heads_are_scored_by_output_and_key_heads_by_their_queries(
    parent: LanguageModel, batches: list[Batch], found: Scores
) -> None:
    seen: list[Tensor] = []
    handle = parent.layers[2].mixer.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    for batch in batches:
        parent(batch.inputs)
    handle.remove()
    heads = by_sequence([each.unflatten(-1, (4, 8)).norm(dim=-1) for each in seen])
    block = parent.config.layers[2]
    kv, queries = block.axes()
    assert found.of("activation", 2, block, queries) == pytest.approx(heads, rel=1e-5)
    assert found.of("activation", 2, block, kv) == pytest.approx([heads[0] + heads[1], heads[2] + heads[3]], rel=1e-5)


@torch.no_grad()
def test_mamba_is_scored_by_the_projection_of_x_and_heads_by_their_kept_channels(
    parent: LanguageModel, batches: list[Batch], found: Scores
) -> None:
    layer = parent.layers[0]
    s = [layer.mixer.in_proj(layer.norm(stream(parent, batch)[0]))[..., 32:64] for batch in batches]  # type: ignore[operator, union-attr]
    squares = torch.cat(s).double().square().sum((0, 1)).view(4, 8)
    assert found.values("activation", 0, "d_head") == pytest.approx(squares.sum(0).sqrt().tolist(), rel=1e-5)
    assert found.values("activation", 0, "n_heads") == pytest.approx(squares.sum(1).sqrt().tolist(), rel=1e-5)
    kept = squares[:, [1, 6]].sum(1).sqrt().tolist()
    assert found.values("activation", 0, "n_heads", (1, 6)) == pytest.approx(kept, rel=1e-5)


@torch.no_grad()
def test_experts_are_scored_by_reap_and_by_their_load(
    parent: LanguageModel, batches: list[Batch], found: Scores
) -> None:
    layer = parent.layers[3]
    mixer: Any = layer.mixer
    x = torch.cat([layer.norm(stream(parent, batch)[3]) for batch in batches]).flatten(0, 1)  # type: ignore[operator]
    scores = (x @ mixer.router.weight.T).sigmoid()
    chosen = (scores + mixer.expert_bias).topk(2).indices
    weights = scores.gather(1, chosen)
    weights = weights / weights.sum(1, keepdim=True) * mixer.config.routed_scaling_factor
    latent = x @ mixer.latent_down.weight.T
    reap, load = [], []
    for e in range(6):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        outputs = F.relu(latent[rows] @ mixer.up[e]).square() @ mixer.down[e]
        reap.append(float((weights[rows, place] * outputs.norm(dim=1)).mean()) if len(rows) else 0.0)
        load.append(len(rows) / chosen.numel())
    assert found.values("activation", 3, "n_experts") == pytest.approx(reap, rel=1e-4)
    assert found.values("frequency", 3, "n_experts") == pytest.approx(load)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_a_layer_is_scored_by_the_model_without_it(
    parent: LanguageModel, batches: list[Batch], found: Scores, layer: int
) -> None:
    plan = Plan.keep_all(parent)
    layers = [LayerCut(drop=i == layer) for i in range(6)]
    child = Plan.model_validate({**plan.model_dump(), "layers": layers}).model().build()
    child.load_state_dict(Plan.model_validate({**plan.model_dump(), "layers": layers}).apply(parent.state_dict()))
    mse, kl, loss, turn = [], [], [], []
    for batch in batches:
        ours, theirs = child.hidden(batch.inputs)[0], parent.hidden(batch.inputs)[0]
        mse.append((ours - theirs).square().mean())
        p, q = parent.head(theirs).log_softmax(-1), child.head(ours).log_softmax(-1)
        kl.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
        loss.append(
            F.nll_loss(q.flatten(0, 1), batch.targets.flatten()) - F.nll_loss(p.flatten(0, 1), batch.targets.flatten())
        )
        x = stream(parent, batch)
        turn.append(1 - F.cosine_similarity(x[layer], x[layer + 1], dim=-1).mean())
    for name, values in (("mse", mse), ("kl", kl), ("loss", loss), ("influence", turn)):
        assert found.layers(name)[layer] == pytest.approx(float(torch.stack(values).mean()), rel=1e-3, abs=1e-7), name


# The record


def test_scores_record_their_inputs_and_are_reused(
    run: RunFolder, found: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Observer, "observe", None)
    again, path = score(run, tokens=TOKENS)
    assert again.table.equals(found.table)
    assert path.stat().st_size < 100_000
    about = Scores.load(path).about
    assert (about["split"], about["seed"], about["tokens"], about["seq_len"]) == ("train", 0, TOKENS, 32)
    assert about["flops"] > TOKENS * run.load_experiment().model.cost(32).flops_fwd


def interrupt(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves the sums of two of four batches, as a kill does; returns their file."""
    observe, counter = Observer.observe, itertools.count()

    def killed(self: Observer, batch: Batch, *, effects: bool = True) -> None:
        if next(counter) == 2:
            raise KeyboardInterrupt
        observe(self, batch, effects=effects)

    score(run, tokens=TOKENS)[1].unlink()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "SAVE_EVERY_S", 0.0)
        patch.setattr(Observer, "observe", killed)
        with pytest.raises(KeyboardInterrupt):
            score(run, tokens=TOKENS)
    (partial,) = run.path.glob("*.partial")
    return partial


def test_a_killed_scoring_resumes_with_the_same_scores(
    run: RunFolder, found: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(run, monkeypatch)
    observe, seen = Observer.observe, list[int]()
    monkeypatch.setattr(Observer, "observe", lambda *given, **how: (seen.append(1), observe(*given, **how))[1])
    again, _ = score(run, tokens=TOKENS)
    assert len(seen) == 2
    assert again.table.equals(found.table)
    assert not list(run.path.glob("*.partial"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sums_of_a_killed_scoring_are_dropped_with_one_note(
    run: RunFolder,
    found: Scores,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    partial = interrupt(run, monkeypatch)
    partial.write_bytes(DAMAGE[damage](partial.read_bytes()))
    capsys.readouterr()
    again, _ = score(run, tokens=TOKENS)
    assert again.table.equals(found.table)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {partial}: is damaged (")
    assert line.endswith("; it is removed, and the work starts over")
    assert not partial.exists()


def test_no_flipped_bit_of_a_file_of_scores_changes_a_score(found: Scores, tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    found.save(path)
    content, refused = path.read_bytes(), 0
    places = range(0, len(content), max(1, len(content) // 200))
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x40]) + content[place + 1 :])
        try:
            again = Scores.load(path)
        except ValueError:
            refused += 1
        else:
            assert again.table.equals(found.table)
            assert again.about == found.about
    assert refused > len(places) / 2


@pytest.mark.parametrize("damage", ["cut", "zeroed", "one score"])
def test_a_damaged_file_of_scores_is_one_error_line(
    run: RunFolder,
    found: Scores,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = score(run, tokens=TOKENS)[1]
    content = path.read_bytes()
    if damage == "one score":
        table = pd.read_parquet(path)
        table.loc[3, "score"] *= 2
        table.to_parquet(path, index=False)
    else:
        path.write_bytes(DAMAGE[damage](content))
    options = ("--tokens", str(TOKENS), "--json")
    code, printed, errors = command_line.run(capsys, monkeypatch, "score", run.path, *options)
    path.write_bytes(content)
    assert (code, printed, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith(f"error: {path}: is ")
    assert command_line.run(capsys, monkeypatch, "score", run.path, *options)[0] == 0


def test_a_file_of_scores_without_a_digest_is_read(found: Scores, tmp_path: Path) -> None:
    """Older versions wrote none."""
    found.save(tmp_path / "scores.parquet")
    table = pd.read_parquet(tmp_path / "scores.parquet")
    del table.attrs[DIGEST]
    table.to_parquet(tmp_path / "scores.parquet", index=False)
    again = Scores.load(tmp_path / "scores.parquet")
    assert again.table.equals(found.table)
    assert again.about == found.about


def test_layers_are_scored_on_part_of_a_long_text(
    run: RunFolder, found: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "MANY_BATCHES", 4)
    sparse, path = score(run, tokens=TOKENS)
    first, _ = score(run, tokens=TOKENS // 4)
    path.unlink()
    assert (sparse.about["tokens"], sparse.about["layer_tokens"]) == (TOKENS, TOKENS // 4)
    assert found.about["layer_tokens"] == TOKENS
    assert sparse.layers("kl") == first.layers("kl")
    assert sparse.values("activation", 1, "d_ff") == found.values("activation", 1, "d_ff")


@pytest.mark.parametrize(("change", "message"), [({"tokens": 0}, "tokens must be at least 1, got 0")])
def test_no_text_is_refused(run: RunFolder, change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(run, **change)  # type: ignore[arg-type]


def test_a_run_that_has_not_finished_is_refused(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a run folder"):
        score(tmp_path)
    (tmp_path / "experiment.json").write_text((run.path / "experiment.json").read_text())
    with pytest.raises(ValueError, match="must be a finished run, and is unfinished"):
        Cutter.of(tmp_path)


def test_the_weaker_half_of_equal_indices_holds_half(run: RunFolder, found: Scores) -> None:
    halves = weak_halves(found, run.load_experiment().model)
    assert all(0 <= share <= 0.5 for share in halves.values())
    values = sorted(found.values("activation", 1, "d_ff") or [])
    assert halves[1, "d_ff"] == pytest.approx(sum(values[:12]) / sum(values))


# Rankings and plans

SIZES = {"d_model": 24, "d_ff": 10, "M.n_heads": 2, "d_head": 4, "n_kv_heads": 1, "n_experts": 4, "d_expert": 3}


@pytest.mark.parametrize("by", METHODS)
def test_every_ranking_gives_a_child_of_the_requested_sizes(run: RunFolder, found: Scores, by: Any) -> None:
    cutter = Cutter.of(run, by=by, scores=found)
    plan = cutter.plan(SIZES, 1)
    child = plan.model()
    assert (child.d_model, child.n_layers) == (24, 5)
    for layer, block in zip(plan.layers, cutter.model.layers, strict=True):
        for axis in block.axes():
            kept = layer.keep.get(axis.name)
            assert kept is None or len(kept) < axis.size
    assert cutter.child(plan).config == child
    assert Cutter.of(run, by=by, scores=found).plan(SIZES, 1) == plan


def test_reverse_keeps_the_indices_that_activation_cuts_and_random_depends_on_the_seed(
    run: RunFolder, found: Scores
) -> None:
    best, worst = (
        Cutter.of(run, by=by, scores=found).plan({"d_ff": 12}).layers[1].keep["d_ff"]
        for by in ("activation", "reverse")
    )  # type: ignore[arg-type]
    assert set(best) | set(worst) == set(range(24))
    values = found.values("activation", 1, "d_ff") or []
    assert min(values[i] for i in best) >= max(values[i] for i in worst)
    seeds = [Cutter.of(run, by="random", seed=seed, norm_scales=False).plan({"d_ff": 12}) for seed in (0, 1, 0)]
    assert seeds[0] == seeds[2]
    assert seeds[0] != seeds[1]


@torch.no_grad()
def test_magnitude_does_not_depend_on_how_a_squared_relu_shares_its_scale(parent: LanguageModel) -> None:
    weights = {name: weight.clone() for name, weight in parent.state_dict().items()}
    axis = parent.config.layers[1].axes()[0]
    before = ByMagnitude(parent.config, weights).axis(1, axis, {})
    weights["layers.1.mixer.up.weight"][3] *= 2
    assert ByMagnitude(parent.config, weights).axis(1, axis, {})[3] == pytest.approx(4 * before[3])
    weights["layers.1.mixer.down.weight"][:, 3] /= 4
    assert ByMagnitude(parent.config, weights).axis(1, axis, {}) == pytest.approx(before)


@torch.no_grad()
def test_magnitude_of_a_channel_of_an_expert_is_that_of_its_own_weights(parent: LanguageModel) -> None:
    mixer: Any = parent.layers[3].mixer
    axes = {axis.name: axis for axis in parent.config.layers[3].axes()}
    scores = ByMagnitude(parent.config, parent.state_dict()).axis(3, axes["d_expert"], {})
    expected = mixer.up[4, :, 5].norm() ** 2 * mixer.down[4, 5].norm()
    assert scores[4 * 6 + 5] == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_scales_of_norms_make_up_for_the_mean_over_fewer_channels(
    run: RunFolder, found: Scores, parent: LanguageModel, batches: list[Batch]
) -> None:
    plan = Cutter.of(run, scores=found).plan({"d_model": 12, "M.n_heads": 2, "kv_rank": 8})
    assert Cutter.of(run, scores=found, norm_scales=False).plan({"d_model": 12}).norm_scales == {}
    x = torch.cat([stream(parent, batch)[-1] for batch in batches]).double()
    square = (x.square() / x.square().mean(-1, keepdim=True)).mean((0, 1))
    assert plan.d_model is not None
    assert plan.norm_scales["norm.weight"] == pytest.approx([float(square[list(plan.d_model)].mean() ** 0.5)], rel=1e-4)
    assert len(plan.norm_scales["layers.0.mixer.norm.weight"]) == 2  # a factor a group
    assert "layers.5.mixer.kv_norm.weight" in plan.norm_scales
    assert "layers.5.mixer.q_norm.weight" not in plan.norm_scales  # keeps all of its channels


@torch.no_grad()
def test_principal_axes_of_a_low_rank_latent_are_lossless(run: RunFolder) -> None:
    experiment, model = run.load_experiment(), load_model(run)
    mixer: Any = model.layers[3].mixer
    mixer.latent_down.weight.copy_(torch.randn(8, 3) @ torch.randn(3, 32) / 5)
    mixer.down.copy_(mixer.down @ torch.randn(8, 3) @ torch.randn(3, 8) / 5)
    batch = experiment.data.open(0).batch(0, 8)
    observer = Observer(model)
    observer.observe(batch)
    table = scoring.pd.DataFrame(list(scoring._table(observer)), columns=list(scoring.COLUMNS))
    scores = Scores(table, {"key": "", "parent": ""})
    whole = Plan.keep_all(model)
    order = ByScores(model.config, scores, "activation", "mse")
    with torch.no_grad():
        for principal, same in ((True, True), (False, False)):
            cutter = Cutter(whole, model.state_dict(), order, scores, norm_scales=False, principal=principal)
            child = cutter.child(cutter.plan({"d_latent": 3}))
            assert torch.allclose(child(batch.inputs), model(batch.inputs), atol=1e-4) == same


# Budgets


def test_candidates_are_all_children_of_the_free_sizes_that_meet_the_budget(run: RunFolder, found: Scores) -> None:
    cutter, setting = Cutter.of(run, scores=found), Setting(32)
    free = [free_size(cutter.model, text) for text in ("d_model=16:32:4", "d_ff=8:24:4", "depth=4:6")]
    target = 20_000
    chosen = candidates(cutter, {"params_active": target}, free, setting, 0.03)
    met = []
    for d_model, d_ff, depth in itertools.product(*(size.values for size in free)):
        child = cutter.plan({"d_model": d_model, "d_ff": d_ff}, 6 - depth).model()
        if max(ratio := child.cost(32).params_active / target, 1 / ratio) <= 1.03:
            met.append((d_model, d_ff, depth))
    assert met
    assert [tuple(each.sizes.values()) for each in chosen] == met


def test_free_sizes_end_with_the_parents_and_keep_groups_even(run: RunFolder) -> None:
    model = run.load_experiment().model
    assert free_size(model, "M.n_heads").values == (2, 4)
    assert free_size(model, "d_model").values[-1] == 32
    assert free_size(model, "n_heads").values == (2, 4)
    assert free_size(model, "depth").values == (3, 4, 5, 6)
    assert free_size(model, "d_ff=10:20:5").values == (10, 15, 20)
    assert free_size(model, "d_model=9:31:4").values == (12, 16, 20, 24, 28)
    assert free_size(model, "n_heads=1:9").values == (2, 4)
    assert free_size(model, "d_ff=20:99").values == (20, 21, 22, 23, 24)
    for text in ("d_model=33:40", "n_heads=3:3:1", "d_ff=x:y"):
        with pytest.raises(ValueError, match=r"^(free|d_model|n_heads)"):
            free_size(model, text)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"params_active": 1e9}, "params_active: must be above 0 and at most the parent's"),
        ({"params_active": 10.0}, "params_active: no child comes within 1.0% of 10; the nearest has"),
        ({"flops": 10.0}, "target: 'flops' is unknown"),
        ({}, "target: at least one is required"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(
    run: RunFolder, found: Scores, targets: dict[str, float], message: str
) -> None:
    cutter = Cutter.of(run, scores=found)
    with pytest.raises(ValueError, match=message):
        candidates(cutter, targets, [free_size(cutter.model, "d_ff")], Setting(32))


def test_the_cost_of_a_child_depends_on_dtypes_context_and_batch(run: RunFolder) -> None:
    from explore.cost import Dtypes
    from explore.roofline import Deployment, hardware

    model = run.load_experiment().model
    setting = Setting(1000, 4, Dtypes("float8", "bfloat16", "float32"), "A100")
    cost = model.cost(1000, weight_dtype="float8")
    assert measure("weight_bytes", model, setting) == cost.weight_bytes
    assert measure("memory_bytes", model, setting) == cost.weight_bytes + 4 * cost.state_bytes
    deployed = Deployment(model, hardware("A100"), setting.dtypes)
    assert measure("decode_s", model, setting) == deployed.decode_s(1000, 4)


def test_children_are_ranked_by_their_loss_on_validation(run: RunFolder, found: Scores) -> None:
    cutter, validation = Cutter.of(run, scores=found), Validation(run)
    free = [free_size(cutter.model, text) for text in ("d_ff=8:24:8", "depth=4:6")]
    chosen = candidates(cutter, {"params_active": 25_000}, free, Setting(32), 0.2)
    ranked = validation.rank(cutter, chosen[::-1])
    losses = [each.quality.val_loss for each in ranked]
    assert losses == sorted(losses)
    assert len(ranked) == len(chosen) > 1
    assert ranked[0].quality == validation.zero_shot(cutter.child(ranked[0].plan))
    forward = [each.quality.tokens * each.plan.model().cost(32).flops_fwd for each in ranked]
    assert [each.plan.flops for each in ranked] == pytest.approx([found.about["flops"] + sum(forward)] * len(ranked))
    assert cutter.plan({"d_ff": 8}).flops == found.about["flops"]
    result = run.result
    assert result is not None
    assert validation.zero_shot(cutter.child(cutter.whole)).val_bpb == pytest.approx(result["val_bpb"], rel=1e-6)


def test_cut_returns_a_plan_that_a_cutter_applies(run: RunFolder, found: Scores) -> None:
    assert cut(run, {"d_ff": 12}, [2], scores=found) == Cutter.of(run, scores=found).plan({"d_ff": 12}, [2])
