"""Makes one HTML page of one or more runs, which needs no server and no network.

    python -m sana_jax.report RUN --out=report.html
    python -m sana_jax.report RUN ANOTHER_RUN --out=report.html
    python -m sana_jax.report SWEEP --out=report.html --megabytes=20

RUN is the --workdir of a training, of text to image or of an autoencoder, and SWEEP is --out of
launch/sweep; every run in it or below gets a colour, and the seeds of a setting share one. A run
may be going on, or may have been killed: what it has written so far is shown. The page has

    curves       loss, held-out loss by noise level, images/s, MFU, waiting for data, and all other
                 columns of metrics.jsonl
    pictures     the sheets of the fixed prompts, with a slider over the steps
    metrics      held-out figures and those of evaluate by step, and which checkpoints there are
    config       the resolved config, and where it differs between the runs
    incidents    restarts, updates that were skipped, bad records, damaged files

Figures of evaluate are shown if its output is kept in RUN/evaluations/, as NAME_STEP.txt:

    mkdir -p RUN/evaluations
    python -m sana_jax.evaluate --task=shapes --checkpoint=RUN/model \\
        > RUN/evaluations/shapes_4000.txt

Pictures are shrunk until the page has --megabytes at most, and left out evenly where they are too
many for that; the page and the command then say how many.
"""

import sys

from absl import flags

from sana_jax.pictures import check_out
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

OPERANDS = "RUN ..."
_OUT = flags.DEFINE_string("out", None, "the .html file, replaced if it exists", required=True)
_SIZE = flags.DEFINE_float("megabytes", 5.0, "the most that the page may have", 0.1, 1000)


def main(argv):
    out = check_out(_OUT.value, ".html", "a page")

    from sana_jax.pages import page, report, runs  # jax: errors above need not wait for it

    try:
        content, notes = report.page(runs.find(argv[1:]), int(_SIZE.value * 10**6))
    except OSError as error:
        raise UserError(f"a run cannot be read: {error}") from None
    page.save(out, content)
    for note in notes:
        print(note, file=sys.stderr)
    print(out)


if __name__ == "__main__":
    cli.run(main, operands=OPERANDS)
