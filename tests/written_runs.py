"""Records of runs that were never trained."""

from explore.files import write_json

KEY = "0123456789abcdef" * 4
RESULT = {
    "status": "finished", "reason": None, "step": 400, "tokens": 819200, "flops_run": 1.2e13, "val_bpb": 2.31,
    "val_loss": 5.1, "test_bpb": 2.29, "recall": None, "train_s": 21.0, "tokens_per_s": 39000.0, "max_violation": 0.4,
    "finished_at": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
COST = {
    "family": "hybrid LatentMoE", "params_total": 900_000, "params_active": 400_000, "flops_fwd": 4.9e6,
    "flops_train": 1.47e7, "kv_bytes_per_token": 512, "ssm_state_bytes": 65536.0, "ledger": [],
}  # fmt: skip


def experiment(key=KEY, pattern="ME|M*E/*E", **train):
    blocks = {
        "M": {"kind": "mamba2"},
        "*": {"kind": "attention"},
        "E": {"kind": "moe", "n_experts": 16, "top_k": 2, "d_latent": 32},
        "A": {"kind": "moe", "n_experts": 4, "top_k": 1, "d_latent": None},
    }
    model = {"d_model": 128, "vocab_size": 256, "pattern": pattern, "blocks": blocks}
    data = {"kind": "text", "corpus": "austen", "seq_len": 128}
    train = {"lr": 1e-3, "precision": "bf16", "tokens": 819_200, "flops": None, "batch_size": 16, **train}
    return {"key": key, "experiment": {"name": "a name", "model": model, "data": data, "train": train, "seed": 3}}


def make_run(root, name="run", key=KEY, result=RESULT, **parts):
    path = root / f"{name}-{key[:8]}"
    write_json(path / "experiment.json", experiment(key, **parts))
    write_json(path / "cost.json", COST)
    write_json(path / "trial.json", {"tuned": True})
    write_json(path / "environment.json", {"commit": "c0ffee", "device": "cpu", "versions": {}, "data": {}})
    (path / "metrics.csv").write_text("step,tokens,val_bpb\n100,1000,3.0\n200,2000,2.5\n")
    if result is not None:
        write_json(path / "result.json", result)
    return path
