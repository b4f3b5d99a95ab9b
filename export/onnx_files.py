"""ONNX: writes a traced program as a graph file that other engines can read."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from giantleap.export.manifest import INPUT, ArtifactError, Precision
from giantleap.models.engines.base import first_line
from giantleap.models.messages import install_hint

# 20 is the first with Gelu, 22 the first whose Conv takes bfloat16.
OPSETS: dict[Precision, int] = {"fp32": 20, "fp16": 20, "bf16": 22}
INLINE_LIMIT_BYTES = 64 * 2**20  # larger weights go to a file beside the graph; an ONNX file is limited to 2 GiB
# Control flow and scattered writes are slow or missing in engines, and a sign of a wrong trace.
REFUSED_OPERATORS = frozenset(
    {"If", "Loop", "Scan", "NonZero", "ScatterND", "ScatterElements", "Scatter", "SequenceConstruct", "Unique"}
)


def write_onnx(
    program: ExportedProgram,
    path: Path,
    output: str,
    precision: Precision = "fp32",
    inline_limit_bytes: int = INLINE_LIMIT_BYTES,
) -> tuple[Path, ...]:
    """Write a program of one input and one output as a graph, and check the graph.

    Args:
        program: From `giantleap.export.graphs.trace`.
        path: Target; large weights go to `path` + ".data".
        output: Name of the output.
        precision: Of the program; it decides the operator set.
        inline_limit_bytes: Larger weights go to a file beside the graph.

    Returns:
        The files written, the graph first.

    Raises:
        ArtifactError: A package is missing, an operator has no translation, or the graph breaks a rule of
            `check_graph`.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ArtifactError(f"{error.name} is missing: {install_hint('cpu')}") from error
    size_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
    # The exporter traces the program again and needs the attention kernel of `trace`.
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        try:
            converted = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=[INPUT],
                output_names=[output],
                opset_version=OPSETS[precision],
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ArtifactError(f"no ONNX graph could be made: {str(error).splitlines()[0]}") from error
        if converted is None:
            raise ArtifactError("no ONNX graph could be made: the exporter returned nothing")
        converted.save(str(path), external_data=size_bytes > inline_limit_bytes)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path.name} is no valid ONNX graph: {first_line(error)}") from error
    check_graph(onnx.load(str(path), load_external_data=False).graph, path.name)
    data = path.with_name(path.name + ".data")
    return (path, data) if data.exists() else (path,)


def check_graph(graph: Any, name: str) -> None:
    """Reject a graph with an operator of `REFUSED_OPERATORS`, or with a constant batch or side.

    Raises:
        ArtifactError: It names the operator or the shape.
    """
    refused = {node.op_type for node in graph.node} & REFUSED_OPERATORS
    if refused:
        raise ArtifactError(f"{name} holds the operators {', '.join(sorted(refused))}, which engines support poorly")
    for value in (*graph.input, *graph.output):
        sizes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if len(sizes) != 4 or any(isinstance(sizes[axis], int) for axis in (0, 2, 3)):
            raise ArtifactError(f"{name}: {value.name} has the shape {sizes}; batch, height and width must be dynamic")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which prints progress, logs every rewrite and warns about unused packages."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
