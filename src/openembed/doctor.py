"""What is installed here, what it can run on, and combinations known to break."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Any

REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "accelerate",
    "peft",
    "numpy",
    "scikit-learn",
    "pydantic",
    "bm25s",
    "PyStemmer",
    "pytrec-eval-terrier",
)
OPTIONAL = {
    "mteb": "benchmark tasks (pip install 'openembed[eval]')",
    "datasets": "training sources on the hub (pip install 'openembed[eval]')",
    "sentence-transformers": "opens what openembed saves",
    "flash-attn": "flash attention kernels of their own; torch's are used without it",
    "faiss-cpu": "approximate search",
}


def diagnose() -> dict[str, Any]:
    """Returns versions, devices, optional engines and problems as plain data."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("openembed", *REQUIRED)},
        "optional": {name: {"version": version(name), "for": purpose} for name, purpose in OPTIONAL.items()},
        "devices": devices(),
        "problems": problems({name: version(name) for name in (*REQUIRED, *OPTIONAL, "torchvision", "torchaudio")}),
    }


def version(package: str) -> str | None:
    """Returns the installed version of ``package``, None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, Any]:
    """Returns what torch can run on."""
    import torch

    from openembed.kernels.library import missing

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "onednn": torch.backends.mkldnn.is_available(),
            "kernels": missing() or "compiled",
        },
        "cuda": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "mps": torch.backends.mps.is_available(),
    }


def problems(versions: dict[str, str | None], requirements: Any = None) -> list[str]:
    """Returns a line for every combination known to break, saying what to do. ``versions`` maps package to version."""
    found = [f"{name} is missing; reinstall openembed" for name in REQUIRED if versions.get(name) is None]
    torch_version = versions.get("torch") or "0"
    for companion in ("torchvision", "torchaudio"):
        installed = versions.get(companion)
        if installed is not None:
            found.extend(_companion(companion, installed, torch_version, requirements or metadata.requires))
    if _number(versions.get("transformers")) < (5, 2):
        found.append(f"transformers {versions.get('transformers')} is too old: bidirectional decoders need 5.2 or newer")
    st = versions.get("sentence-transformers")
    if st is not None and _number(st) < (6,):
        found.append(f"sentence-transformers {st} cannot open what openembed saves; install 6 or newer")
    return found


def _companion(name: str, installed: str, torch_version: str, requirements: Any) -> list[str]:
    """A torchvision or torchaudio built for another torch makes ``import transformers`` fail in unrelated places."""
    found = []
    wanted = next((r for r in requirements(name) or [] if re.match(r"torch\s*==", r)), None)
    wanted_version = re.sub(r"^torch\s*==\s*([\w.]+).*", r"\1", wanted) if wanted else None
    base = torch_version.partition("+")[0]
    if wanted_version is not None and wanted_version != base:
        found.append(f"{name} {installed} was built for torch {wanted_version}, installed is {torch_version}")
    cpu_torch, cpu_companion = "+cpu" in torch_version, "+cpu" in installed
    if cpu_torch and not cpu_companion:
        found.append(f"{name} {installed} is a CUDA build beside the CPU build torch {torch_version}")
    advice = f"; uninstall {name} (openembed does not use it) or install the matching build"
    return [line + advice for line in found]


def _number(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", (text or "0").partition("+")[0])[:3])
