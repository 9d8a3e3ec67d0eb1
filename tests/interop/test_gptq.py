"""Compares GPTQ with an implementation of its own in numpy, in float64 and in the published form.

    python tests/interop/test_gptq.py --build BUILD_DIR

The published form (Frantar et al., arXiv:2210.17323, section 3): the upper Cholesky factor U of the inverse of H; columns in order,
and the error of each over U_ii times row i of U is taken from those behind it. Here with the scales that BUILD_DIR/tests/dump_gptq
found, by groups of neighbouring columns. Rounding is not continuous: where a value lies within 1e-4 of a step of the middle between
two codes, float32 may choose the other one, so such rows are not compared with numpy's codes (they are counted; few there are) and
all losses are also computed from the codes that came back. Exit 0: nothing differs.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np

import checks
from checks import check

CLOSE = 1e-4


class Case:
    def __init__(self, name, w, h, bits, group, zeros=False, kind="F32", how="clip", damp=0.01, order=True):
        self.name, self.w, self.h = name, np.ascontiguousarray(w, np.float32), np.ascontiguousarray(h, np.float64)
        self.bits, self.group, self.zeros, self.kind, self.how, self.damp, self.order = bits, group, zeros, kind, how, damp, order

    def __str__(self):
        return f"{self.name}, {self.w.shape}, {self.bits} bits, group {self.group}, zeros {self.zeros}, order {self.order}, {self.how}"


def ours(a, c, sweeps, compute="f32"):
    rows, cols = c.w.shape
    with tempfile.TemporaryDirectory() as d:
        with open(os.path.join(d, "in"), "wb") as f:
            f.write(c.w.tobytes() + c.h.tobytes())
        words = (rows, cols, c.bits, c.group, int(c.zeros), c.kind, c.how, c.damp, int(c.order), sweeps, compute, f"{d}/in", f"{d}/out")
        p = subprocess.run([os.path.join(a.build, "tests", "dump_gptq"), *map(str, words)], capture_output=True, text=True)
        if p.returncode:
            sys.exit(f"FAIL: {c}: dump_gptq: exit {p.returncode}: {p.stderr.strip()}")
        data, at, groups = open(os.path.join(d, "out"), "rb").read(), 0, cols // c.group

        def take(kind, n):
            nonlocal at
            x = np.frombuffer(data, kind, rows * n, at).reshape(rows, n)
            at += x.nbytes
            return x
        found, left = take(np.float32, groups), take(np.float32, groups)
        middle = np.full((rows, groups), 2.0 ** (c.bits - 1) if c.bits > 1 else 0.5)
        zero = take(np.uint8, groups).astype(np.float64) if c.zeros else middle
        return dict(zip(("loss", "nearest", "again"), map(float, p.stdout.split()))), found, left, zero, take(np.uint8, cols)


def row_losses(d, h):
    return np.einsum("ri,ij,rj->r", d, h, d)


def wide(x, group):
    return np.repeat(x.astype(np.float64), group, 1)


def nearest(v, s, z, top):
    """Codes, and by how much of a step the nearest border between two of them is missed."""
    t = np.clip(v / s + z, 0, top)
    return np.rint(t), np.abs(t - np.floor(t) - 0.5)


def values(code, s, z):
    """W' as a client computes it, in float32."""
    return (s.astype(np.float32) * (code - z).astype(np.float32)).astype(np.float64)


def gptq(c, s, z):
    """Codes [rows,cols] and the margin of each row."""
    w, n, top = c.w.astype(np.float64), c.w.shape[1], 2 ** c.bits - 1
    diag = np.diag(c.h)
    if diag.max() <= 0:
        h = np.eye(n)
    else:
        h = c.h + np.diag(np.maximum(1e-6 * diag.max() - diag, 0) + c.damp * diag.mean())
    p = np.argsort(-diag, kind="stable") if c.order else np.arange(n)
    upper = np.linalg.cholesky(np.linalg.inv(h[np.ix_(p, p)])).T
    v, s, z, margin = w[:, p].copy(), s[:, p], z[:, p], np.full(len(w), np.inf)
    code = np.zeros_like(v)
    for i in range(n):
        code[:, i], miss = nearest(v[:, i], s[:, i], z[:, i], top)
        margin = np.minimum(margin, miss)
        error = (v[:, i] - values(code[:, i], s[:, i], z[:, i])) / upper[i, i]
        v[:, i:] -= np.outer(error, upper[i, i:])
    out = np.zeros_like(code)
    out[:, p] = code
    return out, margin


