"""Where and how precisely a run computes, and what the record says about it."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from backdoorbench_moe.errors import ConfigError

RECORDED_PACKAGES = ("backdoorbench-moe", "torch", "torchvision", "timm", "kornia", "numpy", "scipy")


def resolve_device(name: str) -> torch.device:
    """ "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". Raises ConfigError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ConfigError.expected("device", "auto, cpu, cuda or cuda:N", name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        raise ConfigError.expected("device", f"one of {['auto', 'cpu', *there]}", name) from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this yet; a build without the private one answers no.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, question, lambda: False)() for question in questions)


def resolve_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 where the hardware has it, else fp32."""
    return ("bf16" if has_bf16(device) else "fp32") if name == "auto" else name


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The autocast context of a resolved precision.

    In training in bf16 on a CPU, attention takes its plain form: the backward pass of the fused one takes more than
    twice as long there.
    """
    halved = precision == "bf16"
    plain = halved and device.type == "cpu" and torch.is_grad_enabled()
    with (
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=halved),
        sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Choose deterministic kernels inside the block. The CPU's are, for a fixed number of threads."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def environment(
    device: torch.device,
    precision: str,
    plugins: Mapping[str, str] | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Versions, hardware, precision and git commit, for the record.

    Args:
        device: The device.
        precision: "fp32" or "bf16".
        plugins: Versions of the third-party packages that the run uses.
        sources: Hashes of their code.
    """
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {**{name: version(name) for name in RECORDED_PACKAGES}, **(plugins or {})},
        "sources": dict(sources or {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Commit of the source tree this package runs from; None where it is installed elsewhere."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
