"""GGUF against the gguf package, which we did not write: files of ours are read by its GGUFReader, files of its GGUFWriter by ours,
and an importance matrix is what the statistics say.

    python tests/interop/test_gguf.py --build BUILD_DIR

Exit 0: nothing differs.
"""
import argparse
import os
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np

import checks
from checks import check

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def write_theirs(path, seed, split=0):
    """A file with every kind of value and several types of tensors; returns tensors by name."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, "qwen3moe", split_max_tensors=split, small_first_shard=False)
    w.add_uint8("k.u8", 200), w.add_int8("k.i8", -100), w.add_uint16("k.u16", 60000), w.add_int16("k.i16", -30000)
    w.add_uint32("k.u32", 4000000000), w.add_int32("k.i32", -2000000000), w.add_float32("k.f32", 0.1)
    w.add_uint64("k.u64", 1 << 62), w.add_int64("k.i64", -(1 << 62)), w.add_float64("k.f64", 0.1), w.add_bool("k.bool", True)
    w.add_string("k.text", "Ġ two\nlines"), w.add_array("k.ints", [1, -2, 3]), w.add_array("k.reals", [0.5, -1.5])
    w.add_array("k.texts", ["", "a", "ü" * 300]), w.add_array("k.bools", [True, False])
    tensors = {}
    for name, shape, kind in (("a", (3, 5), "F32"), ("b", (2, 3, 64), "Q8_0"), ("c", (7,), "F16"), ("d", (1, 1, 1, 1), "F32"),
                              ("blk.0.ffn_up_exps.weight", (4, 6, 32), "Q4_0"), ("e", (3, 96), "BF16")):
        x = rng.standard_normal(shape).astype(np.float32)
        t = gguf.GGMLQuantizationType[kind]
        q = x.astype(np.float16) if kind == "F16" else x if kind == "F32" else gguf.quantize(x, t)
        w.add_tensor(name, q, raw_dtype=None if kind in ("F16", "F32") else t)
        tensors[name] = (kind, shape, q.tobytes())
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return tensors


def dump(program, path, copy=None, shard=None):
    args = [program, path] + ([copy, str(shard)] if copy else [])
    r = subprocess.run(args, capture_output=True)
    if r.returncode != 0:
        check(False, f"{args}: {r.stderr.decode()}")
        return []
    return r.stdout.decode("utf-8", "surrogateescape").splitlines()


def fnv(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = ((h ^ b) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return h


def theirs_by_us(program, tmp):
    for split in (0, 2):
        path = os.path.join(tmp, f"theirs{split}.gguf")
        tensors = write_theirs(path, 1, split)
        first = path if not split else os.path.join(tmp, "theirs2-00001-of-00003.gguf")
        lines = dump(program, first)
        got = {l.split()[1]: l.split() for l in lines if l.startswith("tensor ")}
        check(list(got) == list(tensors), f"split {split}: names {list(got)}")
        for name, (kind, shape, data) in tensors.items():
            want = [kind, "x".join(map(str, shape[::-1])), f"{fnv(data):016x}"]
            check(got.get(name, [None] * 5)[2:5] == want, f"split {split}: {name}: {got.get(name)} is not {want}")
        keys = {l.split(" ", 2)[1]: l.split(" ", 2)[2] for l in lines if l.startswith("key ")}
        for key, want in (("k.u8", "200"), ("k.i8", "-100"), ("k.u16", "60000"), ("k.i16", "-30000"), ("k.u32", "4000000000"),
                          ("k.i32", "-2000000000"), ("k.u64", str(1 << 62)), ("k.i64", str(-(1 << 62))), ("k.f64", "0.1"),
                          ("k.f32", repr(float(np.float32(0.1)))), ("k.bool", "true"), ("k.ints", "1 -2 3"),
                          ("k.reals", "0.5 -1.5"), ("k.bools", "1 0"), ("k.texts", "0 1 600")):
            check(keys.get(key) == want, f"split {split}: {key}: {keys.get(key)!r} is not {want!r}")


def ours_by_them(program, tmp):
    """dump_gguf copies a file through our writer; gguf must read the same from the copy."""
    path = os.path.join(tmp, "theirs.gguf")
    tensors = write_theirs(path, 2)
    for shard, files in ((0, 1), (300, 5)):
        stem = os.path.join(tmp, f"ours{shard}")
        dump(program, path, stem, shard)
        paths = [stem + ".gguf"] if files == 1 else [f"{stem}-{i + 1:05}-of-{files:05}.gguf" for i in range(files)]
        got = {}
        for i, p in enumerate(paths):
            r = gguf.GGUFReader(p)
            for t in r.tensors:
                got[t.name] = (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]), t.data.tobytes())
            if files > 1:
                check(r.fields["split.no"].contents() == i and r.fields["split.count"].contents() == files and
                      r.fields["split.tensors.count"].contents() == len(tensors), f"{p}: split keys")
            if i > 0:
                continue
            for key, want in (("k.u32", 4000000000), ("k.i32", -2000000000), ("k.bool", True), ("k.text", "Ġ two\nlines"),
                              ("k.ints", [1, -2, 3]), ("k.texts", ["", "a", "ü" * 300]), ("k.bools", [True, False])):
                check(r.fields[key].contents() == want, f"{p}: {key}: {r.fields[key].contents()!r}")
            check(np.float32(r.fields["k.f32"].contents()) == np.float32(0.1), f"{p}: k.f32")
        check(got == tensors, f"shard {shard}: tensors differ")


def read_dat(path):
    """The form before GGUF, as llama.cpp's common/imatrix-loader reads it."""
    data = open(path, "rb").read()
    at, entries = 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        n, = struct.unpack_from("<i", data, at)
        name = data[at + 4:at + 4 + n].decode()
        calls, values = struct.unpack_from("<ii", data, at + 4 + n)
        at += 12 + n
        entries[name] = (calls, np.frombuffer(data, "<f4", values, at))
        at += 4 * values
    chunks, n = struct.unpack_from("<ii", data, at)
    check(at + 8 + n == len(data), f"{path}: bytes behind the end")
    return entries, chunks, data[at + 8:].decode()


