"""Our plain decoding behind `serve`.

python -m tests.peers.skipstone_worker BUNDLE THREADS MAX_NEW_TOKENS
"""

import sys
from importlib.metadata import version

from tests.peers.line_protocol import Answer, Generate, serve


def start() -> tuple[Generate, dict[str, str]]:
    """Open the bundle."""
    import skipstone

    bundle, threads, max_new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = skipstone.load(bundle, threads=threads)

    def generate(prompt: list[int]) -> Answer:
        model.session.rewind(0)  # nothing of an earlier run with this prompt is used
        result = model.generate(prompt, max_new_tokens=max_new_tokens, strategy="plain", ignore_eos=True)
        first = result.stats.time_to_first_token
        return Answer(result.tokens, first, result.stats.seconds - first)

    packages = ("skipstone", "executorch", "transformers", "torch")
    about = {name: version(name) for name in packages}
    return generate, about | {"exits": str(model.bundle.manifest.exits)}


if __name__ == "__main__":
    serve(start)
