"""Makes one HTML page of the pictures that `sample` wrote, which needs no server and no network.

    python -m sana_jax.gallery DIR --out=gallery.html
    python -m sana_jax.gallery DIR ANOTHER_DIR --out=both.html

DIR is --out of `sample`; its manifest.jsonl says what drew each picture. The page filters by words
of the prompt, by seed, and by every setting that varies. Of two folders or more, pictures of the
same prompt and seed stand side by side, and what differs between the folders stands above them.
A click enlarges a picture and shows all of its settings; the arrow keys go on to the next.

Pictures are shrunk until the page has --megabytes at most (exact copies where these fit), and the
first ones are shown where all are too many for that: the page and the command then say so. A link
leads to the picture itself, as long as the page and the folder lie where they are now.
"""

import sys

from absl import flags

from sana_jax.pictures import check_out
from sana_jax.runtime import cli

OPERANDS = "DIR ..."
_OUT = flags.DEFINE_string("out", None, "the .html file, replaced if it exists", required=True)
_SIZE = flags.DEFINE_float("megabytes", 5.0, "the most that the page may have", 0.1, 1000)


def main(argv):
    out = check_out(_OUT.value, ".html", "a page")

    from sana_jax.pages import gallery, page

    content, notes = gallery.page(argv[1:], out, int(_SIZE.value * 10**6))
    page.save(out, content)
    for note in notes:
        print(note, file=sys.stderr)
    print(out)


if __name__ == "__main__":
    cli.run(main, operands=OPERANDS)
