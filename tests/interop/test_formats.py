"""Formats of quantized weights against a decoder that is not ours and against the clients that load them.

    python tests/interop/test_formats.py --build BUILD_DIR [--only NAME] [--keep DIR] [--all]

Of small random families (--all: of every one that is said to load) dump_quantize rounds the experts to 2, 3, 4 and 8 bits in turns of
layers, experts and projections, and writes them as gptq, as compressed-tensors and as fake, the twin in float32. Then
  - a decoder of thirty lines in numpy gives the twin's weights from the packed ones, bit for bit;
  - our forward pass gives the same logits from both, bit for bit;
  - transformers with auto-round, and with compressed-tensors, loads each without missing keys, gptq without unexpected
    ones and also with zero points, an identity through every quantized module gives the decoder's weights, and the logits are the
    twin's (FLIPS: routers choose by inputs that are rounded to float16, so that the median over positions counts);
  - a width altered in config.json does not load.
Families that are not said to load are refused with a reason. The clients run in processes of their own: auto-round changes how
transformers loads experts. Where they are not installed their part is left out. Exit 0: nothing differs.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np

os.environ.update(TQDM_DISABLE="1")
HERE = os.path.abspath(__file__)
MIX = ["bits=2,3,4,8", "by=matrix"]
NAMES = ["qwen3_moe", "mixtral", "deepseek_v3-fused", "lfm2_moe"]
REFUSED = ["gpt_oss", "granitemoe", "llama4_text", "adamoe"]
WEIGHTS, LOGITS = 2.0 ** -10, 0.03  # of the largest value: float16's rounding; median over positions


# --- the decoder -------------------------------------------------------------------------------------------------------

def unpack(words, bits, n):
    """Codes of each row of a stream of 32-bit words, lowest bit first."""
    flat = np.unpackbits(np.ascontiguousarray(words).view(np.uint8).reshape(words.shape[0], -1), axis=1, bitorder="little")
    return (flat[:, :n * bits].reshape(-1, n, bits).astype(np.int64) << np.arange(bits)).sum(2)


def decode(t, module):
    """[rows, cols] in float32 of what stands for module.weight."""
    if module + ".weight" in t:
        return t[module + ".weight"].astype(np.float32)
    if module + ".qweight" in t:
        q, s, z = (t[module + x] for x in (".qweight", ".scales", ".qzeros"))
        rows = q.shape[1]
        bits = z.shape[1] * 32 // rows
        cols = q.shape[0] * 32 // bits
        group = t[module + ".g_idx"].astype(np.int64) if module + ".g_idx" in t else np.arange(cols) // (cols // s.shape[0])
        zero = unpack(z, bits, rows) + int(t["less"])
        return (s.astype(np.float32)[group] * (unpack(q.T, bits, cols).T - zero[group]).astype(np.float32)).T
    q, s = t[module + ".weight_packed"], t[module + ".weight_scale"].astype(np.float32)
    rows, cols = t[module + ".weight_shape"]
    bits = q.shape[1] * 32 // cols
    return np.repeat(s, cols // s.shape[1], axis=1) * (unpack(q, bits, cols) - 2 ** (bits - 1)).astype(np.float32)


def modules_of(t):
    return sorted({k.rsplit(".", 1)[0] for k in t if k.endswith((".qweight", ".weight_packed"))})


def golden():
    """Words of codes (7 i + 1) mod 2^b."""
    want = {2: "b1b1b1b1 b1b1b1b1", 3: "c14e5dc1 5dc14e5d 4e5dc14e", 4: "2b4d6f81 a3c5e709 2b4d6f81 a3c5e709",
            8: "160f0801 322b241d 4e474039 6a635c55 867f7871 a29b948d beb7b0a9 dad3ccc5"}
    return all((unpack(np.array([[int(w, 16) for w in text.split()]], np.uint32), b, 32)[0] == (7 * np.arange(32) + 1) % 2 ** b).all()
               for b, text in want.items())


def tensors(folder):
    import torch
    from safetensors import safe_open
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        said = json.load(f).get("quantization_config", {})
    out = {"less": np.array(said.get("packing_format") != "auto_round:gptqmodel")}  # are zero points stored less one?
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(folder, name), "pt") as f:
                out |= {k: v.float().numpy() if v.dtype == torch.bfloat16 else v.numpy() for k in f.keys() for v in [f.get_tensor(k)]}
    return out


# --- a client, in a process of its own ---------------------------------------------------------------------------------

def load(folder, rounded=False):
    import torch
    import transformers
    more = {"quantization_config": transformers.AutoRoundConfig()} if rounded else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                             output_loading_info=True, **more)


def problems_of(folder, ids, twin, rounded):
    """What is wrong with a folder whose twin has the logits `twin`."""
    import torch
    model, info = load(folder, rounded)
    out = [f"{k} {sorted(v)[:2]}" for k, v in info.items() if k != "unexpected_keys" and v]
    out += [f"unexpected {k}" for k in sorted(info["unexpected_keys"]) if not (rounded and k.endswith("g_idx"))][:2]
    t, worst, seen = tensors(folder), 0.0, 0
    want = modules_of(t)
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            w = decode(t, name)
            with torch.no_grad():
                got = module(torch.eye(w.shape[1])).T.numpy()
            worst, seen = max(worst, float(np.abs(got - w).max() / np.abs(w).max())), seen + 1
    if seen != (len(want) if want[0] + ".qweight" in t else 0) or worst > WEIGHTS:  # others are plain by now
        out.append(f"{seen} of {len(want)} modules, weights off by {worst:.2g}")
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float().numpy()
    off = np.abs(logits - twin).max(1) / np.abs(twin).max()
    if not np.median(off) < LOGITS:
        out.append(f"logits off by {np.median(off):.2g}, {off.max():.2g} at most")
    return out, worst, float(np.median(off)), float(off.max())


def client(jobs):
    """A process for each kind of checkpoint: [{"folder", "twin" (of logits) or "must_fail"}], results to stdout."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    import torch
    torch.set_num_threads(1)
    results = []
    for job in jobs:
        try:
            if job.get("must_fail"):
                load(job["folder"])
                results.append([["it loads although a width is wrong"], 0, 0, 0])
                continue
            results.append(problems_of(job["folder"], job["ids"], np.load(job["twin"]), job.get("rounded")))
        except Exception as e:
            results.append([[] if job.get("must_fail") else [f"{type(e).__name__}: {str(e)[:200]}"], 0, 0, 0])
    print("RESULT " + json.dumps(results))


