"""AOTInductor: compiles a traced program to machine code for one kind of device, a .pt2 file."""

import platform
from pathlib import Path

import torch
from torch.export import ExportedProgram

from giantleap.export.manifest import ArtifactError
from giantleap.models.engines.base import first_line

# From `torch.backends.cpu.get_cpu_capability`, which the manifest compares, to the compiler's name.
_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


def instruction_set() -> dict[str, str]:
    """Inductor's option for the instruction set of the manifest.

    Without it code uses every instruction of this very processor and would crash on another one. Empty on other
    processor families, and for a torch before 2.13, which has no such option.
    """
    level = _LEVELS.get(torch.backends.cpu.get_cpu_capability())
    has_option = hasattr(torch._inductor.config.cpp, "march")
    return {"cpp.march": level} if level and has_option and platform.machine() == "x86_64" else {}


def write_aoti(program: ExportedProgram, path: Path) -> tuple[Path, ...]:
    """Compiles; needs a C++ compiler, for a GPU also Triton. Takes minutes for a deep network.

    Raises:
        ArtifactError: The compiler is missing or failed.
    """
    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=dict(instruction_set())
        )
    except (RuntimeError, torch._inductor.exc.CppCompileError, torch._inductor.exc.InvalidCxxCompiler) as error:
        raise ArtifactError(
            f"AOTInductor could not compile {path.name} (is g++ installed?): {first_line(error)}"
        ) from error
    return (path,)
