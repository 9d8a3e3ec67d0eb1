"""Compares merged experts with numpy's, on small random layers.

    python tests/interop/test_merge_fill.py --build BUILD_DIR

Averages against the weighted mean; Sub-MoE's subspace against numpy.linalg.svd of the matrices side by side and, whitened, against
SVDs of W_e S_e with S_e a Cholesky factor of the second moments of its inputs; DERN against a plain statement of it in float64; the
router's rows. Exit 0: nothing differs.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np

import checks
from checks import check


class Layer:
    def __init__(self, random, experts, hidden, width, tokens=0, slots=2):
        def normal(*shape):
            return random.standard_normal(shape).astype(np.float32)
        self.E, self.H, self.I = experts, hidden, width
        self.gate, self.up, self.down = normal(experts, width, hidden), normal(experts, width, hidden), normal(experts, hidden, width)
        self.router, self.x = normal(experts, hidden), normal(tokens, hidden)
        self.ids = np.argsort(-(self.x @ self.router.T), axis=1)[:, :slots].astype(np.int32)
        self.gates = random.uniform(0.2, 1, self.ids.shape).astype(np.float32)
        self.centre = np.arange(experts, dtype=np.int32)
        self.weight, self.saliency = np.ones(experts), random.uniform(0.5, 2, experts)

    def groups(self, random, keep):
        """Every expert goes to one of the `keep` first, with random weights."""
        self.centre = np.concatenate([np.arange(keep), random.integers(0, keep, self.E - keep)]).astype(np.int32)
        self.weight = random.uniform(0.5, 2, self.E)
        for c in range(keep):
            self.weight[self.centre == c] /= self.weight[self.centre == c].sum()

    def dropped(self, keep):
        self.centre = np.where(np.arange(self.E) < keep, np.arange(self.E), -1).astype(np.int32)

    def write(self, path):
        with open(path, "wb") as f:
            f.write(np.array([self.E, self.H, self.I, len(self.x), self.ids.shape[1]], np.int64).tobytes())
            for v in (self.centre, self.weight, self.saliency, self.router):
                f.write(v.tobytes())
            for e in range(self.E):
                f.write(self.gate[e].tobytes() + self.up[e].tobytes() + self.down[e].tobytes())
            f.write(self.x.tobytes() + self.ids.tobytes() + self.gates.tobytes())

    def read(self, path):
        v = np.fromfile(path, np.float32)
        part = self.I * self.H
        experts = v[self.E * self.H:].reshape(self.E, 3 * part)
        return (v[:self.E * self.H].reshape(self.E, self.H), experts[:, :part].reshape(self.gate.shape),
                experts[:, part:2 * part].reshape(self.up.shape), experts[:, 2 * part:].reshape(self.down.shape))


def fill(build, layer, *settings, threads=2):
    """router, gate, up, down and the printed numbers."""
    with tempfile.TemporaryDirectory() as work:
        into, out = os.path.join(work, "in"), os.path.join(work, "out")
        layer.write(into)
        p = subprocess.run([os.path.join(build, "tests", "dump_fill"), into, out, "--threads", str(threads), *settings],
                           capture_output=True, text=True)
        if p.returncode:
            sys.exit(f"dump_fill {settings}: exit {p.returncode}: {p.stderr.strip()}")
        return layer.read(out), [float(v) for v in p.stdout.split()]


def near(got, want, tolerance, what):
    error = max(np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max() for g, w in zip(got, want))
    check(error < tolerance, f"{what}: off by {error:.2e}")
    return error


# --- averages and subspaces --------------------------------------------------------------------------------------------


def silu(v):
    return v / (1 + np.exp(-v))


def union(matrices, weights, share):
    """Sub-MoE's merge as its paper writes it: U S (sum w V^T) of [W_1 .. W_n], the leading r."""
    rows, cols = matrices[0].shape
    r = max(1, int(np.ceil(share * min(rows, cols)))) if share < 1 else rows
    u, s, v = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
    v = sum(w * v[:, i * cols:(i + 1) * cols] for i, w in enumerate(weights))
    return (u[:, :r] * s[:r]) @ v[:r]


def whitened(matrices, weights, inputs, share):
    rows, cols = matrices[0].shape
    r = max(1, int(np.ceil(share * min(rows, cols))))
    factors = [np.linalg.cholesky(v.T @ v) for v in inputs]
    u, s, v = np.linalg.svd(np.concatenate([m @ f for m, f in zip(matrices, factors)], axis=1), full_matrices=False)
    v = sum(w * v[:, i * cols:(i + 1) * cols] @ np.linalg.inv(f) for i, (w, f) in enumerate(zip(weights, factors)))
    return (u[:, :r] * s[:r]) @ v[:r]