def run_client(jobs, folder):
    path = os.path.join(folder, "jobs.json")
    with open(path, "w") as f:
        json.dump(jobs, f)
    p = subprocess.run([sys.executable, HERE, "--client", path], capture_output=True, text=True,
                       env=dict(os.environ, PYTHONPATH=os.path.dirname(HERE)))
    line = [x for x in p.stdout.splitlines() if x.startswith("RESULT ")]
    return json.loads(line[-1][7:]) if line else [[[f"the client died: {p.stderr[-300:]}"], 0, 0, 0] for _ in jobs]


# --- our side ----------------------------------------------------------------------------------------------------------

class Case:
    def __init__(self, a, spec, work):
        import families
        numbers = dict(spec["numbers"])
        if spec["config"] in ("MixtralConfig", "PhimoeConfig"):
            numbers["intermediate_size"] = 64  # streams take widths that are multiples of 32
        if spec["name"] == "qwen3_moe":
            numbers["head_dim"] = 32  # its attention is quantized, too
        self.a, self.work, self.wrong, self.name = a, work, [], spec["name"]
        self.source = os.path.join(work, "source")
        families.write(dict(spec, numbers=numbers), self.source, spec["dialects"][-1], seed=families.seed_of(spec))
        self.ids = families.windows_of(7, (48,))[0]
        with open(os.path.join(work, "w.ids"), "w") as f:
            f.write(" ".join(map(str, self.ids)) + "\n")

    def quantize(self, fmt, out, *more):
        weights = os.path.join(self.work, "weights")
        shutil.rmtree(weights, ignore_errors=True)
        return subprocess.run([os.path.join(self.a.build, "tests", "dump_quantize"), self.source, fmt, weights,
                               os.path.join(self.work, out), *more], capture_output=True, text=True)

    def make(self, fmt, out, *more):
        p = self.quantize(fmt, out, *more)
        if p.returncode:
            self.wrong.append(f"{out}: {p.stderr.strip()[-200:]}")
            return None
        folder = os.path.join(self.work, out)
        bytes_said, t = int(p.stdout.split()[1]), tensors_bytes(folder)
        if bytes_said != t:
            self.wrong.append(f"{out}: {bytes_said} bytes were said, {t} are there")
        verify = subprocess.run([os.path.join(self.a.build, "moecompress"), "verify", folder, self.source, "-q"], capture_output=True, text=True)
        if verify.returncode:
            self.wrong.append(f"{out}: verify: {verify.stderr.strip()[-200:]}")
        return folder

    def ours(self, folder):
        out = os.path.join(self.work, "ours.safetensors")
        subprocess.run([os.path.join(self.a.build, "tests", "dump_forward"), "--compute", "f32", folder, os.path.join(self.work, "w.ids"),
                        out], check=True, capture_output=True)
        from safetensors.numpy import load_file
        return load_file(out)["logits"]

    def same(self, packed, twin):
        """Weights by the decoder, logits by our forward pass."""
        p, f = tensors(packed), tensors(twin)
        checked = 0
        for module in modules_of(p):
            w = dense_of(f, module)
            if w is None:
                continue
            checked += 1
            if not np.array_equal(decode(p, module), w):
                self.wrong.append(f"{os.path.basename(packed)}: {module} is not its twin's")
                break
        if checked == 0:
            self.wrong.append(f"{os.path.basename(packed)}: no module is in the twin")
        if not np.array_equal(self.ours(packed), self.ours(twin)):
            self.wrong.append(f"{os.path.basename(packed)}: our logits are not the twin's")

    def twin(self, folder, out):
        """Logits of the twin, by transformers."""
        import torch
        path = os.path.join(self.work, out + ".npy")
        with torch.no_grad():
            np.save(path, load(folder)[0](torch.tensor([self.ids])).logits[0].float().numpy())
        return path


