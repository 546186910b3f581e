"""Check and time the CUDA kernels, and featurizing, on the GPU at hand.

``python benchmarks/gpu.py [--json FILE]`` prints tables and ends with an error if a
kernel is wrong. ``--interpret`` goes through the same steps with the smallest sizes in
triton's interpreter, on a CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import DTYPES, FULL, SMOKE, Clock, Sizes, check, random, time_kernels
from speed_models import SUBJECTS, forward_backward

from trak import TRAKer
from trak._kernels import triton_backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="smallest sizes, CPU")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    arguments = parser.parse_args()
    device = choose(interpret=arguments.interpret)
    sizes = SMOKE if arguments.interpret else FULL
    clock = Clock(device, sizes.repeats)
    found: dict[str, Any] = {"machine": machine(device)}
    ceilings = found["ceilings"] = measure_ceilings(device, sizes, clock)
    found["errors"] = list(show(check(device, sizes)))
    found["kernels"] = list(show(time_kernels(device, sizes, clock, ceilings)))
    found["featurize"] = list(show(time_featurizing(device, sizes, clock)))
    if arguments.interpret:
        print("\nInterpreted on a CPU: the times above mean nothing.")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1))
    wrong = [x for x in found["errors"] if any(v is False for v in x.values())]
    if wrong:
        sys.exit(f"{len(wrong)} of {len(found['errors'])} results are wrong")


def choose(*, interpret: bool) -> torch.device:
    """Return the device, or end with what is missing."""
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        device = torch.device("cpu")
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        sys.exit(
            f"There is nothing to measure: torch {torch.__version__} finds no CUDA "
            f"device. --interpret checks the kernels, slowly, on the CPU."
        )
    reason = triton_backend.unavailable(device)
    if reason is not None:
        sys.exit(f"There is nothing to measure: {reason}")
    return device


def machine(device: torch.device) -> dict[str, str]:
    """Print and return what everything below depends on."""
    facts = {
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": str(card.multi_processor_count),
            "memory": f"{card.total_memory / 2**30:.0f} GiB",
            "CUDA of torch": str(torch.version.cuda),
        }
    for name, value in facts.items():
        print(f"{name}: {value}")
    return facts


def measure_ceilings(
    device: torch.device, sizes: Sizes, clock: Clock
) -> dict[str, float]:
    """Measure what no kernel can exceed: bytes moved and products, a second."""
    source = torch.randint(256, (sizes.copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved = 2 * sizes.copied / clock(lambda _: target.copy_(source)) / 1e6
    ceilings = {"GB/s copied, read and written": moved}
    del source, target
    for name, dtype in DTYPES.items():
        a, b = random((2, sizes.side, sizes.side), dtype, device)
        took = clock(lambda _, a=a, b=b: a @ b)
        ceilings[f"TFLOP/s {name}"] = 2 * sizes.side**3 / took / 1e9
    print("\nceilings, measured: ", end="")
    print(", ".join(f"{value:.0f} {name}" for name, value in ceilings.items()))
    return ceilings


def time_featurizing(
    device: torch.device, sizes: Sizes, clock: Clock
) -> Iterator[dict[str, Any]]:
    """Time `TRAKer.featurize` against one plain forward and backward pass."""
    print("\nfeaturizing, proj_dim=2048; the floor is a forward and backward pass")
    for subject in sizes.subjects:
        for name in ("fp32", "bf16"):
            yield {"model": subject, "dtype": name, "b": sizes.batch} | featurizing(
                subject, DTYPES[name], device, sizes, clock
            )


def featurizing(
    subject: str, dtype: torch.dtype, device: torch.device, sizes: Sizes, clock: Clock
) -> dict[str, Any]:
    model = SUBJECTS[subject].make().to(device, dtype).eval()
    generator = torch.Generator().manual_seed(0)
    batch = tuple(
        part.to(device, dtype if part.is_floating_point() else part.dtype)
        for part in SUBJECTS[subject].batch(sizes.batch, generator)
    )
    floor, floor_bytes = peak(
        device, lambda: clock(lambda _: forward_backward(model, subject, batch))
    )
    model.zero_grad(set_to_none=True)
    calls = 3 + clock.repeats
    with tempfile.TemporaryDirectory() as directory:
        traker = TRAKer(
            model=model,
            task=SUBJECTS[subject].task,
            train_set_size=sizes.batch * calls,
            save_dir=directory,
            device=device,
            proj_dim=2048,
            use_half_precision=False,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        took, took_bytes = peak(
            device,
            lambda: clock(
                lambda _: traker.featurize(batch=batch, num_samples=sizes.batch)
            ),
        )
    return {
        "floor ms": floor,
        "featurize ms": took,
        "ratio": took / floor,
        "floor MiB": floor_bytes / 2**20,
        "featurize MiB": took_bytes / 2**20,
    }


def peak(device: torch.device, call: Callable[[], float]) -> tuple[float, float]:
    """Return a call's result and the most bytes that tensors held during it."""
    if device.type != "cuda":
        return call(), math.nan
    torch.cuda.reset_peak_memory_stats(device)
    return call(), torch.cuda.max_memory_allocated(device)


def show(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Print lines as they come."""
    for line in lines:
        print("  ".join(f"{name}={shown(value)}" for name, value in line.items()))
        yield line


def shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
