"""Qualcomm's HTP compiler, by way of onnxruntime-qnn: graphs of fixed shapes → context binaries for one SoC.

Run in a process of its own (`skipstone.exporters.isolation`): the compiler may abort, and it writes to standard output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skipstone.errors import ExportError
from skipstone.runtimes.engines.onnxruntime.library import first_line, runtime
from skipstone.runtimes.engines.onnxruntime.qnn import NO_FALLBACK, add_provider

_SOC = re.compile(rb"soc_type=(\w+);arch=(\d+)")
_SILENT = 4


def compile_graphs(
    graphs: Sequence[Sequence[str]], soc_id: int, half: bool, share: bool
) -> list[dict[str, object]]:
    """Compile the graphs of one part.

    Args:
        graphs: of each, its file and the file of the compiled one, whose binary is put beside it.
        soc_id: of the SoC.
        half: compute in float16 what is not quantised.
        share: let all graphs share one binary, and the weights in it.

    Returns:
        Of each graph, the names of its binary, of the SoC and its architecture's number as the binary states them.

    Raises:
        ExportError: a graph that the NPU does not take from end to end; names the operators it refuses.
    """
    found = []
    for index, (source, target) in enumerate(graphs):
        config = {"ep.context_enable": "1", "ep.context_file_path": target, "ep.context_embed_mode": "0"}
        provider = {"soc_model": str(soc_id)}
        if half:
            provider["enable_htp_fp16_precision"] = "1"
        if share:
            config["ep.share_ep_contexts"] = "1"
            config["ep.stop_share_ep_contexts"] = "1" if index + 1 == len(graphs) else "0"
            provider["enable_htp_weight_sharing"] = "1"
        _compile(Path(source), config, provider)
        if not share or index + 1 == len(graphs):  # a shared binary is written by the last graph
            found += [_described(Path(path)) for _, path in (graphs if share else [(source, target)])]
    return found


def _compile(source: Path, config: Mapping[str, str], provider: Mapping[str, str]) -> None:
    try:
        runtime().InferenceSession(str(source), _options(config, provider, fallback=False))
    except Exception as error:
        refused = _refused(source, provider)
        if refused:
            raise ExportError(
                f"{source.name}: the NPU takes no {', '.join(refused)}",
                hint="the whole graph must run on it; use another --device for this architecture",
            ) from error
        raise ExportError(
            f"{source.name}: Qualcomm's compiler refuses it: {first_line(error)}",
            hint="try another --quantize or a shorter --context-length",
        ) from error


def _refused(source: Path, provider: Mapping[str, str]) -> list[str]:
    """Types of the operators that would fall to the CPU."""
    config = {"session.record_ep_graph_assignment_info": "1"}
    try:
        session = runtime().InferenceSession(str(source), _options(config, provider, fallback=True))
    except Exception:
        return []
    assigned = session.get_provider_graph_assignment_info()
    return sorted(
        {node.op_type for part in assigned if part.ep_name.startswith("CPU") for node in part.get_nodes()}
    )


def _options(config: Mapping[str, str], provider: Mapping[str, str], *, fallback: bool) -> Any:
    options = runtime().SessionOptions()
    options.log_severity_level = _SILENT
    for key, value in (config if fallback else {**config, **NO_FALLBACK}).items():
        options.add_session_config_entry(key, value)
    add_provider(options, provider)
    return options


def _described(compiled: Path) -> dict[str, object]:
    binary = binary_of(compiled)
    soc, arch = read_soc(binary)
    return {"binary": binary.name, "soc": soc, "arch": arch}


def binary_of(compiled: Path) -> Path:
    """The context binary that a compiled graph names.

    Raises:
        ExportError: it names none.
    """
    import onnx

    for node in onnx.load(compiled).graph.node:
        for attribute in node.attribute:
            if attribute.name == "ep_cache_context":
                return compiled.with_name(attribute.s.decode())
    raise ExportError(f"{compiled.name}: Qualcomm's compiler left no context binary")


def read_soc(binary: Path) -> tuple[str, int]:
    """Name of the SoC and its architecture's number, as a context binary states them.

    Raises:
        ExportError: it states none, or several.
    """
    found = set(_SOC.findall(binary.read_bytes()))
    if len(found) != 1:
        raise ExportError(f"{binary.name}: states {len(found)} SoCs, one was expected")
    ((name, arch),) = found
    return name.decode(), int(arch)
