"""The device and precision of a run, and the description of the environment in its record."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from backdoorbench_moe.errors import ConfigError
from backdoorbench_moe.moe.precision import in_precision

RECORDED_PACKAGES = ("backdoorbench-moe", "torch", "torchvision", "timm", "kornia", "numpy", "scipy")


def resolve_device(name: str) -> torch.device:
    """Return a device by name.

    Args:
        name: "auto" (a GPU if there is one, otherwise the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ConfigError.expected("device", "auto, cpu, cuda or cuda:N", name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        available = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        raise ConfigError.expected("device", f"one of {['auto', 'cpu', *available]}", name) from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Return whether the hardware has bfloat16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public functions for this. If a build lacks the private ones, return False.
    functions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, function, lambda: False)() for function in functions)


def resolve_precision(name: str, device: torch.device) -> str:
    """Return "fp32" or "bf16"; "auto" means "bf16" if the hardware supports it (see `has_bf16`), else "fp32"."""
    return ("bf16" if has_bf16(device) else "fp32") if name == "auto" else name


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Compute in a precision, "fp32" or "bf16", inside the block.

    For training in bf16 on a CPU, fused attention kernels are disabled, because their backward pass takes more than
    twice as long there.
    """
    unfused = precision == "bf16" and device.type == "cpu" and torch.is_grad_enabled()
    with (
        in_precision(device, precision),
        sdpa_kernel(SDPBackend.MATH) if unfused else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Use deterministic kernels inside the block. CPU kernels are deterministic for a fixed number of threads."""
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
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the source tree of this package; None if it is not in a git repository."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
