"""Compares the choice of widths under a budget with scipy's solvers (HiGHS), on random problems.

    python tests/interop/test_lp.py --build BUILD_DIR

Costs against scipy.optimize.milp, bounds against its LP relaxation, with and without rows; that a problem is infeasible for both.
Exit 0: nothing differs.
"""
import argparse
import os
import subprocess
import sys

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

import checks
from checks import check

ENOFIT = 8


class Problem:
    """Groups of options with sizes and costs; rows: (least, options)."""

    def __init__(self, first, size, cost, budget, rows):
        self.first, self.size, self.cost, self.budget, self.rows = first, size, cost, budget, rows

    def text(self):
        out = [f"{len(self.first) - 1} {len(self.rows)} {self.budget}"]
        for lo, hi in zip(self.first, self.first[1:]):
            out.append(f"{hi - lo} " + " ".join(f"{s} {c!r}" for s, c in zip(self.size[lo:hi].tolist(), self.cost[lo:hi].tolist())))
        out += [f"{least} {len(options)} " + " ".join(map(str, options)) for least, options in self.rows]
        return "\n".join(out) + "\n"

    def matrices(self):
        groups = np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))
        n = len(self.size)
        one = csr_matrix((np.ones(n), (groups, np.arange(n))))
        cover = csr_matrix((len(self.rows), n)).tolil()
        for r, (_, options) in enumerate(self.rows):
            cover[r, options] = 1
        return one, csr_matrix(self.size.astype(float)[None, :]), csr_matrix(cover), np.array([least for least, _ in self.rows])

    def milp(self):
        one, size, cover, least = self.matrices()
        limits = [LinearConstraint(one, 1, 1), LinearConstraint(size, -np.inf, self.budget)]
        if self.rows:
            limits.append(LinearConstraint(cover, least, np.inf))
        r = milp(self.cost, constraints=limits, integrality=np.ones(len(self.cost)), bounds=Bounds(0, 1),
                 options={"mip_rel_gap": 1e-9, "time_limit": 60})
        return r.fun if r.status == 0 else None

    def relaxation(self):
        one, size, cover, least = self.matrices()
        a = np.vstack([size.toarray(), -cover.toarray()]) if self.rows else size
        b = np.concatenate([[self.budget], -least]) if self.rows else [self.budget]
        r = linprog(self.cost, A_ub=a, b_ub=b, A_eq=one, b_eq=np.ones(one.shape[0]), bounds=(0, 1), method="highs")
        return r.fun if r.status == 0 else None


def pmq(rng, layers, experts, widths, bits, vary, rows):
    """Errors as of `layers` x `experts` experts, sizes of their own or not, PMQ's two rows for each layer or none."""
    groups = layers * experts
    unit = rng.integers(52, 129, groups) if vary else np.ones(groups, dtype=np.int64)
    size = (unit[:, None] * np.arange(1, widths + 1)).ravel()
    cost = (np.exp(rng.normal(0, 1.5, (groups, 1))) * rng.uniform(0.8, 1.2, (groups, widths)) *
            rng.uniform(2, 6, (groups, 1)) ** -np.arange(widths)).ravel()
    first = np.arange(groups + 1) * widths
    cover = [(1, [int(first[g]) + b for g in range(lo * experts, (lo + 1) * experts)]) for lo in range(layers) for b in (1, 2)]
    return Problem(first, size, cost, int(bits * unit.sum()), cover if rows else [])


def bytes_of(rng, groups, bits):
    """Matrices of two kinds whose bytes at 2, 3, 4 and 8 bits differ, as gate/up and down projections' do."""
    width = np.array([2, 3, 4, 8])
    down = np.arange(groups) % 3 == 2
    size = (width * 768 + np.where(down[:, None], [96, 1120, 224, 352], 160)).ravel()
    cost = (np.exp(rng.normal(0, 1.5, (groups, 1))) * rng.uniform(0.9, 1.1, (groups, 4)) *
            rng.uniform(3, 5, (groups, 1)) ** -(width - 2.0)).ravel()
    return Problem(np.arange(groups + 1) * 4, size, cost, int(bits * 768 * groups) + 400 * groups, [])


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--build", required=True)
    build = a.parse_args().build
    rng = np.random.default_rng(1)
    problems = []
    for i in range(60):
        problems.append(pmq(rng, 1 + i % 4, (8, 16, 32)[i % 3], 3 + i % 2, rng.uniform(0.95, 3.0), i % 2 == 1, i % 5 < 3))
    problems += [pmq(rng, 4, 64, 4, bits, vary, rows) for bits in (1.1, 2.2, 3.1) for vary in (False, True) for rows in (False, True)]
    problems += [bytes_of(rng, groups, bits) for groups in (12, 24) for bits in (2.0, 2.2, 2.6, 3.0, 3.7)]
    p = subprocess.run([os.path.join(build, "tests", "dump_lp")], input="".join(x.text() for x in problems), capture_output=True, text=True)
    lines = p.stdout.splitlines()
    check(p.returncode == 0 and len(lines) == len(problems), f"dump_lp: exit {p.returncode}, {len(lines)} lines: {p.stderr}")
    worst, infeasible = 0.0, 0
    for i, (x, line) in enumerate(zip(problems, lines)):
        status, cost, bound, size, proven, *pick = line.split()
        cost, bound, pick = float(cost), float(bound), [int(v) for v in pick]
        best = x.milp()
        if best is None:
            infeasible += 1
            check(int(status) == ENOFIT, f"{i}: status {status} where HiGHS finds nothing")
            continue
        check(status == "0" and proven == "1", f"{i}: status {status}, proven {proven}")
        check(abs(x.cost[pick].sum() - cost) <= 1e-12 * cost and x.size[pick].sum() == int(size) <= x.budget, f"{i}: the picks' sums")
        check(all(len(set(pick) & set(options)) >= least for least, options in x.rows), f"{i}: rows")
        # both stop at a gap: HiGHS at what its tolerances see, here from 2000 nodes on at 1e-6
        check(abs(cost - best) <= 1e-6 * best, f"{i}: cost {cost!r}, HiGHS {best!r}")
        worst = max(worst, abs(cost - best) / best)
        relaxed = x.relaxation()
        check(bound >= relaxed - 1e-9 * relaxed and bound <= best + 1e-7 * best, f"{i}: bound {bound!r} of {relaxed!r} to {best!r}")
        if not x.rows and np.gcd.reduce(np.diff(np.sort(x.size))) == 1 and len(x.size) > 0:
            check(abs(bound - relaxed) <= 1e-9 * relaxed, f"{i}: bound {bound!r}, LP of HiGHS {relaxed!r}")
    print(f"{len(problems)} problems, {infeasible} infeasible, largest difference {worst:.1e}")
    sys.exit(1 if checks.failed else 0)


main()
