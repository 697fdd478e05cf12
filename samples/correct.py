"""Correct text with an encoder-decoder, a file as a whole or as you type; corrector/README.md says how.

python samples/correct.py DIR FILE
"""

import sys

from corrector.app import main

if __name__ == "__main__":
    sys.exit(main())
