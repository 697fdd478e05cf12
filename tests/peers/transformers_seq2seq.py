"""Compare an encoder-decoder with transformers' own generation, on the same f32 weights.

    python -m tests.peers.transformers_seq2seq

`prompt_lookup_num_tokens` copies from what the decoder wrote; `assistant_model` drafts with the same model, its decoder
cut at the first exit. Greedy, every output up to its end, each system in a process of its own.
"""

from tests.peers.common import compare_with_transformers, parse_settings

OURS = ("plain", "aggressive", "staged", "auto")

if __name__ == "__main__":
    compare_with_transformers(
        parse_settings(
            "Compare with transformers.",
            "peers-transformers-seq2seq.json",
            "f32",
            model="speller",
            prompts="speller_held_out.jsonl",
        ),
        OURS,
    )