def importance(moecompress, tmp):
    import h5py
    model, stats = os.path.join(ROOT, "recipes", "demo-model"), os.path.join(tmp, "stats.h5")
    text = os.path.join(tmp, "text.txt")
    with open(text, "w") as f:  # so few words that some experts are never selected
        f.write("one two ")
    quiet = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run([moecompress, "calibrate", model, "--text", text, "--tier", "1", "-o", stats], **quiet)
    out, dat = os.path.join(tmp, "imatrix.gguf"), os.path.join(tmp, "imatrix.dat")
    subprocess.run([moecompress, "stats", "export", stats, "--imatrix", out], **quiet)
    subprocess.run([moecompress, "stats", "export", stats, "--imatrix", dat, "--imatrix-format", "dat"], **quiet)
    r = gguf.GGUFReader(out)
    check(r.fields["general.type"].contents() == "imatrix", "general.type")
    for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"):
        check(key in r.fields, key)
    tensors = {t.name: t.data for t in r.tensors}
    old, chunks, _ = read_dat(dat)
    check(len(old) * 2 == len(tensors), "number of entries")
    check(chunks == r.fields["imatrix.chunk_count"].contents(), "number of chunks")
    with h5py.File(stats, "r") as f:
        d = next(iter(f["domains"].values()))
        selected = d["t0/selected"][()].astype(np.float64)
        layers = list(np.atleast_1d(f["meta"].attrs["moe_layer"]))
        unseen = 0
        for l, layer in enumerate(layers):
            for matrix, kind in (("gate", "xin_sq"), ("up", "xin_sq"), ("down", "act_sq")):
                name = f"blk.{layer}.ffn_{matrix}_exps.weight"
                sums, n = d[f"t1/{kind}"][l], selected[l]
                seen = n > 0
                unseen += int((~seen).sum())
                counts = tensors[name + ".counts"].ravel()
                check(np.array_equal(counts[seen], n[seen]), f"{name}: counts")
                check(np.allclose(tensors[name + ".in_sum2"][seen], sums[seen], rtol=1e-6), f"{name}: sums")
                mean = np.ones_like(sums)
                mean[seen] = sums[seen] / n[seen, None]
                if matrix != "down":
                    mean[~seen] = sums.sum(0) / n.sum()
                    check(np.all(counts[~seen] == 1) and np.allclose(tensors[name + ".in_sum2"][~seen], mean[~seen], rtol=1e-6),
                          f"{name}: experts that were never selected")
                else:
                    check(np.all(counts[~seen] == 0), f"{name}: experts that were never selected")
                check(np.allclose(old[name][1].reshape(mean.shape) / old[name][0], mean, rtol=1e-6), f"{name}: dat")
        check(unseen > 0, "every expert was selected: the text is too long to try the others")
    r = subprocess.run([moecompress, "stats", "export", stats, "--imatrix", out], capture_output=True)
    check(r.returncode == 3 and b"--overwrite" in r.stderr, "an output that is there")
    for path in (out, dat):
        r = subprocess.run([moecompress, "stats", "export", stats, "--imatrix", path, "--overwrite"], capture_output=True)
        check(r.returncode == 0, f"{path}: --overwrite: {r.stderr}")
    r = subprocess.run([moecompress, "stats", "export", stats, "--imatrix", stats, "--overwrite"], capture_output=True)
    check(r.returncode == 3 and b"not an importance matrix" in r.stderr, "a statistics file is not replaced")


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--build", required=True)
    build = os.path.abspath(p.parse_args().build)
    program = os.path.join(build, "tests", "dump_gguf")
    with tempfile.TemporaryDirectory() as tmp:
        theirs_by_us(program, tmp)
        ours_by_them(program, tmp)
        importance(os.path.join(build, "moecompress"), tmp)
    print("test_gguf:", "ok" if not checks.failed else f"{checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
