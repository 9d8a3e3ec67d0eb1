"""Reads statistics files with h5py and numpy, knowing nothing of the C code but what the format promises.

    python tests/interop/test_stats.py --build BUILD_DIR

Calibrates the demo model, then checks the file: seal, names, types, shapes, units, compression, and the laws that the numbers
must obey; that the same run gives the same bytes on one thread and on two; that `stats merge` adds; and that files which
lead out of themselves (links, external storage, virtual datasets), use other filters or are otherwise not ours are refused
with exit code 3, although their seal is right. Exit 0: all of it holds.
"""
import argparse
import ctypes
import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import tempfile

import h5py
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
SEAL = 512

# name: (type, shape, tier, merge); L MoE layers, P pairs of them, E experts, k top-k, H hidden, I expert width, N layers
KINDS = {
    "selected": ("<u8", "LE", 0, "add"), "rank": ("<u8", "LEk", 0, "add"), "gate_sum": ("<f8", "LE", 0, "add"),
    "gate_sq": ("<f8", "LE", 0, "add"), "gate_top1_sum": ("<f8", "LE", 0, "add"), "prob_sum": ("<f8", "LE", 0, "add"),
    "prob_seq_sum": ("<f8", "LE", 0, "add"), "logit_sum": ("<f8", "LE", 0, "add"), "logit_sq": ("<f8", "LE", 0, "add"),
    "marker_top1": ("<f8", "LE", 0, "add"), "marker_topk": ("<f8", "LE", 0, "add"), "norm_sum": ("<f8", "LE", 0, "add"),
    "norm_sq": ("<f8", "LE", 0, "add"), "gnorm_sum": ("<f8", "LE", 0, "add"), "gnorm_sq": ("<f8", "LE", 0, "add"),
    "ugnorm_sum": ("<f8", "LE", 0, "add"), "out_absmax": ("<f4", "LE", 0, "max"),
    "out_channel": ("<i4", "LE", 0, "follow the kind before"), "in_absmax": ("<f4", "LE", 0, "max"),
    "cos_moe": ("<f8", "L", 0, "add"), "cos_block": ("<f8", "MM", 0, "add"), "block_tokens": ("<u8", "", 0, "add"),
    "norms_res": ("<f8", "L3", 0, "add"), "ratio_hist": ("<u4", "Ljr", 0, "add"), "cumgate_hist": ("<u4", "Lkc", 0, "add"),
    "topp_count": ("<u4", "Lpf", 0, "add"), "coact": ("<u8", "LEE", 0, "add"), "trans": ("<u8", "PEE", 0, "add"),
    "prefetch_hit": ("<u8", "Pk", 0, "add"), "cos_router": ("<f8", "LE", 0, "add"),
    "cos_router_max": ("<f8", "LE", 0, "max"), "active": ("<u8", "Lf", 0, "add"),
    "prob_selected": ("<f8", "LE", 0, "add"),
    "logit_gram": ("<f8", "LEE", 1, "add"), "y_sum": ("<f8", "LEH", 1, "add"),
    "gy_sum": ("<f8", "LEH", 1, "add"), "act_abs": ("<f8", "LEI", 1, "add"), "act_sq": ("<f8", "LEI", 1, "add"),
    "gact_sq": ("<f8", "LEI", 1, "add"), "xin_abs": ("<f8", "LEH", 1, "add"), "xin_sq": ("<f8", "LEH", 1, "add"),
}
failures = []


def check(holds, what):
    if not holds:
        failures.append(what)
        print("FAILED:", what, file=sys.stderr)


