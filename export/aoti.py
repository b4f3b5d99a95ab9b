"""AOTInductor: compiles a traced program to a library for one kind of machine, and runs it without Python code.

A .pt2 file holds machine code that is loaded into the process: only files whose digest the manifest knows are opened.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from export.manifest import INPUT, OUTPUTS, ArtefactError
from models.engines import Artefact, EngineError, first_line, open_package


def write_aoti(program: ExportedProgram, path: Path) -> tuple[Path, ...]:
    """Compiles; needs a C++ compiler, for a GPU also Triton. Takes minutes for a deep network.

    Raises:
        ArtefactError: The compiler is missing or failed.
    """
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except (RuntimeError, torch._inductor.exc.CppCompileError, torch._inductor.exc.InvalidCxxCompiler) as error:
        raise ArtefactError(
            f"AOTInductor could not compile {path.name} (is g++ there?): {first_line(error)}"
        ) from error
    return (path,)


def open_aoti(path: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function that runs the compiled program, on a device of the kind that it was compiled for.

    Raises:
        ArtefactError: The file is damaged or of another version of torch.
    """
    try:
        return open_package(Artefact(path, INPUT, OUTPUTS["lua"]), device)
    except EngineError as error:
        raise ArtefactError(str(error)) from error
