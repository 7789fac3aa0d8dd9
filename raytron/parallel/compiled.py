"""C files compiled for this machine at first use, kept in the user's cache folder and called through ctypes.

They compile in two seconds with any C compiler; an extension against torch's headers takes half a minute and has to be
built again for every version of torch. Callers have a way without: `load` gives None where nothing compiles.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["load"]

log = logging.getLogger(__name__)

_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def load(source: Path, purpose: str) -> ctypes.CDLL | None:
    """The compiled file; None where it cannot be compiled, which is said once.

    purpose: what is slow without it, for the message: "inference on the CPU".
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        log.warning("no C compiler: %s runs on torch alone, much slower; install gcc", purpose)
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, source)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or error
        log.warning("%s did not compile, %s runs on torch alone: %s", source.name, purpose, detail)
        return None


def _compiled(compiler: str, source: Path) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raytron"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    links = _torch_openmp()
    key = repr((source.read_text(), version, _FLAGS, links, _processor()))
    file = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may be compiling too
            made = Path(scratch) / file.name
            command = [compiler, *_FLAGS, "-o", str(made), str(source), *links, "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            made.replace(file)
    return file


def _torch_openmp() -> list[str]:
    """Torch's own OpenMP library, named before the system's: two would each keep threads spinning on the same cores."""
    root = Path(torch.__file__).parent
    found = sorted([*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")])
    return [str(found[0]), f"-Wl,-rpath,{found[0].parent}"] if found else []


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return platform.machine() + platform.processor() + "".join(sorted(set(facts)))
