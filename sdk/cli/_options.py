"""Flags that several commands share, each written once; a command gives the default and what it does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleFolder = Annotated[Path, typer.Argument(help="A bundle's folder.")]
ManifestJson = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")]

# Compression.
CompressionRecipe = Annotated[
    Path | None, typer.Option("--recipe", help="Recipe of compression (TOML): [[step]] tables.")
]
CompressionSteps = Annotated[
    list[str] | None,
    typer.Option(
        "--compress",
        help="A step of compression, say drop_layers:count=3,by=cosine; may be repeated: taken in order.",
    ),
]

# The engine.
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="one per core")]
ContextLength = Annotated[
    int | None, typer.Option(help="Positions to hold.", show_default="the model's, at most 2048")
]
KvType = Annotated[
    str | None,
    typer.Option(
        help="Type of K and V on llama.cpp: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl.",
        show_default="f16; f32 for f32 bundles",
    ),
]
Curve = Annotated[
    Path | None,
    typer.Option(
        help="Plan with the costs in this file, from bench --curve-only.", show_default="measured, then kept"
    ),
]
Place = Annotated[
    list[str] | None,
    typer.Option(
        help="SEGMENT=DIR: run a segment (0, or a range 1-2) on the engine of another bundle of this model; may be "
        "repeated. auto=DIR: as the measured costs have it; trace=FILE: and what this trace tells of acceptance."
    ),
]

# Sampling.
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this mass.")]
MinP = Annotated[float, typer.Option(help="Drop tokens under this share of the likeliest one.")]

# Speculation.
AssistantEarlyExit = Annotated[int | None, typer.Option(help="Exit to draft with.", show_default="the first")]
NumAssistantTokens = Annotated[
    int | None, typer.Option(help="Longest draft.", show_default="as far as it pays")
]
AssistantLaterExit = Annotated[
    int | None, typer.Option(help="Exit that judges the first one's drafts.", show_default="none")
]
DraftTree = Annotated[
    str | None,
    typer.Option(
        help="Tree that layerskip drafts every round: each node's parent, 0 being the text. From simulate --search.",
        show_default="a chain as long as it pays",
    ),
]
AssistantConfidenceThreshold = Annotated[
    float | None, typer.Option(help="Stop drafting under this probability.", show_default="0")
]
PromptLookupNumTokens = Annotated[
    int | None, typer.Option(help="Longest draft copied from the text.", show_default="10")
]
