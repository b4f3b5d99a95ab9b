"""AOTInductor: compiles a traced program to a library for one kind of machine, and runs it without Python code.

A .pt2 file holds machine code that is loaded into the process: only files whose digest the manifest knows are opened.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.manifest import ArtefactError


def write_aoti(program: ExportedProgram, path: Path) -> tuple[Path, ...]:
    """Compiles; needs a C++ compiler, for a GPU also Triton. Takes minutes for a deep network.

    Raises:
        ArtefactError: The compiler is missing or failed.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except (RuntimeError, torch._inductor.exc.CppCompileError, torch._inductor.exc.InvalidCxxCompiler) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise ArtefactError(f"AOTInductor could not compile {path.name} (is g++ there?): {reason}") from error
    return (path,)


def open_aoti(path: Path) -> Callable[[Tensor], Tensor]:
    """A function that runs the compiled program, on the device that it was compiled for.

    Raises:
        ArtefactError: The file is damaged or of another version of torch.
    """
    try:
        compiled = torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise ArtefactError(f"{path} cannot be loaded: {reason}") from error

    def run(latent: Tensor) -> Tensor:
        output: Tensor = compiled(latent)
        return output

    return run
