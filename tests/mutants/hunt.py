"""Look for the first seed in which an invariant is broken: `python -m tests.mutants.hunt SEED,… [NUMBER…]`.

Prints the seed and the invariant, and exits with 1; with 0 where none is broken. Where invariants are given by their
numbers, others don't count: a mutant whose processes die of a bug of its own would teach nothing.
"""

import sys

from tests.simulation.verdict import judge

_, seeds, *wanted = sys.argv
for seed in map(int, seeds.split(",")):
    broken = judge(seed).invariant
    if broken and (not wanted or broken.partition(" ")[0] in wanted):
        sys.stdout.write(f"seed {seed}: {broken}\n")
        sys.exit(1)
