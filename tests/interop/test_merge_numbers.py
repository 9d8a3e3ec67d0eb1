"""Compares the small numeric functions that merging stands on with other implementations of them.

    python tests/interop/test_merge_numbers.py --build BUILD_DIR

    assignment   moec_assign, moec_assign_sparse    scipy.optimize.linear_sum_assignment: the same total

One function here and one topic of BUILD_DIR/tests/dump_numbers for each. Exit 0: nothing differs.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np
from scipy.optimize import linear_sum_assignment

import checks
from checks import check


def dump(a, topic, sizes, *arrays):
    """The lines that dump_numbers prints of the arrays, as lists of numbers."""
    with tempfile.NamedTemporaryFile(suffix=".f32") as f:
        for x in arrays:
            f.write(np.ascontiguousarray(x, np.float32).tobytes())
        f.flush()
        p = subprocess.run([os.path.join(a.build, "tests", "dump_numbers"), topic, *map(str, sizes), f.name], capture_output=True,
                           text=True)
    check(p.returncode == 0, f"dump_numbers {topic}: exit {p.returncode}: {p.stderr.strip()}")
    return [[float(v) for v in line.split()] for line in p.stdout.splitlines()]


def matrices(rng, n):
    """Profits [n,n] of several kinds, float32."""
    x, y, norm = rng.standard_normal((n, 24)), rng.standard_normal((n, 24)), np.exp(rng.standard_normal((n, 1)))
    yield "uniform", rng.random((n, n))
    yield "gaussian", rng.standard_normal((n, n))
    yield "inner products", x @ y.T
    yield "inner products, broad norms", (norm * x) @ (norm * y).T
    yield "inner products with a shuffled copy", x @ (x + 0.1 * y)[rng.permutation(n)].T
    yield "product of ranks", np.outer(np.arange(n), np.arange(n)) / n
    yield "integers to 1000", rng.integers(-1000, 1000, (n, n))
    yield "integers to 3", rng.integers(-3, 3, (n, n))


def total(profit, to):
    return profit.astype(np.float64)[np.arange(len(to)), to].sum()


def assignment(a, rng):
    worst = 0.0
    for n in (1, 2, 3, 17, 63, 64, 65, 128, 250, 512):
        for kind, profit in matrices(rng, n):
            profit = profit.astype(np.float32)
            to = np.array(dump(a, "assign", [n], profit)[0], int)
            check(sorted(to) == list(range(n)), f"assign {n}, {kind}: no permutation")
            rows, cols = linear_sum_assignment(profit.astype(np.float64), maximize=True)
            want, size = total(profit, cols), np.abs(profit.astype(np.float64)[rows, cols]).sum()
            worst = max(worst, abs(total(profit, to) - want) / max(size, 1e-300))
            exact = kind.startswith("integers")
            check(abs(total(profit, to) - want) <= (0 if exact else 1e-12 * size), f"assign {n}, {kind}: another total")
    print(f"assign: totals differ by {worst:.1e} at most")


def assignment_sparse(a, rng):
    """Against the whole matrix in which a pair that is none costs more than all others can gain."""
    for n, each in ((1, 1), (5, 2), (64, 1), (64, 3), (200, 8), (512, 16)):
        for kind, profit in matrices(rng, n):
            profit = profit.astype(np.float32)
            if each % 2:
                cols = np.sort(np.argsort(-profit, 1, kind="stable")[:, :each], 1)
            else:
                cols = np.sort(np.stack([rng.permutation(n)[:each] for _ in range(n)]), 1)
            listed = np.take_along_axis(profit, cols, 1)
            to = np.array(dump(a, "assign-sparse", [n, each], listed, cols)[0], int)
            check(sorted(to) == list(range(n)), f"assign-sparse {n}, {kind}: no permutation")
            whole = np.full((n, n), -(n + 1) * (np.ptp(listed.astype(np.float64)) + 1) + listed.min())
            np.put_along_axis(whole, cols, listed.astype(np.float64), 1)
            want = linear_sum_assignment(whole, maximize=True)[1]
            there = np.zeros((n, n), bool)
            np.put_along_axis(there, cols, True, 1)
            row = np.arange(n)
            check(there[row, to].sum() == there[row, want].sum(), f"assign-sparse {n}, {kind}: other number of rows")
            near = np.abs(listed.astype(np.float64)).sum() * 1e-9
            check(abs(whole[row, to][there[row, to]].sum() - whole[row, want][there[row, want]].sum()) <= near,
                  f"assign-sparse {n}, {kind}: another total")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    a = parser.parse_args()
    rng = np.random.default_rng(5)
    assignment(a, rng)
    assignment_sparse(a, rng)
    sys.exit(checks.failed != 0)


main()
