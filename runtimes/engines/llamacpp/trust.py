"""Whether this build's repacked-weight kernels can be trusted.

Some compilers build llama.cpp's AMX kernels so that any quantised batch of more than one row crashes the process.
The first time a quantisation scheme is opened with a given build, a subprocess decodes such batches; if it dies or its
rows disagree with each other, repacking is switched off for that build (slower, right). The verdict is kept in the
user's cache folder.

Run as a module this is the subprocess: `python -m skipstone.runtimes.engines.llamacpp.trust SEGMENT.gguf`.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import numpy as np

from skipstone.bundle import Bundle, GgufManifest, manifest_of
from skipstone.runtimes.user_cache import cache_folder

_NO_REPACKING = ("f32", "f16", "bf16")
_WIDTHS = (2, 8, 16, 33)
_TIMEOUT = 120.0


def repacking_is_safe(bundle: Bundle) -> bool:
    """True where batches on repacked weights were seen to work with this build and scheme."""
    from skipstone.runtimes.engines.llamacpp.library import build_identity

    scheme = bundle.manifest.quantization.scheme
    if scheme in _NO_REPACKING:
        return True
    shape = f"{bundle.manifest.model.hidden_size}"
    key = hashlib.sha256(f"{build_identity()} {scheme} {shape}".encode()).hexdigest()[:16]
    verdict = cache_folder() / "trust" / f"{key}.json"
    known = _read(verdict)
    if known is None:
        segments = manifest_of(bundle, GgufManifest).segments
        segment = min((bundle.file(s.file) for s in segments), key=lambda p: p.stat().st_size)
        known = _try_in_subprocess(segment)
        _write(verdict, known)
    return known


def _try_in_subprocess(segment: Path) -> bool:
    command = [
        sys.executable,
        "-m",
        __name__ if __name__ != "__main__" else "skipstone.runtimes.engines.llamacpp.trust",
    ]
    try:
        done = subprocess.run([*command, str(segment)], capture_output=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _read(verdict: Path) -> bool | None:
    try:
        return bool(json.loads(verdict.read_text())["safe"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(verdict: Path, safe: bool) -> None:
    """Keep the verdict; a cache that cannot be written only costs a second try."""
    try:
        verdict.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=verdict.parent, delete=False) as draft:
            json.dump({"safe": safe}, draft)
        Path(draft.name).replace(verdict)
    except OSError:
        return


def main(path: str) -> int:
    """Decode batches of several widths on repacked weights; 0 when every one gives finite rows."""
    from skipstone.runtimes.engines.llamacpp.cross import CrossLane
    from skipstone.runtimes.engines.llamacpp.lane import Lane, LaneOptions, Part

    options = LaneOptions(threads=1, max_width=max(_WIDTHS), max_branches=2, source_length=max(_WIDTHS))
    part = Part(Path(path), options)
    if part.has_encoder:
        lane: Lane = CrossLane(part, "logits", 64, options)
        cast("CrossLane", lane).take_in_anything(max(_WIDTHS))
    else:
        lane = Lane(part, "logits", 64, options)
    lane.embeddings[:] = np.random.default_rng(0).standard_normal(lane.embeddings.shape, np.float32)
    lane.flags[:] = 1
    lane.positions[:] = np.arange(len(lane.positions))
    for width in _WIDTHS:
        lane.clear()
        lane.decode(width)
        if not np.isfinite(lane.logits(width)).all():
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
