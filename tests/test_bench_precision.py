"""The bounds of emulated low precision: time and memory of a training step relative to bf16."""

from __future__ import annotations

from typing import Any

import pytest
from command_line import run

from explore.bench import compare_precisions, precision
from explore.bench.precision import MEMORY_RATIO, STEP_RATIOS
from explore.train import multiplies_bf16

FAMILY = "hybrid LatentMoE"


@pytest.mark.parametrize(
    ("times", "peaks", "holds"),
    [
        ({"fp8": 2.0, "nvfp4": 3.0}, {"fp8": 1.3, "nvfp4": 1.3}, {"fp8": True, "nvfp4": True}),
        ({"fp8": 2.1, "nvfp4": 2.1}, {"fp8": 1.0, "nvfp4": 1.0}, {"fp8": False, "nvfp4": True}),
        ({"fp8": 1.0, "nvfp4": 3.1}, {"fp8": 1.4, "nvfp4": 1.0}, {"fp8": False, "nvfp4": False}),
    ],
)
def test_a_record_holds_if_both_of_its_ratios_are_within_their_bounds(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: dict[str, float],
    peaks: dict[str, float],
    holds: dict[str, bool],
) -> None:
    def measured(**task: Any) -> dict[str, Any]:
        name = task["precision"]
        return {
            "tokens_per_s": 840.0 / times.get(name, 1.0),
            "peak_bytes": round(1e6 * peaks.get(name, 1.0)),
            "first_step_s": 1.0,
        }

    monkeypatch.setattr(precision, "in_a_process", measured)
    bf16, *records = compare_precisions("small", 1.0, [FAMILY])
    assert (bf16["step_bound"], bf16["memory_bound"], bf16["holds"]) == (None, None, True)
    assert {each["precision"]: each["holds"] for each in records} == holds
    assert {each["precision"]: (each["step_bound"], each["memory_bound"]) for each in records} == {
        "fp8": (2.0, 1.3),
        "nvfp4": (3.0, 1.3),
    }
    code, out, _ = run(capsys, monkeypatch, "bench", "--what", "precision", "--family", FAMILY)
    rows = {line.split()[2]: line.split() for line in out.splitlines() if line.startswith(FAMILY)}
    assert code == 0
    for name, each in holds.items():
        assert f"({STEP_RATIOS[name]:g})" in rows[name]
        assert f"({MEMORY_RATIO:g})" in rows[name]
        assert ("yes" if each else "no") in rows[name]
    assert not {"yes", "no"} & set(rows["bf16"])


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not multiplies_bf16(), reason="bf16 is slower than fp32 here, so no ratio to it means much")
def test_emulated_training_is_not_far_above_its_bounds_of_time() -> None:
    """At d_model 192. The margin is for processors that multiply bf16 much faster than fp32, and for busy machines.

    This family has the fewest regions to compile. It compiles none in bf16, so its memory would be compared with that
    of a compiler.
    """
    records = list(compare_precisions("small", 3.0, ["attention + MLP"]))
    assert [each["precision"] for each in records] == ["bf16", *STEP_RATIOS]
    assert [each for each in records[1:] if each["step_ratio"] > 1.5 * each["step_bound"]] == []
