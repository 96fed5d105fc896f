"""What the GPU benchmarks have in common on the command line, and what they say of the machine."""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(description: str, name: str) -> argparse.Namespace:
    """Options of a benchmark called ``name``; ``until`` is when it starts nothing more."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--dtype", choices=tuple(TYPES), help="of the tables; default bfloat16")
    parser.add_argument("--only", help="regular expression: the cases to measure, by name")
    parser.add_argument("--minutes", type=float, default=7.0, help="start nothing after this")
    parser.add_argument("--output", type=Path, help="JSON; default bench/results/<device>.json")
    options = parser.parse_args()
    if options.device == "cpu":
        if not options.toy:
            parser.error("on a CPU the kernels run in Triton's interpreter: add --toy")
        if options.dtype == "bfloat16":
            parser.error("Triton's interpreter cannot do bfloat16: use float16 or float32")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here: --device cpu --toy shows whether it would run")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.until = time.monotonic() + 60 * options.minutes
    if options.output is None:
        device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
        words = f"{name} {device} {options.dtype}{' toy' * options.toy}".lower()
        file = re.sub(r"\W+", "-", words) + ".json"
        options.output = Path(__file__).parent / "results" / file
    return options


def describe(device: torch.device) -> dict[str, Any]:
    import triton

    machine: dict[str, Any] = {
        "device": platform.machine() + " CPU, Triton's interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["device"] = properties.name
        machine |= {
            "cuda": torch.version.cuda,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "clock MHz": getattr(properties, "clock_rate", 0) / 1e3 or None,
            "L2 bytes": properties.L2_cache_size,
            "memory bytes": properties.total_memory,
        }
    return machine
