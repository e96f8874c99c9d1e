"""Makes the embedded text: `python -m datamodules.sample.make_text`, with Python 3.11.

The topics of Python's own help, in the order of their names; other versions of Python give other texts.
"""

import lzma
import os
from pydoc_data.topics import topics

from datamodules.text import EMBEDDED_TEXT

LENGTH = 400_000


def main() -> None:
    """Writes the text next to this file."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()[:LENGTH]
    temporary = EMBEDDED_TEXT.with_suffix(".tmp")
    temporary.write_bytes(lzma.compress(text, preset=9))
    os.replace(temporary, EMBEDDED_TEXT)
    print(f"{EMBEDDED_TEXT}: {len(text):,} bytes of text in {EMBEDDED_TEXT.stat().st_size:,}")


if __name__ == "__main__":
    main()
