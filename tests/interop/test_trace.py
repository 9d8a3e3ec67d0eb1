"""The routing trace, read by h5py, must add up to the statistics of the same run."""
import argparse
import json
import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--build", required=True)
args = parser.parse_args()
root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
demo = os.path.join(root, "recipes", "demo-model")


def main():
    bad = 0

    def check(what, ok):
        nonlocal bad
        bad += not ok
        print(("ok      " if ok else "FAILED  ") + what)

    with tempfile.TemporaryDirectory() as tmp:
        stats, trace = os.path.join(tmp, "s.h5"), os.path.join(tmp, "t.h5")
        subprocess.run([os.path.join(args.build, "moecompress"), "calibrate", demo, "--text",
                        "samples=" + os.path.join(demo, "samples.txt"), "--seq-len", "128", "--tokens", "4000", "-o", stats,
                        "--trace", trace, "-q"], check=True)
        with h5py.File(stats) as s, h5py.File(trace) as t:
            t0 = s["domains/samples/t0"]
            n = int(s["domains/samples"].attrs["tokens"])
            ids = t["tokens/id"][:]
            check(f"{n} tokens in order, with positions that restart",
                  len(ids) == n and t["tokens/position"][0] == 0 and t["tokens/position"][:].max() == 127)
            check("domain names", json.loads(t["tokens"].attrs["domains"]) == ["samples"])
            layers = [int(x) for x in s["meta"].attrs["moe_layer"]]
            experts = int(s["meta"].attrs["experts"])
            for l, layer in enumerate(layers):
                g = t[f"layer_{layer}"]
                e, w, y = g["ids"][:], g["gates"][:].astype(float), g["y_norm"][:].astype(float)
                u = np.maximum(g["one_minus_cos"][:].astype(float), 0)

                def total(v):
                    return np.bincount(e.ravel(), weights=v.ravel(), minlength=experts)

                for name, v in (("selected", np.ones_like(w)), ("gate_sum", w), ("norm_sum", y), ("gnorm_sum", w * y),
                                ("ugnorm_sum", u[:, None] * w * y)):
                    want = t0[name][l].astype(float)
                    err = np.abs(total(v) - want).max() / max(want.max(), 1e-9)
                    check(f"layer {layer}: {name} from the trace, relative error {err:.1e}", err < 2e-5)
                check(f"layer {layer}: gates descend", bool((np.diff(w, axis=1) <= 0).all()))
    return 1 if bad else 0


sys.exit(main())