def check_subspace(a, random):
    worst = 0.0
    layer = Layer(random, 7, 24, 18, tokens=600, slots=3)
    layer.groups(random, 3)
    matrices = [m.astype(np.float64) for m in (layer.gate, layer.up, layer.down)]
    members = [np.flatnonzero(layer.centre == c) for c in range(3)]
    for share, whiten in ((1, False), (0.99, False), (0.75, False), (0.4, False), (0.05, False), (0.75, True), (0.3, True)):
        (_, *got), _ = fill(a.build, layer, "fill=subspace", f"rank={share}", f"whiten={'on' if whiten else 'off'}")
        for c, who in enumerate(members):
            if len(who) == 1:
                check(all((g[c] == m[c]).all() for g, m in zip(got, matrices)), "a group of one changed")
                continue
            for k, m in enumerate(matrices):
                if whiten:
                    inputs = []
                    for e in who:
                        x = layer.x[(layer.ids == e).any(axis=1)].astype(np.float64)
                        h = silu(x @ matrices[0][e].T) * (x @ matrices[1][e].T)
                        inputs.append(h if k == 2 else x)
                    want = whitened(list(m[who]), layer.weight[who], inputs, share)
                else:
                    want = union(list(m[who]), layer.weight[who], share)
                worst = max(worst, near([got[k][c]], [want], 1e-5, f"subspace {share}, whitened {whiten}, matrix {k}"))
    print(f"subspace: as numpy's SVD of all matrices side by side, within {worst:.1e}")


def check_average(a, random):
    layer = Layer(random, 9, 20, 14)
    layer.groups(random, 4)
    for router in ("keep", "mean", "weighted", "add"):
        (rows, *got), numbers = fill(a.build, layer, f"router={router}")
        check(numbers[2] == 5, "members that went into others")
        for c in range(4):
            who = layer.centre == c
            w = layer.weight[who, None, None]
            near([g[c] for g in got], [(w * m[who]).sum(axis=0) for m in (layer.gate, layer.up, layer.down)], 1e-6, "average")
            r = layer.router[who].astype(np.float64)
            want = {"keep": layer.router[c], "mean": r.mean(axis=0), "add": r.sum(axis=0),
                    "weighted": (layer.weight[who, None] * r).sum(axis=0)}[router]
            near([rows[c]], [want], 1e-6, f"router {router}")
        check((rows[4:] == layer.router[4:]).all() and all((g[4:] == m[4:]).all() for g, m in zip(got, (layer.gate, layer.up,
              layer.down))), "who is no centre was written")
    print("average: weighted means of experts and rows")


# --- DERN --------------------------------------------------------------------------------------------------------------


def unit(v):
    n = np.linalg.norm(v, axis=-1, keepdims=True)
    return np.divide(v, n, out=np.zeros_like(v), where=n > 0)


def similarity(a, b, part, canonical):
    """a, b: lists of gate, up, down rows. Values and signs."""
    g, u, d = (w * unit(x) @ unit(y).T for w, x, y in zip(part, a, b))
    if canonical:
        return g + np.abs(u + d), np.where(u + d < 0, -1.0, 1.0)
    return g + u + d, np.ones_like(g)


