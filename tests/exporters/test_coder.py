"""The shipped model, exported as a user would."""

import numpy as np
import pytest

from skipstone.bundle import open_bundle
from tests.conftest import Export


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "agreement"), [("none", 1.0), ("q8_0", 0.95), ("q4_0", 0.8), ("q4_k_m", 0.8)]
)
def test_the_shipped_model_agrees_with_transformers(
    scheme: str, agreement: float, export_coder: Export
) -> None:
    folder = export_coder(scheme)
    manifest = open_bundle(folder).manifest
    assert manifest.parity.agreement_with_reference is not None
    assert manifest.parity.agreement_with_reference >= agreement
    assert all(segment.output == "nextn" for segment in manifest.segments[:-1])
    assert manifest.draft_head is not None
    tokens = np.fromfile(folder / manifest.draft_head.vocabulary, "<i4")
    assert set(manifest.model.eos_token_ids) <= set(tokens.tolist())
