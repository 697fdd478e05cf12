"""Our strategies behind `serve`; the rows bear their names.

python -m tests.peers.skipstone_worker BUNDLE THREADS

Of an encoder-decoder the output ends with the text; a decoder goes on behind it, so that all generate as much.

While the other system has its turn this process sleeps, and on some machines the threads of llama.cpp, which spin
while they wait for each other, come to lie on one core when it goes on: a token then takes thirty times as long, for a
while. So every turn begins with untimed plain decoding until a token takes about what it took at the start, or for some
seconds.
"""

import sys
import time
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

_AWAKE = 1.5  # times the seconds of a plain token at the start
_LONGEST_WAKING = 5.0
_FEW = GenerationLimits(16)


def wake(subject: Subject, given: ModelInput) -> None:
    """Decode plainly until it is about as fast as it was at the start, or for some seconds."""
    run = StrategyRunner(
        (subject,), new_policy("plain", subject, None, StrategyOptions()), _FEW, SamplingConfig()
    )
    began = time.perf_counter()
    while time.perf_counter() - began < _LONGEST_WAKING:
        seconds = run(given).seconds_per_token
        if seconds is None or seconds < _AWAKE * subject.costs.plain:
            return


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
        given = ModelInput(request.prompt, request.source)
        wake(subject, given)
        sample = run(given)
        return Answer(sample.tokens, sample.first_seconds, sample.decode_seconds, sample.rounds)

    engine = {"gguf": "llama-cpp-python", "executorch": "executorch", "onnx": "onnxruntime"}[manifest.format]
    about = {name: version(name) for name in ("skipstone", engine)}
    return generate, about | {"exits": str(manifest.exits), "quantization": manifest.quantization.scheme}


if __name__ == "__main__":
    serve(start)