def dense_of(t, module):
    """The twin's matrix of a module, whatever it is called there."""
    old = module.replace("mlp.", "block_sparse_moe.")
    for new, was in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        old = old.replace(new, was)
    names = [module, old, module.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2")]
    for name in names:
        if name + ".weight" in t:
            return t[name + ".weight"].astype(np.float32)
    new = re.sub(r"block_sparse_moe", "mlp", module)
    for was, now in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        new = re.sub(rf"\.{was}$", "." + now, new)
    m = re.match(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj$", new)
    joined = m and t.get(f"{m[1]}.{'down_proj' if m[3] == 'down' else 'gate_up_proj'}")
    if joined is None:
        return None
    w = joined[int(m[2])]
    half = w.shape[0] // 2
    return w if m[3] == "down" else w[:half] if m[3] == "gate" else w[half:]


def tensors_bytes(folder):
    from safetensors import safe_open
    n = 0
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as f:
                head = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            n += max([v["data_offsets"][1] for k, v in head.items() if k != "__metadata__"], default=0)
    return n


def alter(folder, out, change):
    shutil.copytree(folder, out)
    path = os.path.join(out, "config.json")
    with open(path) as f:
        config = json.load(f)
    change(config["quantization_config"])
    with open(path, "w") as f:
        json.dump(config, f)


def another_width(q):
    first = next(iter(q["extra_config"].values()))
    first["bits"] = 8 if first["bits"] != 8 else 4


def prepare(case, gptq, packed):
    """Writes all forms of a case and adds what clients have to load."""
    out = case.make("gptq", "gptq", *MIX)
    twin = case.make("fake", "fake", *MIX, "dtype=f32")
    if out and twin:
        case.same(out, twin)
        gptq.append((case, dict(folder=out, ids=case.ids, twin=case.twin(twin, "fake"))))
    if case.name == "qwen3_moe":
        more = ["bits=3,16,2,8", "by=matrix", "group=16", "others=4"]
        out, twin = case.make("gptq", "gptq-some", *more), case.make("fake", "fake-some", *more, "dtype=f32")
        if out and twin:
            case.same(out, twin)
            gptq.append((case, dict(folder=out, ids=case.ids, twin=case.twin(twin, "fake-some"))))
            alter(out, out + "-wrong", another_width)
            gptq.append((case, dict(folder=out + "-wrong", must_fail=True)))
        zeros = ["bits=2,3,4,8", "by=matrix", "group=32", "zeros=1", "others=4"]
        out, twin_zeros = case.make("gptq", "gptq-zeros", *zeros), case.make("fake", "fake-zeros", *zeros, "dtype=f32")
        if out and twin_zeros:
            case.same(out, twin_zeros)
            gptq.append((case, dict(folder=out, ids=case.ids, twin=case.twin(twin_zeros, "fake-zeros"))))
        for fmt in ("gptq-server", "compressed-tensors"):
            if case.quantize(fmt, "no", "bits=4", "by=model", "zeros=1").returncode == 0:
                case.wrong.append(f"{fmt}: zero points are not refused")
        rounded = case.make("gptq-dynamic", "gptq-dynamic", *more)
        if rounded and twin:
            gptq.append((case, dict(folder=rounded, ids=case.ids, twin=case.twin(twin, "fake-some"), rounded=True)))
        more = ["bits=4,8", "by=layer"]
        out, twin = case.make("gptq-server", "gptq-server", *more), case.make("fake", "fake-server", *more, "dtype=f32")
        if out and twin:
            case.same(out, twin)
            gptq.append((case, dict(folder=out, ids=case.ids, twin=case.twin(twin, "fake-server"), rounded=True)))
        if case.quantize("gptq-server", "no", *MIX).returncode == 0 or case.quantize("compressed-tensors", "no", *MIX).returncode == 0:
            case.wrong.append("a mix of widths is not refused")
    bits = ["bits=3", "by=model", "scale=f32"] + (["others=8"] if case.name == "qwen3_moe" else [])
    out, twin = case.make("compressed-tensors", "packed", *bits), case.make("fake", "fake-packed", *bits, "dtype=f32")
    if out and twin:
        case.same(out, twin)
        packed.append((case, dict(folder=out, ids=case.ids, twin=case.twin(twin, "fake-packed"))))


def installed(name):
    import importlib.util
    return importlib.util.find_spec(name) is not None


def run(a, folder):
    import families
    import torch
    torch.set_num_threads(1)
    names = [s["name"] for s in families.ROWS if not s["make"] and not s["mtp"] and not s["as_type"]] if a.all else NAMES
    gptq, packed, cases = [], [], []
    good = golden()
    for spec in families.ROWS:
        work = os.path.join(a.keep or folder, spec["name"])
        if spec["name"] not in names + REFUSED or (a.only and a.only != spec["name"]):
            continue
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        case = Case(a, spec, work)
        cases.append(case)
        if spec["name"] in REFUSED or a.all:
            p = case.quantize("gptq", "no", *MIX)
            if p.returncode and (spec["name"] in REFUSED or a.all):
                if "--format fake" not in p.stderr:
                    case.wrong.append(f"refused without a remedy: {p.stderr.strip()[-200:]}")
                print(f"{case.name:22} refused: {p.stderr.strip()[-160:]}")
                continue
            if spec["name"] in REFUSED:
                case.wrong.append("is not refused")
                continue
        try:
            prepare(case, gptq, packed)
        except Exception as e:
            case.wrong.append(f"{type(e).__name__}: {str(e)[:200]}")
    for jobs, package, what in ((gptq, "auto_round", "gptq"), (packed, "compressed_tensors", "packed")):
        if not installed(package):
            print(f"{package} is not installed: not loaded there")
            continue
        for (case, job), (wrong, weights, median, most) in zip(jobs, run_client([j for _, j in jobs], folder) if jobs else []):
            out = os.path.basename(job["folder"])
            print(f"{case.name:22} {out:16} weights {weights:.1e}  logits {median:.1e} (most {most:.1e})")
            case.wrong += [f"{out}: {x}" for x in wrong]
    for case in cases:
        for what in case.wrong:
            print(f"    {case.name}: {what}")
    return good and cases and not any(c.wrong for c in cases)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build")
    parser.add_argument("--only")
    parser.add_argument("--keep")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--client")
    a = parser.parse_args()
    if a.client:
        with open(a.client) as f:
            client(json.load(f))
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if run(a, folder) else 1)


if __name__ == "__main__":
    main()