class Hash128(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


def xxh3_128(data):
    lib = ctypes.CDLL(ctypes.util.find_library("xxhash") or "libxxhash.so.0")
    lib.XXH3_128bits.restype = Hash128
    lib.XXH3_128bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    h = lib.XXH3_128bits(data, len(data))
    return f"{h.high:016x}{h.low:016x}"


def seal_of(data):
    text = f"moecompress statistics\nseal 1\nxxh3-128 {xxh3_128(data[SEAL:])}\nbytes {len(data):020d}\n".encode()
    return text + bytes(SEAL - len(text))


def reseal(path):
    with open(path, "rb") as f:
        data = f.read()
    with open(path, "r+b") as f:
        f.write(seal_of(data))


def read(path):
    with open(path, "rb") as f:
        return f.read()


def text(v):
    return v.decode() if isinstance(v, bytes) else str(v)


def check_file(path, names, tokens):
    data = read(path)
    check(data[:SEAL] == seal_of(data), "seal")
    with open(os.path.join(DEMO, "config.json")) as f:
        config = json.load(f)
    with h5py.File(path, "r") as f:
        check(f.userblock_size == SEAL, "user block")
        meta = dict(f["meta"].attrs)
        want = {"format_version": 1, "layers": config["num_hidden_layers"], "experts": config["num_local_experts"],
                "top_k": config["num_experts_per_tok"], "hidden": config["hidden_size"],
                "expert_width": config["moe_intermediate_size"], "moe_layers": config["num_hidden_layers"]}
        for key, value in want.items():
            check(meta[key] == value and np.asarray(meta[key]).dtype == "<i8", f"/meta {key}")
        check(text(meta["model_type"]) == config["model_type"], "model_type")
        check(len(text(meta["model"])) == 32, "model")
        check(isinstance(json.loads(text(meta["router_rule"])), dict), "router_rule")
        check(isinstance(json.loads(text(meta["options"])), dict), "options")
        check(list(meta["moe_layer"]) == list(range(config["num_hidden_layers"])), "moe_layer")
        check(text(meta["written_by"]).count(".") == 2, "written_by")
        tier = int(meta["tier"])
        kinds = [k for k, row in KINDS.items() if row[2] <= tier]
        check(text(meta["kinds"]).split() == kinds, "kinds")
        check(sorted(f["domains"]) == sorted(names), "domains")
        for name in names:
            check_domain(f["domains"][name], meta, kinds, tokens.get(name))


def check_domain(d, meta, kinds, tokens):
    L, E, k = (int(meta[x]) for x in ("moe_layers", "experts", "top_k"))
    axis = {"L": L, "P": L - 1, "E": E, "k": k, "j": k - 1, "H": int(meta["hidden"]), "I": int(meta["expert_width"]),
            "M": int(meta["layers"]) + 1, "r": 1024, "c": 256, "p": 20, "f": E + 1, "3": 3}
    n = int(d.attrs["tokens"])
    check(tokens is None or n == tokens, f"{d.name}: tokens")
    check(d.attrs["weight"] > 0 and d.attrs["sequences"] > 0 and len(text(d.attrs["digest"])) == 32, f"{d.name}: attributes")
    check(sorted(set(d) - {"t0", "t1"}) == [], f"{d.name}: groups")
    v = {}
    for name in kinds:
        dtype, shape, tier, merge = KINDS[name]
        x = d[f"t{tier}/{name}"]
        check(x.dtype.str == dtype and x.shape == tuple(axis[c] for c in shape), f"{x.name}: {x.dtype} {x.shape}")
        check(text(x.attrs["merge"]) == merge and text(x.attrs["unit"]) and text(x.attrs["about"]), f"{x.name}: attributes")
        check(x.shape == () or tier == 1 or (x.compression == "gzip" and x.shuffle), f"{x.name}: compression")
        check(h5py.h5o.get_info(x.id).mtime == 0, f"{x.name}: has a time")
        v[name] = x[()]
        check(np.isfinite(v[name]).all(), f"{x.name}: finite")
    check_laws(d.name, v, n, k)


def check_laws(where, v, n, k):
    def law(holds, what):
        check(bool(np.all(holds)), f"{where}: {what}")

    near = lambda a, b: np.isclose(a, b, rtol=1e-6, atol=1e-6)
    diagonal = np.einsum("lee->le", v["coact"])
    law(v["selected"].sum(1) == n * k, "selections")
    law(v["rank"].sum(2) == v["selected"], "ranks")
    law(v["rank"].sum(1) == n, "one expert a rank")
    law(diagonal == v["selected"], "diagonal of coact")
    law(v["coact"] == v["coact"].transpose(0, 2, 1), "coact symmetric")
    law(v["coact"].sum((1, 2)) == n * k * k, "pairs")
    law(v["trans"].sum((1, 2)) == n * k * k, "transitions")
    law(v["trans"].sum(2) == v["selected"][:-1] * k, "transitions out")
    law(v["trans"].sum(1) == v["selected"][1:] * k, "transitions in")
    law(v["prefetch_hit"] <= n, "prefetch hits")
    law(v["ratio_hist"].sum(2) == n, "ratio_hist")
    law(v["cumgate_hist"].sum(2) == n, "cumgate_hist")
    law(v["cumgate_hist"][:, 0, 0] == n, "nothing stands before the first choice")
    law(v["topp_count"].sum(2) == n, "topp_count")
    law(np.diff((v["topp_count"] * np.arange(v["topp_count"].shape[2])).sum(2).astype(np.int64), axis=1) >= 0,
        "more share needs more experts")
    law(near(v["gate_sum"].sum(1), n), "weights sum to 1 (this model renormalises)")
    law(near(v["prob_sum"].sum(1), n), "softmax sums to 1")
    law(v["prob_selected"] <= v["prob_sum"] * (1 + 1e-12) + 1e-12, "scores of the selected are scores")
    law(v["gate_sq"] <= v["gate_sum"] + 1e-9, "g^2 <= g")
    law(v["gate_top1_sum"] <= v["gate_sum"] + 1e-9, "first choices are choices")
    law(v["gnorm_sum"] <= v["norm_sum"] + 1e-9, "g|y| <= |y|")
    law(v["ugnorm_sum"] <= 2 * v["gnorm_sum"] + 1e-9, "u <= 2")
    law(v["logit_sum"] ** 2 <= v["logit_sq"] * n * (1 + 1e-12), "Cauchy-Schwarz of logits")
    law(v["norm_sum"] ** 2 <= v["norm_sq"] * v["selected"] * (1 + 1e-12), "Cauchy-Schwarz of norms")
    law((v["out_absmax"] > 0) == (v["selected"] > 0), "out_absmax of the seen")
    law(np.abs(v["cos_router"]) <= v["selected"] * (1 + 1e-5), "cosines")
    law((v["cos_router_max"] == -1) == (v["selected"] == 0), "cos_router_max of the unseen")
    law(v["cos_router"] <= v["cos_router_max"] * v["selected"] + 1e-6, "mean <= max")
    law(v["active"][:, k] == n, "every token uses k experts")
    law(v["active"].sum(1) == n, "active")
    law(np.abs(v["cos_moe"]) <= n, "cos_moe")
    law(near(np.diag(v["cos_block"]), float(v["block_tokens"])), "cos_block's diagonal")
    law(v["norms_res"][:, 2] == 0, "no shared expert")
    if "logit_gram" not in v:
        return
    law(near(np.einsum("lee->le", v["logit_gram"]), v["logit_sq"]), "diagonal of logit_gram")
    law(near(v["logit_gram"], v["logit_gram"].transpose(0, 2, 1)), "logit_gram symmetric")
    law(np.linalg.norm(v["y_sum"], axis=2) <= v["norm_sum"] * (1 + 1e-5) + 1e-6, "triangle of y")
    law(np.linalg.norm(v["gy_sum"], axis=2) <= v["gnorm_sum"] * (1 + 1e-5) + 1e-6, "triangle of gy")
    law(v["gact_sq"] <= v["act_sq"] * (1 + 1e-6) + 1e-9, "g^2 a^2 <= a^2")
    law(v["act_abs"] ** 2 <= v["act_sq"] * v["selected"][:, :, None] * (1 + 1e-5) + 1e-9, "Cauchy-Schwarz of a")
    law(v["xin_abs"] ** 2 <= v["xin_sq"] * v["selected"][:, :, None] * (1 + 1e-5) + 1e-9, "Cauchy-Schwarz of x")


def check_merge(program, a, b, out):
    run(program, "stats", "merge", a, b, "-o", out, "-q")
    with h5py.File(a, "r") as x, h5py.File(b, "r") as y, h5py.File(out, "r") as z:
        for name in set(x["domains"]) & set(y["domains"]):
            for kind, (_, _, tier, merge) in KINDS.items():
                if tier > z["meta"].attrs["tier"]:
                    continue
                p, q, r = (f[f"domains/{name}/t{tier}/{kind}"][()] for f in (x, y, z))
                if merge == "add":
                    check(np.array_equal(p + q, r), f"merge: {kind} adds")
                elif merge == "max":
                    check(np.array_equal(np.maximum(p, q), r), f"merge: {kind} takes the larger")
        check(set(z["domains"]) == set(x["domains"]) | set(y["domains"]), "merge: domains")


# ---- files that are sealed and yet not to be read --------------------------------------------------------------------

def replace(f, path, make):
    """Takes a dataset away and lets `make(parent, name, values)` put something else there."""
    values, parent, name = f[path][()], f[path].parent, path.split("/")[-1]
    del f[path]
    make(parent, name, values)


def external_storage(outside):
    def make(parent, name, values):
        with open(outside, "wb") as f:
            f.write(values.tobytes())
        parent.create_dataset(name, values.shape, values.dtype, external=[(outside, 0, values.nbytes)])
    return make


def virtual(outside):
    def make(parent, name, values):
        with h5py.File(outside, "w") as f:
            f["x"] = values
        layout = h5py.VirtualLayout(values.shape, values.dtype)
        layout[...] = h5py.VirtualSource(outside, "x", values.shape)
        parent.create_virtual_dataset(name, layout)
    return make


def external_link(outside):
    def make(parent, name, values):
        with h5py.File(outside, "w") as f:
            f["x"] = values
        parent[name] = h5py.ExternalLink(outside, "/x")
    return make


def soft_link(parent, name, values):
    parent["other"] = values
    parent[name] = h5py.SoftLink(parent.name + "/other")


def filtered(**options):
    return lambda parent, name, values: parent.create_dataset(name, data=values, chunks=True, **options)


def retyped(dtype):
    return lambda parent, name, values: parent.create_dataset(name, data=values.astype(dtype))


def bomb(parent, name, values):
    """A dataset whose chunks were never written: no bytes stand for as many as its extents say."""
    parent.create_dataset(name, values.shape, values.dtype, chunks=values.shape, compression="gzip")


def set_attr(path, name, value):
    def change(f):
        del f[path].attrs[name]
        f[path].attrs[name] = value
    return change


def giant(f):
    """65,536 experts: every array would have to be terabytes."""
    del f["meta"].attrs["experts"]
    f["meta"].attrs["experts"] = 65536


def forgeries(path):
    outside = path + ".outside"
    at = "domains/a/t0/"
    swap = lambda kind, make: lambda f: replace(f, at + kind, make)
    return {
        "external storage": swap("coact", external_storage(outside)),
        "virtual dataset": swap("coact", virtual(outside)),
        "external link": swap("coact", external_link(outside)),
        "soft link": swap("coact", soft_link),
        "lzf": swap("coact", filtered(compression="lzf")),
        "fletcher32": swap("coact", filtered(fletcher32=True)),
        "scale-offset": swap("coact", filtered(scaleoffset=0)),
        "float in place of counts": swap("selected", retyped("<f8")),
        "big-endian": swap("selected", retyped(">u8")),
        "bomb": swap("ratio_hist", bomb),
        "reshaped": swap("rank", lambda p, n, v: p.create_dataset(n, data=v.reshape(v.shape[0], -1))),
        "group in place of dataset": swap("rank", lambda p, n, v: p.create_group(n)),
        "NaN": swap("gate_sum", lambda p, n, v: p.create_dataset(n, data=v * np.nan)),
        "negative": swap("gate_sum", lambda p, n, v: p.create_dataset(n, data=-1 - v)),
        "channel": swap("out_channel", lambda p, n, v: p.create_dataset(n, data=v + 10**6)),
        "giant": giant,
        "variable text": set_attr("meta", "model", "a text of variable length"),
        "array in place of one": set_attr("meta", "layers", np.arange(3)),
        "real in place of integer": set_attr("domains/a", "tokens", 7.0),
        "infinite weight": set_attr("domains/a", "weight", np.inf),
        "no meta": lambda f: f.__delitem__("meta"),
        "domains is a dataset": lambda f: (f.__delitem__("domains"), f.create_dataset("domains", data=[1])),
    }


def check_forgeries(program, good, folder):
    path = os.path.join(folder, "forged.h5")
    changes = forgeries(path)
    changes["nothing"] = lambda f: None
    for name, change in changes.items():
        shutil.copy(good, path)
        with h5py.File(path, "r+", libver=("v110", "v110")) as f:
            change(f)
        reseal(path)
        got = subprocess.run([program, "stats", "show", path], capture_output=True, text=True)
        lines = got.stderr.strip().splitlines()
        wanted = 0 if name == "nothing" else 3
        check(got.returncode == wanted and (wanted == 0 or len(lines) == 1), f"forgery {name}: exit {got.returncode} {lines}")
    with h5py.File(path, "w", userblock_size=SEAL, libver="earliest") as f:  # the form of before HDF5 1.8
        f.create_group("meta")
    reseal(path)
    got = subprocess.run([program, "stats", "show", path], capture_output=True, text=True)
    check(got.returncode == 3, "forgery old form")


def run(program, *args):
    got = subprocess.run([program, *args], capture_output=True, text=True)
    if got.returncode != 0:
        sys.exit(f"{' '.join(args)}: exit {got.returncode}\n{got.stderr}")
    return got.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True)
    program = os.path.join(os.path.abspath(parser.parse_args().build), "moecompress")
    samples = os.path.join(DEMO, "samples.txt")
    with tempfile.TemporaryDirectory() as folder:
        file = lambda name: os.path.join(folder, name)
        base = ["calibrate", DEMO, "--seq-len", "128", "-q"]
        run(program, *base, "--text", f"a={samples}:2", f"ö {{}} 1%={samples}", "--tokens", "3000", "--tier", "1",
            "--threads", "1", "-o", file("a.h5"))
        run(program, *base, "--text", f"a={samples}:2", f"ö {{}} 1%={samples}", "--tokens", "3000", "--tier", "1",
            "--threads", "2", "-o", file("again.h5"))
        check(read(file("a.h5")) == read(file("again.h5")), "the same bytes on one thread and on two")
        check_file(file("a.h5"), ["a", "ö {} 1%25"], {"a": 2000, "ö {} 1%25": 1000})
        run(program, *base, "--text", f"a={samples}", f"c={samples}", "--max-windows", "9", "-o", file("b.h5"))
        check_file(file("b.h5"), ["a", "c"], {"a": 9 * 128})
        check_merge(program, file("a.h5"), file("b.h5"), file("ab.h5"))
        check_merge(program, file("b.h5"), file("b.h5"), file("bb.h5"))
        check_forgeries(program, file("b.h5"), folder)
    print("statistics: " + (f"{len(failures)} checks failed" if failures else "all checks hold"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
