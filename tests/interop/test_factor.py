"""Factored experts in transformers: a small checkpoint of every family, and the demo model.

    python tests/interop/test_factor.py --build BUILD_DIR [--only NAME] [--keep DIR]

Each family, in float32, by two methods (FULL: by all): the dense form must load as the source does; the factored one, with
trust_remote_code, into modules that have factors, and give the dense form's logits within 1e-5 of the largest, or be refused with a
reason. Without trust_remote_code it must not load: its experts would be random. Of svd's factors ranks and orthonormal columns are
looked at. The demo model: perplexity of what transformers computes from the factors against `moecompress eval` of the plan
within 0.1 %, and bytes reported against the files. Exit 0: nothing differs.
"""
import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile

import families
import torch
import transformers
from tokenizers import Tokenizer

LIMIT = 1e-5
LOOSE = {"qwen3_next": 5e-5, "qwen3_next-mtp": 5e-5, "qwen3_5_moe_text": 5e-5}  # the delta rule carries rounding from token to token
DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "recipes", "demo-model")
METHODS = {"svd": [], "pivot": [], "mc-smoe": ["--keep-rows", "10%"], "base-delta": [], "mpo": ["--cores", "3"]}
FULL = {"qwen3_moe", "mixtral-fused", "deepseek_v3", "lfm2_moe"}
WINDOW, WINDOWS = 64, 24


