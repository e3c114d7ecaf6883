"""End-to-end training on a GPU, compared with transformers and with the GPU's peak; `kernels/gpu.sh` runs it.

python -m explore.bench.gpu FOLDER --within 500
python -m explore.bench.gpu FOLDER --rehearse
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from explore.bench.families import GPU_SHAPES, REHEARSAL_SHAPES, Shape, families
from explore.bench.training import in_a_process
from explore.formatting import flops, size
from explore.roofline import GPUS, measured

SIDES = ("ours", "transformers")


def time_gpu(
    shapes: Mapping[str, Shape], seconds: float, device: str, peak: float, within: float
) -> Iterator[dict[str, Any]]:
    """Trains every family at every shape in bf16, ours and transformers' in turn.

    Args:
        seconds: duration of each measurement, after compilation.
        peak: FLOP/s of bf16 products: the published rate of the device, or the measured one if unknown.
        within: seconds within which measurements may begin; later ones are skipped with an error in their record.

    Yields:
        Records of family, shape, side, mamba_ssm (whether that package imports), and tokens_per_s, mfu (training FLOPs
        in the exact convention over the peak), peak_bytes, n_steps and ops, or an error.
    """
    began = time.perf_counter()
    for shape, sizes in shapes.items():
        for family, model in families(sizes.d_model).items():
            flops_train = model.cost(sizes.seq_len).flops_train
            for side in SIDES:
                record: dict[str, Any] = {"family": family, "shape": shape, **sizes._asdict(), "side": side}
                record["mamba_ssm"] = importlib.util.find_spec("mamba_ssm") is not None
                if time.perf_counter() - began > within:
                    yield record | {"error": "left out: no time was left"}
                    continue
                task: dict[str, Any] = {
                    "family": family,
                    "shape": shape,
                    "side": side,
                    "seconds": seconds,
                    "device": device,
                }
                try:
                    found = in_a_process(what="end_to_end", **task)
                except ValueError as error:  # usually too little memory
                    yield record | {"error": str(error)}
                    continue
                yield record | found | {"mfu": flops_train * found["tokens_per_s"] / peak}


def table(records: Sequence[Mapping[str, Any]], title: str) -> str:
    """A Markdown table with a row for each family and shape."""
    lines = [
        title,
        "",
        "| family | d_model | batch | tokens/s | transformers | ratio | MFU | transformers | memory | transformers |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    pairs: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        pairs.setdefault((record["family"], record["d_model"]), {})[record["side"]] = record
    for (family, d_model), sides in pairs.items():
        ours, theirs = (sides.get(side, {}) for side in SIDES)
        speeds = [each.get("tokens_per_s") for each in (ours, theirs)]
        ratio = f"{speeds[0] / speeds[1]:.2f}" if speeds[0] and speeds[1] else "-"
        cells = [
            family,
            str(d_model),
            f"{ours['batch_size']} x {ours['seq_len']}",
            *(f"{speed:,.0f}" if speed else "-" for speed in speeds),
            ratio,
            *(f"{each['mfu']:.1%}" if "mfu" in each else "-" for each in (ours, theirs)),
            *(size(each.get("peak_bytes")) for each in (ours, theirs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = [record for record in records if "error" in record]
    lines += ["", *(f"- {each['family']}, {each['shape']}, {each['side']}: {each['error']}" for each in failed)]
    return "\n".join(lines).rstrip() + "\n"


def published_peak(name: str) -> float | None:
    """FLOP/s of bf16 products in a device's datasheet, by torch's name of the device; None if unknown."""
    return next((GPUS[gpu].peak("bfloat16") for gpu in GPUS if gpu in name), None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script; returns 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where training.md and training.jsonl are written")
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of each measurement")
    parser.add_argument("--within", type=float, default=500.0, help="seconds within which measurements may begin")
    parser.add_argument("--rehearse", action="store_true", help="train small models on the CPU instead")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu: no CUDA device to time; --rehearse trains small models on the CPU", file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    name = "CPU, a rehearsal" if options.rehearse else torch.cuda.get_device_name()
    reached = measured().peak("bfloat16")
    published = None if options.rehearse else published_peak(name)
    peak = published or reached
    title = (
        f"{name}, torch {torch.__version__}: bf16, AdamW included. Products of large matrices reach {flops(reached)} "
        f"FLOP/s; MFU is of {flops(peak)} FLOP/s, the {'published' if published else 'measured'} rate."
    )
    options.folder.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    shapes = REHEARSAL_SHAPES if options.rehearse else GPU_SHAPES
    for record in time_gpu(shapes, options.seconds, device, peak, options.within):
        records.append(record)
        outcome = record.get("error") or f"{record['tokens_per_s']:,.0f} tokens/s, MFU {record['mfu']:.1%}"
        print(f"{record['family']}, {record['shape']}, {record['side']}: {outcome}", flush=True)
        # After each measurement, so that results remain if the time runs out.
        (options.folder / "training.md").write_text(table(records, title), encoding="utf-8")
        with (options.folder / "training.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"device": name}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
