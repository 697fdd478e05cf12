"""Skipstone: layer-skip and staged speculative decoding for language models on devices.

    import skipstone

    model = skipstone.load("out/")
    print(model.generate("def quicksort(", max_new_tokens=64).text)

Importing this package, and running a GGUF bundle, never imports torch.
"""

from skipstone.api import export, load
from skipstone.errors import SkipstoneError

__all__ = ["SkipstoneError", "__version__", "export", "load"]

__version__ = "0.1.0"