class Row:
    def __init__(self, a, spec, seed, work):
        self.build, self.spec, self.work, self.wrong = a.build, spec, work, []
        self.source = os.path.join(work, "source")
        families.write(spec, self.source, "5" if spec["config"] == "DbrxConfig" else spec["dialects"][-1], seed=100 + seed)
        self.windows = families.windows_of(1000 + seed)
        self.ids = os.path.join(work, "windows.ids")
        with open(self.ids, "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in self.windows)

    def check(self, ok, what):
        if not ok:
            self.wrong.append(what)

    def tool(self, *args):
        return subprocess.run([os.path.join(self.build, "moecompress"), *args], capture_output=True, text=True)

    def factor(self, method, emit):
        out = os.path.join(self.work, f"{method}-{emit}")
        p = self.tool("factor", self.source, "--text", self.ids, "--method", method, *METHODS[method], "--ratio", "70%", "--dtype", "f32",
                      "--compute", "f32", "--emit", emit, "-o", out, "-q")
        if p.returncode == 0 and self.tool("verify", out, self.source, "-q").returncode != 0:
            self.wrong.append(f"{method} {emit}: verify")
        return out, p

    def logits(self, model):
        with torch.no_grad():
            return torch.cat([model(torch.tensor([w])).logits[0].float() for w in self.windows])

    def loaded(self, folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                                 experts_implementation="eager", trust_remote_code=True).eval()

    def method(self, method):
        dense, p = self.factor(method, "dense")
        if p.returncode:
            self.check("without a network" in p.stderr, f"{method} dense: {p.stderr.strip()}")
            return "refused"
        want = families.load(self.spec, dense, os.path.join(self.work, "plain"))
        small, p = self.factor(method, "factored")
        if p.returncode:
            self.check(re.search("no class of its own|part of another|have biases|not called experts|stand as .out, in", p.stderr),
                       f"{method} factored: {p.stderr.strip()}")
            return "dense only"
        if self.spec["as_type"]:
            return "dense only"  # transformers has no such model_type
        model = self.loaded(small)
        modules = [m for m in model.modules() if type(m).__name__ == "FactoredExperts"]
        self.check(len(modules) > 0, f"{method}: no factored modules")
        a, b = self.logits(want), self.logits(model)
        off = ((a - b).abs().max() / a.abs().max()).item()
        self.check(off <= LOOSE.get(self.spec["name"], LIMIT), f"{method}: logits differ by {off:.3g} of the largest")
        if method == "base-delta":
            self.alone(small)
        if method == "svd":
            self.forms(modules[0])
        return off

    def alone(self, folder):
        """Without its code."""
        try:
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.wrong.append("loads without its code")
        except RuntimeError as e:
            self.check("mismatched" in str(e), str(e))

    def forms(self, m):
        """Are the factors of the size that they should have?"""
        for name in ("gate_proj", "up_proj", "down_proj"):
            a, b = getattr(m, name), getattr(m, name + "_in")
            out, r, inner = a.shape[1], a.shape[2], b.shape[2]
            self.check(r == math.floor(0.7 * out * inner / (out + inner)), f"{name}: rank {r}")
            same = torch.eye(r) - torch.einsum("eor,eos->ers", a, a)
            self.check(same.abs().max().item() < 1e-5, f"{name}: its columns are not orthonormal")


def run_row(a, spec, seed, work):
    row = Row(a, spec, seed, work)
    told = []
    try:
        for method in METHODS if spec["name"] in FULL else ("pivot", "base-delta"):
            told.append(row.method(method))
    except (ValueError, RuntimeError, OSError) as e:
        row.wrong.append(f"{type(e).__name__}: {str(e)[:600]}")
    print(f"{spec['name']:28} {'FAIL' if row.wrong else 'ok'}  {' '.join(t if isinstance(t, str) else f'{t:.1e}' for t in told)}")
    for what in row.wrong:
        print("   ", what)
    return not row.wrong


def perplexity(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                              trust_remote_code=True).eval()
    w = torch.tensor(ids[:WINDOW * WINDOWS]).reshape(-1, WINDOW)
    with torch.no_grad():
        p = torch.log_softmax(model(w).logits.double(), -1)
    nats = -p[:, :-1].gather(2, w[:, 1:, None]).mean().item()
    return math.exp(nats), sum(p.numel() for p in model.parameters())


def demo(a, folder):
    """What is measured here is what runs there, and what is said of bytes is so."""
    wrong = []
    text = os.path.join(DEMO, "samples.txt")
    ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(open(text, encoding="utf-8").read()).ids
    tool = os.path.join(a.build, "moecompress")
    for method, more in METHODS.items():
        out, plan = os.path.join(folder, "small-" + method), os.path.join(folder, method + ".json")
        args = [tool, "factor", DEMO, "--text", text, "--seq-len", str(WINDOW), "--max-windows", "40", "--method", method, *more,
                "--ratio", "50%", "--dtype", "f32", "--emit", "factored", "-q", "--json", "-o"]
        told = json.loads(subprocess.run([*args, out], capture_output=True, text=True, check=True).stdout)
        subprocess.run([*args, plan, "--plan-only"], capture_output=True, text=True, check=True)
        scores = json.loads(subprocess.run([tool, "eval", DEMO, "--plan", plan, "--text", text, "--seq-len", str(WINDOW),
                                            "--max-windows", str(WINDOWS), "--json", "-q"],
                                           capture_output=True, text=True, check=True).stdout)
        ours = scores["overall"]["perplexity"]
        theirs, values = perplexity(out, ids)
        files = {n: os.path.getsize(os.path.join(out, n)) for n in os.listdir(out)}
        manifest = files.pop("moecompress.json")
        tensors = sum(t.numel() * t.element_size() for t in families.read_tensors(out).values())
        checks = {"perplexity": abs(ours / theirs - 1) < 1e-3, "file bytes": told["file_bytes"] in (sum(files.values()), sum(files.values()) + manifest),
                  "tensor bytes": told["bytes"]["output"] == tensors,
                  "expert bytes": told["factor"]["expert_bytes"]["factors"] <= told["factor"]["expert_bytes"]["source"] / 2}
        wrong += [f"demo {method}: {k}" for k, ok in checks.items() if not ok]
        print(f"demo {method:12} perplexity {ours:.4f}, transformers' {theirs:.4f}; {values} parameters, {sum(files.values())} bytes")
    for what in wrong:
        print("   ", what)
    return not wrong


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    parser.add_argument("--only")
    parser.add_argument("--keep")
    a = parser.parse_args()
    torch.set_num_threads(1)
    rows = [s for s in families.ROWS if s["make"] not in ("relu", "top_p") and not (s["mtp"] and "fp8" in s["name"])]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_MODULES_CACHE"] = folder
        good = a.only is not None or demo(a, folder)
        bad = families.run_rows(rows, a, folder, run_row)
    sys.exit(0 if good and bad == 0 else 1)


main()