def close(a, b, size=0.0, tolerance=1e-6):
    return abs(a - b) <= tolerance * max(abs(b), size)


def reported(d, c):
    """What moec_gptq_round says of a loss is by float32 and of the damped one (gptq.h): ten times that, as 1e-6 is asked below."""
    diag = np.diag(c.h)
    return 10 * ((d @ c.h * d).sum() + (d ** 2 * (np.maximum(1e-6 * diag.max() - diag, 0) + c.damp * diag.mean())).sum())


def compare(a, c, seen):
    loss, found, left, zero, code = ours(a, c, 0)
    top, w = 2 ** c.bits - 1, c.w.astype(np.float64)
    s, z = wide(found, c.group), wide(zero, c.group)
    check((found == left).all(), f"{c}: scales change without sweeps")
    plain = nearest(c.w, s.astype(np.float32), z.astype(np.float32), np.float32(top))[0].astype(np.float64)
    by_nearest = row_losses(w - values(plain, s, z), c.h)
    theirs, margin = gptq(c, s, z)
    by_gptq = row_losses(w - values(theirs, s, z), c.h)
    got = row_losses(w - values(code, s, z), c.h)
    size = 1e-9 * row_losses(w, np.diag(np.diag(c.h))).sum()
    tolerance = reported(w - values(code, s, z), c)
    check(close(loss["loss"], got.sum(), tolerance), f"{c}: loss {loss['loss']:.9g}, of its codes {got.sum():.9g}")
    check(close(loss["again"], got.sum(), size, 1e-9), f"{c}: moec_gptq_loss {loss['again']:.12g}, numpy {got.sum():.12g}")
    check(close(loss["nearest"], by_nearest.sum(), reported(w - values(plain, s, z), c)),
          f"{c}: nearest {loss['nearest']:.9g}, numpy {by_nearest.sum():.9g}")
    want = np.minimum(by_gptq, by_nearest)
    clear = (margin > CLOSE) & ((theirs == plain).all(1) | (np.abs(by_gptq - by_nearest) > 1e-4 * by_nearest))
    best = np.where((by_gptq < by_nearest)[:, None], theirs, plain)
    check((code[clear] == best[clear]).all(), f"{c}: other codes in {(code[clear] != best[clear]).any(1).sum()} of {clear.sum()} rows")
    check(close(got[clear].sum(), want[clear].sum(), size), f"{c}: loss {got[clear].sum():.9g}, numpy {want[clear].sum():.9g}")
    if clear.all():
        check(close(loss["again"], want.sum(), size), f"{c}: loss {loss['again']:.9g}, numpy {want.sum():.9g}")
    seen[0] += len(clear)
    seen[1] += clear.sum()
    seen[2] += clear.all()
    for sweeps in (1, 3):
        swept, _, left, zero, code = ours(a, c, sweeps)
        check(swept["again"] <= loss["again"] + 1e-7 * tolerance,
              f"{c}: {sweeps} sweeps raise the loss from {loss['again']:.9g} to {swept['again']:.9g}")
        check(swept["nearest"] == loss["nearest"], f"{c}: {sweeps} sweeps change what is said of rounding to nearest")
        d = w - values(code, wide(left, c.group), wide(zero, c.group))
        check(close(swept["loss"], row_losses(d, c.h).sum(), reported(d, c)), f"{c}: {sweeps} sweeps: loss {swept['loss']:.9g}, "
              f"of its codes {row_losses(d, c.h).sum():.9g}")
        check(close(swept["again"], row_losses(d, c.h).sum(), size), f"{c}: {sweeps} sweeps: moec_gptq_loss {swept['again']:.9g}")
        if c.kind == "F16":
            check((left == left.astype(np.float16)).all(), f"{c}: scales are no F16")
        loss["swept"] = swept["loss"]
    return loss


