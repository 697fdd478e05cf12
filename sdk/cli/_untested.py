"""What is known of an artefact that the machine which exported it could not run."""

from __future__ import annotations

from skipstone.bundle import CoreMlManifest, EthosUManifest, ExecuTorchManifest, Manifest, OnnxManifest

_MISSING = "the exporting machine does not have it, so there was no self-test"


def untested(manifest: Manifest) -> list[str]:
    """Lines for people; of use where the manifest has no parity figures."""
    if isinstance(manifest, OnnxManifest):
        return [f"made for {manifest.graphs.target}, not run: {_MISSING}"]
    if isinstance(manifest, CoreMlManifest):
        package = manifest.package
        apart = sum(function.weight_bytes for function in package.functions)
        return [
            f"compiled for {package.target}, not run: {_MISSING}",
            f"checked: {len(package.functions)} functions share {package.stored_bytes / 1e6:.1f} MB of weights, apart "
            f"they would hold {apart / 1e6:.1f}; computed in "
            f"float16, the best token is the checkpoint's at {package.agreement:.0%} of positions",
        ]
    if isinstance(manifest, EthosUManifest):
        npu = manifest.npu
        row = sum(
            npu.seconds(each.part, 1)
            for each in npu.programs
            if each.width == 1 and each.part != "draft_head"
        )
        return [
            f"compiled for {npu.target} by {npu.compiler}, not run: {_MISSING}",
            f"estimated: {row * 1e3:.2f} ms for a token by itself" if row else "no program for one row",
            f"on TOSA's reference model the best token is the checkpoint's at {npu.agreement:.0%} of positions",
        ]
    if not isinstance(manifest, ExecuTorchManifest):
        return ["not run where it was exported: no self-test"]
    program = manifest.program
    shares = ", ".join(f"{method.name} {method.delegated:.0%}" for method in program.methods)
    return [
        f"compiled for {program.target}, not run: {_MISSING}",
        f"checked: the program opens and holds all methods; operators on {program.target}: {shares}",
    ]
