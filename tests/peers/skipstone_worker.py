"""Our strategies behind `serve`; the rows bear their names.

python -m tests.peers.skipstone_worker BUNDLE THREADS

Of an encoder-decoder the output ends with the text; a decoder goes on behind it, so that all generate as much.
"""

import sys
from importlib.metadata import version

from skipstone.benchmark.measure import StrategyRunner
from skipstone.benchmark.subject import Subject, new_policy
from skipstone.bundle import open_bundle
from skipstone.inputs import ModelInput
from skipstone.runtimes.engines import EngineOptions
from skipstone.runtimes.generate import GenerationLimits, Policy
from skipstone.runtimes.sampling import SamplingConfig
from skipstone.runtimes.strategies import StrategyOptions
from tests.peers.line_protocol import Answer, Generate, Request, serve


def start() -> tuple[Generate, dict[str, str]]:
    """Open the bundle."""
    manifest = (bundle := open_bundle(sys.argv[1])).manifest
    subject = Subject(bundle, EngineOptions(threads=int(sys.argv[2])))
    ends = () if manifest.model.encoder is None else manifest.model.eos_token_ids
    policies: dict[str, Policy] = {}

    def generate(request: Request) -> Answer:
        if request.fresh or request.row not in policies:
            policies[request.row] = new_policy(request.row, subject, None, StrategyOptions())
        limits = GenerationLimits(request.max_new_tokens, ends)
        run = StrategyRunner((subject,), policies[request.row], limits, SamplingConfig())
        sample = run(ModelInput(request.prompt, request.source))
        return Answer(sample.tokens, sample.first_seconds, sample.decode_seconds, sample.rounds)

    engine = {"gguf": "llama-cpp-python", "executorch": "executorch", "onnx": "onnxruntime"}[manifest.format]
    about = {name: version(name) for name in ("skipstone", engine)}
    return generate, about | {"exits": str(manifest.exits), "quantization": manifest.quantization.scheme}


if __name__ == "__main__":
    serve(start)