def compare_bf16(a, c):
    """Products in bfloat16: what is said of the loss holds to a thousandth, and the codes are as good as those of float32 and of numpy."""
    w = c.w.astype(np.float64)
    got = {}
    for compute in ("f32", "bf16"):
        for sweeps in (0, 2):
            loss, found, left, zero, code = ours(a, c, sweeps, compute)
            exact = row_losses(w - values(code, wide(left, c.group), wide(zero, c.group)), c.h).sum()
            check(close(loss["loss"], exact, tolerance=1e-3), f"{c}: {compute}, {sweeps} sweeps: loss {loss['loss']:.6g}, of its codes {exact:.6g}")
            got[compute, sweeps] = exact
    s, z = wide(found, c.group), wide(zero, c.group)
    got["numpy"] = row_losses(w - values(gptq(c, s, z)[0], s, z), c.h).sum()
    for sweeps in (0, 2):
        check(got["bf16", sweeps] <= 1.005 * got["f32", sweeps], f"{c}: {sweeps} sweeps: bf16 {got['bf16', sweeps]:.6g}, f32 {got['f32', sweeps]:.6g}")
    check(got["bf16", 0] <= 1.005 * got["numpy"], f"{c}: bf16 {got['bf16', 0]:.6g}, numpy {got['numpy']:.6g}")
    print(f"{c.name}, {c.bits} bits, loss over numpy's:", ", ".join(f"{k[0]}, {k[1]} sweeps {v / got['numpy']:.5f}" for k, v in got.items() if k != "numpy"))


def hessian(rng, n, tokens, spread=1.0):
    mix = rng.standard_normal((n, n)) / np.sqrt(n) + np.eye(n)
    x = rng.standard_normal((tokens, n)) @ mix * np.exp(spread * rng.standard_normal(n))
    return x.T @ x


def cases(rng):
    for bits in (2, 3, 4, 8):
        for order in (True, False):
            for zeros in (False, True):
                w = rng.standard_normal((24, 64))
                yield Case("many tokens", w, hessian(rng, 64, 500), bits, 16, zeros, "F16", "weighted", order=order)
                yield Case("few tokens", w, hessian(rng, 64, 9), bits, 32, zeros, "BF16", order=order)
        w = 0.02 * rng.standard_normal((20, 96))
        yield Case("one token", w, hessian(rng, 96, 1), bits, 32)
        yield Case("no tokens", w, np.zeros((96, 96)), bits, 32)
        h = hessian(rng, 96, 300)
        h[5:40] = h[:, 5:40] = 0
        yield Case("dead columns", w, h, bits, 96, how="weighted")
        yield Case("minmax", w, hessian(rng, 96, 300), bits, 48, how="minmax")
        yield Case("much damping", w, hessian(rng, 96, 30), bits, 48, damp=5.0)
        yield Case("one column", rng.standard_normal((40, 1)), np.array([[3.0]]), bits, 1)
        yield Case("groups of one column", rng.standard_normal((17, 12)), hessian(rng, 12, 40), bits, 1)
        yield Case("one row", rng.standard_normal((1, 320)), hessian(rng, 320, 900, 0.3), bits, 320)
        yield Case("one row, narrow groups", rng.standard_normal((3, 288)), hessian(rng, 288, 100, 0.3), bits, 32, True)
    yield Case("one bit", rng.standard_normal((24, 64)), hessian(rng, 64, 500), 1, 16)
    yield Case("large values", 1e8 * rng.standard_normal((24, 64)), 1e12 * hessian(rng, 64, 500), 4, 16)
    yield Case("small values", 1e-8 * rng.standard_normal((24, 64)), 1e-12 * hessian(rng, 64, 500), 4, 16)
    w = rng.standard_normal((8, 640))
    yield Case("wide", w, hessian(rng, 640, 1500, 0.3), 4, 64)
    yield Case("wide, few tokens", w, hessian(rng, 640, 200, 0.3), 4, 64)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    a = ap.parse_args()
    seen, n = [0, 0, 0], 0
    for c in cases(np.random.default_rng(7)):
        loss = compare(a, c, seen)
        n += 1
        if c.name in ("many tokens", "few tokens") and not c.zeros and c.order:
            print(f"{c.name}, {c.bits} bits: nearest {loss['nearest']:.4g}, GPTQ {loss['loss']:.4g}, 3 sweeps {loss['swept']:.4g}")
    rng = np.random.default_rng(8)
    for bits in (2, 4):
        w = rng.standard_normal((272, 768))
        compare_bf16(a, Case("large", w, hessian(rng, 768, 1500, 0.5), bits, 128, False, "F16", "weighted"))
        compare_bf16(a, Case("large, few tokens", w, hessian(rng, 768, 200, 0.5), bits, 64, True, "F16", "weighted"))
    print(f"{n} matrices: codes compared in {seen[1]} of {seen[0]} rows, losses of {seen[2]} whole matrices")
    check(seen[1] > 0.85 * seen[0] and seen[2] > n / 4, "too few rows are clear of ties to compare")
    return checks.failed > 0


if __name__ == "__main__":
    sys.exit(main())
