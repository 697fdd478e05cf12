"""Compare with transformers' self-speculation and prompt lookup, on the same f32 weights.

    python -m tests.peers.transformers_speculation

`assistant_early_exit` drafts with the first layers, as layerskip does; `prompt_lookup_num_tokens` copies from
the text. Greedy, end-of-text tokens ignored on both sides, each system in a process of its own.
"""

from tests.peers.common import compare_with_transformers, parse_settings

if __name__ == "__main__":
    compare_with_transformers(parse_settings("Compare with transformers.", "peers-transformers.json", "f32"))
