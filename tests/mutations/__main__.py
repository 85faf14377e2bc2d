"""Mutates every file that the project reads, and reads it: never a traceback, a hang, or 1 GiB.

    python -m tests.mutations --inputs=all --count=5000 --seed=0
    python -m tests.mutations --inputs=model.pth --first=123 --count=1 --trace

Each mutated file is either read or refused in one line (UserError; Retry and BadImage where they
are documented). All else counts as failed: other exceptions, more than --seconds of computing, a
process that dies, 1 GiB of memory more than before. One line is printed for each kind of failure,
with the number that repeats it, and a table at the end. The exit status is 1 if anything failed.
"""

import argparse
import os
import sys

from tqdm import tqdm

from tests.mutations.inputs import INPUTS
from tests.mutations.run import SECONDS, SLOWER, mutations, table


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.mutations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"inputs: {', '.join(INPUTS)}",
    )
    parser.add_argument("--inputs", default="all", help="names with commas between them, or all")
    parser.add_argument(
        "--count",
        type=int,
        default=5000,
        help=f"mutations of each; of inputs that build networks 1 in {SLOWER}",
    )
    parser.add_argument("--first", type=int, default=0, help="the number of the first mutation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes that read")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one reading")
    parser.add_argument("--trace", action="store_true", help="print a traceback of each kind")
    parser.add_argument("--keep", metavar="DIR", help="write the files that failed to this folder")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    names = [*INPUTS] if args.inputs == "all" else args.inputs.split(",")
    if unknown := set(names) - set(INPUTS):
        parser.error(f"unknown inputs {', '.join(sorted(unknown))}; there are {', '.join(INPUTS)}")

    results, kinds = [], set()
    found = mutations(names, args.seed, args.first, args.count, args.jobs, args.seconds, args.keep)
    with tqdm(unit=" files", disable=None) as progress:
        for result in found:
            results.append(result)
            progress.update()
            progress.set_description(result.name, refresh=False)
            if result.how == "failed" and (result.name, result.kind) not in kinds:
                kinds.add((result.name, result.kind))
                progress.write(f"FAILED {result.name} --seed={args.seed} --first={result.number}:"
                               f" {result.why}")  # fmt: skip
                if args.trace:
                    progress.write(result.trace)
    print(table(results))
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
