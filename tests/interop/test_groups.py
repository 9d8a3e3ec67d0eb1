"""Compares groups of experts with scipy's and numpy's, on random points.

    python tests/interop/test_groups.py --build BUILD_DIR

Cuts and heights of agglomeration against scipy.cluster.hierarchy.linkage (Ward with every mass 1), eigenpairs against
numpy.linalg.eigh, spectral groups against the best partition of numpy's embedding, k-means against scipy.cluster.vq and all
partitions. Exit 0: nothing differs.
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import pdist, squareform

import checks
from checks import check


def dump(a, way, matrix, keep):
    """The lines of numbers that dump_groups prints."""
    with tempfile.NamedTemporaryFile(suffix=".f64") as f:
        f.write(np.ascontiguousarray(matrix, dtype=np.float64).tobytes())
        f.flush()
        p = subprocess.run([os.path.join(a.build, "tests", "dump_groups"), way, str(len(matrix)), str(keep), f.name],
                           capture_output=True, text=True)
    check(p.returncode == 0, f"dump_groups {way}: exit {p.returncode}: {p.stderr.strip()}")
    return [np.array([float(v) for v in line.split()]) for line in p.stdout.splitlines()]


def partition(labels):
    """Groups as a set of sets of members."""
    labels = np.asarray(labels)
    return {frozenset(np.flatnonzero(labels == v)) for v in labels}


def check_linkage(a, random):
    for n in (2, 7, 40, 128):
        points = random.standard_normal((n, 5))
        distance = pdist(points)
        for way in ("average", "ward", "complete", "single"):
            tree = linkage(distance, way)
            height = tree[:, 2] ** 2 / 2 if way == "ward" else tree[:, 2]
            for keep in sorted({1, 2, max(1, n // 4), max(1, n // 2), n - 1, n}):
                centre, got = dump(a, way, squareform(distance ** 2 if way == "ward" else distance), keep)
                check(partition(centre) == partition(cut_tree(tree, keep)[:, 0]), f"{way}: {keep} of {n}")
                check(np.allclose(got, height[:n - keep], rtol=1e-12, atol=0), f"{way}: heights, {keep} of {n}")
    print("linkage: cuts and heights as scipy's")


def check_eigen(a, random):
    worst = 0.0
    for n, rank in ((1, 1), (2, 2), (17, 17), (90, 90), (90, 12)):
        x = random.standard_normal((n, rank))
        for m in (x @ x.T, x @ x.T - 2 * np.eye(n)):
            m = (m + m.T) / 2
            values, vectors = np.linalg.eigh(m)
            for r in sorted({1, max(1, rank // 2), rank}):
                for end, want in (("largest", np.s_[::-1]), ("smallest", np.s_[:])):
                    if end == "smallest" and rank < n:
                        continue  # the smallest are all one value
                    v, *rows = dump(a, end, m, r)
                    u, w = np.array(rows), vectors[:, want][:, :r]
                    scale = np.abs(values).max()
                    errors = [np.abs(v - values[want][:r]).max() / scale, np.abs(m @ u.T - u.T * v).max() / scale,
                              np.abs(u @ u.T - np.eye(r)).max(), np.abs(u.T @ u - w @ w.T).max()]
                    check(max(errors) < 1e-10, f"{end} {r} of {n}, rank {rank}: {errors}")
                    check(all(row[np.abs(row).argmax()] > 0 for row in u), f"{end} {r} of {n}: signs")
                    worst = max(worst, *errors)
    print(f"eigenpairs: values, residuals, orthonormality and spaces to {worst:.1e}")


def objective(points, labels):
    return sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def best_partition(points, keep):
    """Objective and labels of the best of all partitions into `keep` groups."""
    every = (np.array((0,) + rest) for rest in itertools.product(range(keep), repeat=len(points) - 1))
    return min(((objective(points, labels), tuple(labels)) for labels in every if len(set(labels)) == keep))


def check_kmeans(a, random):
    for n, keep in ((6, 2), (8, 3)):
        points = random.standard_normal((n, 3))
        want, labels = best_partition(points, keep)
        centre, got = dump(a, "kmeans", points @ points.T, keep)
        check(partition(centre) == partition(labels) and np.isclose(got[0], want, rtol=1e-9), f"k-means: {keep} of {n}")
    points = random.standard_normal((60, 4))
    centre, got = dump(a, "kmeans", points @ points.T, 6)
    theirs = min(objective(points, kmeans2(points, 6, minit="++", seed=s)[1]) for s in range(64))
    check(np.isclose(got[0], objective(points, centre), rtol=1e-9), "k-means: the objective is that of the groups")
    check(got[0] <= theirs * 1.02, f"k-means: {got[0]}, scipy's best {theirs}")
    print(f"k-means: best of all partitions; 6 of 60: {got[0]:.4f}, scipy's best of 64 {theirs:.4f}")


def check_spectral(a, random):
    for n, keep in ((9, 2), (9, 3)):
        z = random.standard_normal((n, 4))
        affinity = np.exp(-squareform(pdist(z)))
        s = affinity.sum(1)
        laplacian = np.eye(n) - affinity / np.sqrt(s[:, None] * s)
        rows = np.linalg.eigh(laplacian)[1][:, :keep]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        labels = best_partition(rows, keep)[1]
        check(partition(dump(a, "spectral", affinity, keep)[0]) == partition(labels), f"spectral: {keep} of {n}")
    print("spectral: best partition of numpy's embedding")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    a = parser.parse_args()
    random = np.random.default_rng(7)
    for f in (check_linkage, check_eigen, check_kmeans, check_spectral):
        f(a, random)
    sys.exit(checks.failed != 0)


main()
