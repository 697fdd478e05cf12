"""The bundle: a folder with a manifest, a tokenizer and the artefacts of one exported model.

    >>> from skipstone.bundle import open_bundle
    >>> bundle = open_bundle("out/")            # checks the schema, every path, size and hash
    >>> bundle.manifest.exits
    (2, 4, 6)

Nothing here imports torch or an engine; a bundle holds no pickles.
"""

from skipstone.bundle.calibration import Calibration, Knob, Risk
from skipstone.bundle.compression import Compression, CompressionStep, ExitAgreement, Fidelity, ModelSize
from skipstone.bundle.coreml import PACKAGE_INTERFACE, FunctionEntry, PackageEntry
from skipstone.bundle.ethosu import NPU_INTERFACE, NpuEntry, NpuProgramEntry
from skipstone.bundle.fixed import FixedShapes, PieceEntry, part_names
from skipstone.bundle.folder import (
    Bundle,
    bundle_in_progress,
    describe_file,
    hash_file,
    manifest_of,
    open_bundle,
    read_manifest,
    store_calibration,
    write_manifest,
)
from skipstone.bundle.graphs import (
    GRAPH_INTERFACE,
    SOURCE_GRAPH_INTERFACE,
    GraphEntry,
    GraphsEntry,
    TableEntry,
    past_names,
    present_names,
)
from skipstone.bundle.manifest import (
    MANIFEST_NAME,
    PROGRAM_INTERFACE,
    SCHEMA_VERSION,
    SOURCE_PROGRAM_INTERFACE,
    CoreMlManifest,
    CostCurve,
    DraftHeadEntry,
    EmbeddingEntry,
    EncoderFacts,
    EncoderSegmentEntry,
    EthosUManifest,
    ExecuTorchManifest,
    FileEntry,
    GgufManifest,
    Manifest,
    MethodEntry,
    ModelFacts,
    OnnxManifest,
    Parity,
    ProgramEntry,
    Provenance,
    Quality,
    Quantization,
    SegmentEntry,
)
from skipstone.bundle.qnn import QnnEntry, SharedEntry

__all__ = [
    "GRAPH_INTERFACE",
    "MANIFEST_NAME",
    "NPU_INTERFACE",
    "PACKAGE_INTERFACE",
    "PROGRAM_INTERFACE",
    "SCHEMA_VERSION",
    "SOURCE_GRAPH_INTERFACE",
    "SOURCE_PROGRAM_INTERFACE",
    "Bundle",
    "Calibration",
    "Compression",
    "CompressionStep",
    "CoreMlManifest",
    "CostCurve",
    "DraftHeadEntry",
    "EmbeddingEntry",
    "EncoderFacts",
    "EncoderSegmentEntry",
    "EthosUManifest",
    "ExecuTorchManifest",
    "ExitAgreement",
    "Fidelity",
    "FileEntry",
    "FixedShapes",
    "FunctionEntry",
    "GgufManifest",
    "GraphEntry",
    "GraphsEntry",
    "Knob",
    "Manifest",
    "MethodEntry",
    "ModelFacts",
    "ModelSize",
    "NpuEntry",
    "NpuProgramEntry",
    "OnnxManifest",
    "PackageEntry",
    "Parity",
    "PieceEntry",
    "ProgramEntry",
    "Provenance",
    "QnnEntry",
    "Quality",
    "Quantization",
    "Risk",
    "SegmentEntry",
    "SharedEntry",
    "TableEntry",
    "bundle_in_progress",
    "describe_file",
    "hash_file",
    "manifest_of",
    "open_bundle",
    "part_names",
    "past_names",
    "present_names",
    "read_manifest",
    "store_calibration",
    "write_manifest",
]
