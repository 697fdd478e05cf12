"""The shipped model, exported as a user would."""

from pathlib import Path

import numpy as np
import pytest

from skipstone.exporters.pipeline import export_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "agreement"), [("none", 1.0), ("q8_0", 0.95), ("q4_0", 0.8), ("q4_k_m", 0.8)]
)
def test_the_shipped_model_agrees_with_transformers(
    scheme: str, agreement: float, coder_checkpoint: Path, tmp_path: Path
) -> None:
    manifest = export_checkpoint(coder_checkpoint, tmp_path / "out", quantize=scheme).manifest
    assert manifest.parity.agreement_with_reference is not None
    assert manifest.parity.agreement_with_reference >= agreement
    assert all(segment.output == "nextn" for segment in manifest.segments[:-1])
    assert manifest.draft_head is not None
    tokens = np.fromfile(tmp_path / "out" / manifest.draft_head.vocabulary, "<i4")
    assert set(manifest.model.eos_token_ids) <= set(tokens.tolist())
