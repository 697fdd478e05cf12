"""What a model makes of held-out texts, beside the dense model: bundles by the engine that generates, checkpoints in
torch.

| module | holds |
|---|---|
| `readers` | logits of the last layer and the best tokens of every exit, of a bundle or of a checkpoint |
| `sums` | perplexity, divergence and agreement from these |
| `measure` | both over the windows of a text |
| `corrections` | what an encoder-decoder writes, and how far it is from what it should write |

An export takes its figures from here (`skipstone.exporters.quality`), and so does `skipstone evaluate`.
"""
