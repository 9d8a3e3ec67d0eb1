"""The pattern store, the table of what removed experts served and the betas against numpy on the same statistics file.

    python tests/interop/test_patterns.py --build BUILD_DIR

Betas come from a histogram, so they are compared with the exact medians of the same tokens, which a trace holds, to within two
bins. Exit 0: all of it holds.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
failures = []


def check(holds, what):
    if not holds:
        failures.append(what)
        print("FAILED:", what, file=sys.stderr)


def run(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    return done.stdout


def check_store(store, stats, domains):
    L, E = store["layers"], store["experts"]
    marker = {d: stats[f"domains/{d}/t0/marker_top1"][()] for d in domains}
    tokens = {d: int(stats[f"domains/{d}"].attrs["tokens"]) for d in domains}
    want = {d: marker[d] / tokens[d] for d in domains}
    want["both"] = sum(marker.values()) / sum(tokens.values())
    for task in store["tasks"]:
        score = np.array(task["score"])
        check(score.shape == (L, E) and np.array_equal(score, want[task["name"]]), f"TCESS of {task['name']}")
        check(np.array_equal(task["ranking"], np.argsort(-score, axis=1, kind="stable")), f"ranking of {task['name']}")
        check(task["key"] == task["score"][0], "key")
    return want


def check_query(answer, want, prompt):
    distance = {t: float(np.linalg.norm(want[t][0] - prompt)) for t in want}
    check([t["name"] for t in answer["tasks"]] == sorted(distance, key=distance.get), "order of distances")
    check(all(np.isclose(t["distance"], distance[t["name"]], rtol=1e-12) for t in answer["tasks"]), "distances")


def check_served(result, stats, domains):
    keep = {l["layer"]: set(l["keep"]) for l in result["plan"]["layers"]}
    for key, name in (("selected", "selected"), ("gate", "gate_sum")):
        sums = {d: stats[f"domains/{d}/t0/{name}"][()].astype(float) for d in domains}
        for row in result["served"]:
            check(row["expert"] not in keep[row["layer"]], "served: removed")
            for d in domains:
                share = sums[d][row["layer"], row["expert"]] / sums[d][row["layer"]].sum()
                check(np.isclose(row["domains"][d][key], share, rtol=1e-12), f"served: {key}")
        for d in domains:
            lost = sum(sums[d][l, e] for l in keep for e in range(sums[d].shape[1]) if e not in keep[l])
            check(np.isclose(result["lost_by_domain"][d][key], lost / sums[d].sum(), rtol=1e-12), f"lost: {key}")
    check(len(result["served"]) == sum(sums[domains[0]].shape[1] - len(k) for k in keep.values()), "served: all")


def check_betas(betas, trace):
    with h5py.File(trace, "r") as f:
        for l, row in enumerate(betas):
            gates = f[f"layer_{l}/gates"][()].astype(float)
            exact = np.median(gates[:, 1:] / gates[:, :1], axis=0)
            check(np.allclose(exact, row, rtol=0, atol=2 / 1024), f"betas of layer {l}: {row}, exactly {exact}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True)
    program = os.path.join(os.path.abspath(parser.parse_args().build), "moecompress")
    samples = os.path.join(DEMO, "samples.txt")
    with tempfile.TemporaryDirectory() as folder:
        file = lambda name: os.path.join(folder, name)
        with open(samples, encoding="utf-8") as f:
            lines = f.readlines()
        for name, part in (("a", lines[:700]), ("b", lines[-700:])):
            with open(file(name + ".txt"), "w", encoding="utf-8") as f:
                f.writelines(part)
        run(program, "calibrate", DEMO, "--seq-len", "128", "-q", "--text", f"a={file('a.txt')}", f"b={file('b.txt')}",
            "--tokens", "4000", "--trace", file("trace.h5"), "-o", file("s.h5"))
        add = [program, "stats", "store", "add", file("t.json"), file("s.h5"), "-q"]
        run(*add, "--by-domain")
        run(*add, "--task", "both")
        with open(file("t.json")) as f:
            store = json.load(f)
        with h5py.File(file("s.h5"), "r") as stats:
            want = check_store(store, stats, ["a", "b"])
            answer = json.loads(run(program, "stats", "store", "query", file("t.json"), file("s.h5"), "--domain", "b", "--json"))
            check_query(answer, want, want["b"][0])
            result = json.loads(run(program, "prune", DEMO, "--stats", file("s.h5"), "--remove", "50%", "--dry-run", "--json", "-q"))
            check_served(result, stats, ["a", "b"])
            check_betas(json.loads(run(program, "stats", "show", file("s.h5"), "--json"))["betas"], file("trace.h5"))
    print("patterns: " + (f"{len(failures)} checks failed" if failures else "all checks hold"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
