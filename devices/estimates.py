"""Cost curves of bundles that cannot run here, as the maker's compiler estimates them.

curve_of(Path("out/"))            # a bundle of --device ethos-u85: its cycles, as seconds
curve_of(Path("phone.json"))      # a file that was measured
"""

from __future__ import annotations

from pathlib import Path

from skipstone.bundle import Bundle, CostCurve, EthosUManifest, open_bundle
from skipstone.devices.curves import CurveKey, MeasuredCurve, check_widths, read_curve
from skipstone.devices.kept import artefacts_hash
from skipstone.errors import UsageError


def curve_of(path: Path, flag: str = "--curve") -> MeasuredCurve:
    """A curve file's content, or the estimates that a bundle's manifest holds.

    Raises:
        UsageError: a file that `read_curve` refuses, a bundle without estimates, or with too few widths to plan with.
    """
    if not path.is_dir():
        return read_curve(path, flag)
    bundle = open_bundle(path, verify_hashes=False)
    if not isinstance(bundle.manifest, EthosUManifest):
        raise UsageError(
            f"{flag} {path}: a bundle of format {bundle.manifest.format} holds no estimates of its time",
            hint="measure it with `skipstone bench DIR --curve-only --json FILE`",
        )
    found = estimated_curve(bundle, bundle.manifest)
    check_widths(found, path, flag, "export it with --widths 1 and at least one more")
    return found


def estimated_curve(bundle: Bundle, manifest: EthosUManifest) -> MeasuredCurve:
    """Every segment's estimated seconds by width; the last one's with the head, as where they are measured."""
    npu, last = manifest.npu, len(manifest.exits)
    segments = [[npu.seconds(f"segment_{index}", width) for width in npu.widths] for index in range(last + 1)]
    segments[last] = [
        seconds + npu.seconds("head", width)
        for seconds, width in zip(segments[last], npu.widths, strict=True)
    ]
    drafts = npu.draft_vocabulary is not None
    return MeasuredCurve(
        status="estimated",
        key=CurveKey(
            processor=npu.target,
            cores=1,
            system=f"{npu.system}, {npu.memory}",
            threads=1,
            threads_chosen=False,
            kv_type=manifest.quantization.scheme,
            gpu_layers=0,
            format=manifest.format,
            library=npu.compiler,
            artefacts=artefacts_hash(bundle),
        ),
        exits=(*manifest.exits, manifest.model.num_layers),
        curve=CostCurve(
            widths=npu.widths,
            segments=tuple(map(tuple, segments)),
            draft_head=tuple(npu.seconds("draft_head", width) for width in npu.widths) if drafts else (),
            threads=1,
            machine=f"{npu.target} at {npu.clock / 1e6:.0f} MHz, estimated by {npu.compiler}",
        ),
        budget_seconds=0.0,
        measured=manifest.provenance.created,
    )
