"""Linear assignment against scipy.optimize.linear_sum_assignment on the same matrices in the same run; alignment of wide experts.

    python tests/bench/bench_align.py --build BUILD_DIR [--width I] [--repeat N] [--wide] [--out DIR]

Matrices: canonical profits (align.h) of two random SwiGLU experts, the same with neurons of broad lengths, and of an expert with
a shuffled, noisy copy. Process CPU seconds of one thread, medians. scipy gets float64, the conversion is not timed. --wide: also
moec_align_weights at 6400 and 14336 neurons of 256 inputs, dense and by candidates, some minutes.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from scipy.optimize import linear_sum_assignment

HIDDEN = 2048


def canonical_profits(a, b):
    return a[0] @ b[0].T + np.abs(a[1] @ b[1].T + a[2] @ b[2].T)


def cases(width):
    rng = np.random.default_rng(1)
    make = lambda: [rng.standard_normal((width, HIDDEN), np.float32) * 0.02 for _ in range(3)]
    a, b, length = make(), make(), np.exp(rng.standard_normal((width, 1), np.float32))
    copy = [(x + 0.01 * rng.standard_normal(x.shape, np.float32)) for x in a]
    order = rng.permutation(width)
    yield "two random experts", canonical_profits(a, b)
    yield "the same, broad lengths", canonical_profits([length * x for x in a], [length * x for x in b])
    yield "a shuffled, noisy copy", canonical_profits(a, [x[order] for x in copy])


def ours(a, *words):
    p = subprocess.run([os.path.join(a.build, "bench", "align"), *map(str, words)], check=True, capture_output=True, text=True)
    took, value, memory = p.stdout.split()
    return float(took), float(value), int(memory)


def scipys(profit, repeat):
    took = []
    for _ in range(repeat):
        start = time.process_time()
        rows, cols = linear_sum_assignment(profit, maximize=True)
        took.append(time.process_time() - start)
    return statistics.median(took), profit[rows, cols].sum()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--width", type=int, default=1408)
    ap.add_argument("--repeat", type=int, default=3)
    ap.add_argument("--wide", action="store_true")
    ap.add_argument("--out", help="folder for one matrix")
    a = ap.parse_args()
    slower = 0
    print(f"| I = {a.width} | moec_assign, s | scipy, s | times | memory beside the matrix |\n|---|---|---|---|---|")
    for name, profit in cases(a.width):
        with tempfile.NamedTemporaryFile(dir=a.out) as f:
            f.write(profit.tobytes())
            f.flush()
            took, total, memory = ours(a, "matrix", a.width, a.repeat, f.name)
        theirs, want = scipys(profit.astype(np.float64), a.repeat)
        slower += took > theirs
        if abs(total - want) > 1e-9 * abs(want):
            sys.exit(f"{name}: total {total}, scipy {want}")
        print(f"| {name} | {took:.4f} | {theirs:.4f} | {theirs / took:.1f} | {memory / 1e6:.1f} MB |")
    if a.wide:
        print("\n| moec_align_weights, 256 inputs | lengths | profits | s | fit | memory |\n|---|---|---|---|---|---|")
        for width in (6400, 14336):
            for lengths in ("even", "broad"):
                for candidates in (0, 64):
                    took, fit, memory = ours(a, "experts", width, 256, candidates, lengths)
                    print(f"| {width} | {lengths} | {candidates or 'all'} | {took:.1f} | {fit:.4f} | {memory / 1e6:.0f} MB |")
    return slower > 0


if __name__ == "__main__":
    sys.exit(main())
