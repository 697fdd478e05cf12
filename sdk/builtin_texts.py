"""Texts to measure with where nobody gave any: decoders continue prompts, encoder-decoders read sources."""

PROMPTS = (
    'def mean(values):\n    """Return the arithmetic mean of a sequence of numbers."""\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(description=__doc__)\n",
    "    def __repr__(self):\n"
    '        return f"{type(self).__name__}(name={self.name!r}, size={self.size!r})"\n'
    "\n    def __eq__(self, other):\n",
    "for path in sorted(folder.rglob('*.txt')):\n    with open(path, encoding='utf-8') as stream:\n"
    "        for number, line in enumerate(stream, 1):\n",
    "Once upon a time there was a lighthouse keeper who counted the ships that passed, and wrote their "
    "names down in a book. ",
)
SOURCES = (
    "Return the aritmetic mean of a sequnce of numbers.",
    "The function take a list of paths and return the one that was changed last .",
    "Once upon a time there was a lighthouse keeper who counted the ships that passed.",
    "If the the file does not exsist, a error is raised and and nothing is writen.",
)
