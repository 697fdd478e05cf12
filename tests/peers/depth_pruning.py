"""Take layers from a model that was trained with LayerSkip, and from its twin that was trained without.

    for twin in layerskip plain; do
        skipstone tune --from-config samples/recipes/coder.config.json --recipe samples/recipes/twin-$twin.toml \\
            --max-steps 400 --output twins/$twin; done
    python -m tests.peers.depth_pruning twins/layerskip twins/plain

Both saw the same text in the same order. What is left of each after as many layers are gone, by every rule of
`drop_layers` that chooses layers and without any recovery, is measured on text that neither saw. The table goes to
docs/benchmarks/depth-pruning.json.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from skipstone.benchmark.report import this_machine, write_json
from skipstone.exporters.compress.depth import DropLayers, Rule
from tests.peers.common import ROOT, command_line
from tests.peers.compression_search import Comparison, Settings

_DROPPED = (1, 2, 3, 4, 6, 8)
_RULES: tuple[Rule, ...] = ("top", "alternate", "cosine", "contribution")


@dataclass(frozen=True)
class Pruned:
    """A twin with fewer layers.

    Attributes:
        twin: folder's name.
        dropped: number of layers that are gone; 0: none.
        way: the rule, see `DropLayers.by`.
        layers: numbers of those layers.
        perplexity: on held-out text.
        kl: divergence from the same twin with all its layers, nats per token.
    """

    twin: str
    dropped: int
    way: str
    layers: list[int]
    perplexity: float
    kl: float


def prune(settings: Settings) -> Iterator[Pruned]:
    """One twin as it is, and by every rule at every depth."""
    comparison, twin = Comparison(settings), settings.checkpoint.name
    yield Pruned(twin, 0, "", [], comparison.dense(), 0.0)
    for count in _DROPPED:
        for way in _RULES:
            found = comparison.rule("drop", twin, way, DropLayers(count=count, by=way))
            yield Pruned(twin, count, way, found.step["dropped"], found.perplexity, found.kl)


def show(found: list[Pruned]) -> None:
    """Perplexity by rule and depth, every twin beside the other."""
    twins = list(dict.fromkeys(one.twin for one in found))
    table = Table("layers gone", "by", *twins, box=SIMPLE_HEAD)
    values = {(one.dropped, one.way, one.twin): one.perplexity for one in found}
    for dropped, way in dict.fromkeys((one.dropped, one.way) for one in found):
        table.add_row(str(dropped), way, *(f"{values[dropped, way, twin]:.2f}" for twin in twins))
    Console(width=100).print(table)


def main() -> None:
    """Prune, show and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    samples = ROOT / "samples"
    parser.add_argument("twins", type=Path, nargs="+")
    parser.add_argument("--calibration", type=Path, default=samples / "calibration" / "code.jsonl")
    parser.add_argument("--held-out", type=Path, default=samples / "prompts" / "held_out.jsonl")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "depth-pruning.json")
    given = parser.parse_args()
    found: list[Pruned] = []
    for twin in given.twins:
        settings = Settings(
            twin,
            given.calibration,
            given.held_out,
            0,
            given.tokens,
            given.held_out_tokens,
            0,
            [],
            None,
            given.output,
        )
        for one in prune(settings):
            print(one.twin, one.dropped, one.way, f"{one.perplexity:.2f}", flush=True)
            found.append(one)
    record = {
        "command": command_line(),
        "machine": asdict(this_machine()),
        "settings": {"tokens": given.tokens, "held_out_tokens": given.held_out_tokens},
        "outcomes": [asdict(one) for one in found],
    }
    write_json(given.output, record)
    show(found)


if __name__ == "__main__":
    main()
