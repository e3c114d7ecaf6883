"""What must know of the made-up mixer, in a copy of the package that has its two files and its entry."""

import random

import optuna
import torch

from explore.bench.ops import op_calls
from explore.cost import diff, flops_train
from explore.figures import family_styles, receipts_table
from explore.model import ModelConfig
from explore.proof import check, random_model
from explore.roofline import Deployment, hardware
from explore.search.sizes import suggest_sizes
from explore.workbench import Workbench


def model(pattern, **blocks):
    return ModelConfig(d_model=64, vocab_size=100, pattern=pattern, blocks=blocks)


assert [model(pattern).family for pattern in ("T-", "T*", "T*E", "TM*E", "MT", "M*E", "TE")] == [
    "Toy + MLP",
    "Toy hybrid",
    "Toy hybrid MoE",
    "Mamba + Toy hybrid MoE",
    "Mamba + Toy + MLP",
    "hybrid MoE",
    "Toy MoE",
]
cases = list(check(model("T*TE-", E={"n_experts": 4, "top_k": 2, "d_expert": 8, "d_shared": 8}), 5))
assert [(case.expected, case.phase) for case in cases] == [(case.found, case.phase) for case in cases]
assert any("T" in random_model(random.Random(i)).pattern for i in range(20))
ledger = model("T*").ledger(16)
exact, megatron = flops_train(ledger, "exact"), flops_train(ledger, "megatron")
assert {line["component"]: line["difference"] for line in diff(ledger, "exact", "megatron")}["up"] == -3 * 2 * 64 * 128
table = receipts_table({"toy": model("TM*")}, 16, ["params_active"]).set_index("group")["value"]
assert table["toy projections"] == 64 * 128 + 64  # with the norm before the block
assert table["toy mix"] == 64 * 128
order = list(table.index)
assert order.index("Mamba-2 scan, state") < order.index("toy projections") < order.index("toy mix") < order.index("MLP")
bench = Workbench("T*", d_model=64)
assert {"letter": "T", "name": "toy mixer", "color": "#1a334c", "ink": "#fff"} in bench.view["letters"]
assert {"toy projections", "toy mix"} <= bench.readout["flops_by_group"].keys() & bench.offers["groups"].keys()
assert [s["values"] for s in bench.view["sliders"] if s["label"] == "d_toy"] == [[8, 16, 128, 256]]
trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
assert suggest_sizes(trial, "T", 96)["d_toy"] in (8, 16, 32)
assert list(trial.params) == ["toy_d_toy_log2"]
assert Deployment(model("T*"), hardware("H100")).decode_s(100, 1) > 0
assert "toy" in op_calls(64, 32, 16, torch.float32)
print(family_styles(["Toy hybrid", "Mamba + MLP", "attention LatentMoE", "MLP"]))
