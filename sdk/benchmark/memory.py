"""Peak memory of a strategy: a fresh process opens the bundle, runs one prompt and tells its peak.

Run as a module this is that process: `python -m skipstone.benchmark.memory REQUEST`, REQUEST being JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from skipstone.errors import EngineError
from skipstone.inputs import ModelInput
from skipstone.runtimes.resident import own_peak_bytes


@dataclass(frozen=True)
class MemoryRequest:
    """What the process runs: a bundle with a strategy, or with `whole_gguf` a baseline.

    Attributes:
        strategy: of the bundle, or the baseline's name.
        prompt, source: token ids, see `skipstone.inputs.ModelInput`.
        place: see `skipstone.placing`.
    """

    bundle: str
    strategy: str
    prompt: tuple[int, ...]
    source: tuple[int, ...]
    max_new_tokens: int
    threads: int
    context_length: int
    kv_type: str | None = None
    assistant_model: str | None = None
    assistant_early_exit: int | None = None
    whole_gguf: str | None = None
    place: dict[int | str, str] | None = None


def peak_rss_mb(request: MemoryRequest) -> float:
    """Peak resident memory in MB (10^6 bytes) of a process that serves the request.

    Raises:
        EngineError: the process failed; shows what it wrote last.
    """
    command = [sys.executable, "-m", "skipstone.benchmark.memory", json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise EngineError(
            f"measuring the memory of {request.strategy}: exit status {done.returncode}: {last}",
            hint="pass --no-memory to leave it out",
        )
    return float(json.loads(done.stdout.strip().splitlines()[-1])["peak_rss_mb"])


def _serve(request: MemoryRequest) -> None:
    if request.whole_gguf is not None:
        from skipstone.benchmark.baselines import BASELINES, BaselineOptions

        options = BaselineOptions(
            Path(request.whole_gguf), request.threads, request.context_length, request.kv_type or "f16"
        )
        with closing(BASELINES[request.strategy](options, request.max_new_tokens, ())) as baseline:
            baseline(ModelInput(request.prompt))
        return
    from skipstone.model import load_model
    from skipstone.runtimes.strategies import StrategyOptions

    with load_model(
        request.bundle,
        context_length=request.context_length,
        threads=request.threads,
        kv_type=request.kv_type,
        place=request.place,
    ) as model:
        model.generate(
            None if request.source else request.prompt,
            source=request.source or None,
            max_new_tokens=request.max_new_tokens,
            strategy=request.strategy,
            options=StrategyOptions(assistant_early_exit=request.assistant_early_exit),
            assistant_model=request.assistant_model,
            ignore_eos=not request.source,
        )


def main(argument: str) -> int:
    """Serve one request and print this process's peak as JSON."""
    fields = json.loads(argument)
    _serve(MemoryRequest(**fields | {name: tuple(fields[name]) for name in ("prompt", "source")}))
    print(json.dumps({"peak_rss_mb": own_peak_bytes() / 1e6}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
