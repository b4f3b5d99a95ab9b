"""AOTInductor: compiles a traced program to a library for one kind of machine, and runs it without Python code.

A .pt2 file holds machine code that is loaded into the process: only files whose digest the manifest knows are opened.
"""

import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from giantleap.export.manifest import INPUT, OUTPUTS, ArtifactError
from giantleap.models.engines.base import Artifact, EngineError, first_line, open_package

# What `torch.backends.cpu.get_cpu_capability` says, which the manifest compares, as compilers name it.
_LEVELS = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


def instruction_set() -> dict[str, str]:
    """Inductor's option for the instructions that the manifest tells of, in place of all that this very processor has,
    which would end a process on another.

    Empty on other processors, and for a torch before 2.13, which has no such option: what they compile is for
    processors like this one.
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
            f"AOTInductor could not compile {path.name} (is g++ there?): {first_line(error)}"
        ) from error
    return (path,)


def open_aoti(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that runs the compiled program, on a device of the kind that it was compiled for.

    Raises:
        ArtifactError: The file is damaged or of another version of torch.
    """
    try:
        return open_package(Artifact(path, INPUT, OUTPUTS["lua"]), device)
    except EngineError as error:
        raise ArtifactError(str(error)) from error