def dern(layer, o):
    """Rows gate, up, down of all experts, the router's rows, neurons passed on."""
    keep = [e for e in range(layer.E) if layer.centre[e] == e]
    drop = [e for e in range(layer.E) if layer.centre[e] < 0 and layer.saliency[e] > 0]
    rows = [layer.gate.astype(np.float64), layer.up.astype(np.float64), layer.down.astype(np.float64).transpose(0, 2, 1)]
    part = np.array(o["part"]) / sum(o["part"])
    flat = [np.concatenate([x[r] for r in keep]) for x in rows]
    out, router = [x.copy() for x in rows], layer.router.astype(np.float64).copy()
    pools = {r: [(r, j, j, 1.0) for j in range(layer.I)] for r in keep}
    for e in drop:
        value, sign = similarity([x[e] for x in rows], flat, part, o["canonical"])
        for j in range(layer.I):
            at = value[j].argmax()
            if value[j, at] > o["alpha"]:
                r = keep[at // layer.I]
                pools[r].append((e, j, at % layer.I, sign[j, at]))
                router[r] += layer.router[e].astype(np.float64) / layer.I
    for r in keep:
        if len(pools[r]) > layer.I:
            for x, y in zip(out, cluster(layer, rows, pools[r], part, o)):
                x[r] = y
    return out, router, sum(len(p) - layer.I for p in pools.values())


def cluster(layer, rows, pool, part, o):
    n, I = len(pool), layer.I
    v = [np.array([x[e, j] for e, j, _, _ in pool]) for x in rows]
    source = np.array([p[0] for p in pool])
    weight = layer.saliency[source]
    home, sign = np.array([p[2] for p in pool]), np.array([p[3] for p in pool])
    first = np.arange(I)
    if o["response"]:
        bound = (np.abs(v[0]).max(axis=1) + np.abs(v[0]).min(axis=1)).astype(np.float32)
        best = set(np.argsort(-bound, kind="stable")[:I])
        others = iter(sorted(i for i in best if i >= I))
        first = np.array([c if c in best else next(others) for c in range(I)])
        home = None
    centre = [x[first].copy() for x in v]
    ratio = np.sqrt(np.linalg.norm(v[2], axis=1) / np.linalg.norm(v[1], axis=1))
    empty = np.zeros(I, bool)
    for _ in range(o["rounds"] if o["response"] else 1):
        if o["response"]:
            value, signs = similarity(v, centre, part, o["canonical"])
            new = value.argmax(axis=1)
            sign_new = signs[np.arange(n), new]
            if home is not None and (new == home).all() and (sign_new == sign).all():
                break
            home, sign = new, sign_new
        for c in range(I):
            who = np.flatnonzero(home == c)
            empty[c] = len(who) == 0
            if len(who) == 0:
                continue
            scale = sign[who] * (ratio[who] / ratio[first[c]] if o["canonical"] else 1)
            g, u, d = v[0][who], v[1][who] * scale[:, None], v[2][who] / scale[:, None]
            w = weight[who]
            if o["sum"]:
                g, u, d, w = one_a_source(g, u, d, w, source[who])
                if o["canonical"]:
                    scale = np.sqrt(np.linalg.norm(d, axis=1) / np.linalg.norm(u, axis=1)) / ratio[first[c]]
                    u, d = u * scale[:, None], d / scale[:, None]
            centre[0][c], centre[1][c], centre[2][c] = (mean(x, w, o["same_norm"]) for x in (g, u, d))
    if o["sum"]:
        centre[2][empty] = 0
    return centre


def mean(x, w, same_norm):
    if len(x) == 1:
        return x[0]
    if not same_norm:
        return (w[:, None] * x).sum(axis=0) / w.sum()
    return unit((w[:, None] * unit(x)).sum(axis=0)) * np.linalg.norm(x, axis=1).mean()


def one_a_source(g, u, d, w, source):
    new = []
    for s in dict.fromkeys(source):
        i = source == s
        norm = np.linalg.norm(u[i], axis=1, keepdims=True)
        new.append((mean(g[i], np.ones(i.sum()), True), mean(u[i], np.ones(i.sum()), True), (d[i] * norm / norm.mean()).sum(axis=0),
                    w[i][0]))
    return [np.array(x) for x in zip(*new)]


def check_segments(a, random):
    layer = Layer(random, 6, 16, 11)
    layer.dropped(4)
    layer.saliency[5] *= 3
    # experts have neurons in common, so that there is something to find; signs and scales are of their own
    for e in range(1, 6):
        for j in range(0, layer.I, 2):
            k, s = random.integers(layer.I), random.choice([-1, 1]) * random.uniform(0.5, 2)
            noise = [0.3 * random.standard_normal(layer.H).astype(np.float32) for _ in range(3)]
            layer.gate[e, j] = layer.gate[0, k] + noise[0]
            layer.up[e, j] = (layer.up[0, k] + noise[1]) * s
            layer.down[e, :, j] = (layer.down[0, :, k] + noise[2]) / s
    worst = moved = 0
    on = {False: "off", True: "on"}
    for i in range(64):
        o = dict(canonical=bool(i & 1), response=bool(i & 2), same_norm=bool(i & 4), sum=bool(i & 8), rounds=30,
                 alpha=(0.6, -1.0)[i >> 4 & 1], part=((0, 0.5, 0.5), (1.0, 2.0, 1.5))[i >> 5])
        want, router, n = dern(layer, o)
        (rows, gate, up, down), numbers = fill(a.build, layer, "fill=segments", "router=add", f"alpha={o['alpha']}",
            *(f"segment-{k}={v}" for k, v in zip(("gate", "up", "down"), o["part"])), f"segment-canonical={on[o['canonical']]}",
            f"segment-response={on[o['response']]}", f"segment-same-norm={on[o['same_norm']]}",
            f"segment-sum-same-source={on[o['sum']]}")
        check(numbers[4] == n and numbers[4] + numbers[5] == 2 * layer.I, f"{o}: {numbers[4]} passed on, not {n}")
        worst = max(worst, near([gate, up, down.transpose(0, 2, 1)], want, 1e-5, str(o)), near([rows], [router], 1e-6, f"rows, {o}"))
        check(0 < n <= 2 * layer.I and (o["alpha"] > 0) == (n < 2 * layer.I), f"{o}: {n} passed on")
        moved += n
    print(f"segments: as stated in numpy, within {worst:.1e}, {moved} neurons passed on")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    a = ap.parse_args()
    random = np.random.default_rng(7)
    check_average(a, random)
    check_subspace(a, random)
    check_segments(a, random)
    return checks.failed > 0


if __name__ == "__main__":
    sys.exit(main())
