"""Routers whose rows share experts, in transformers: a small checkpoint of every family, and the demo model.

    python tests/interop/test_map.py --build BUILD_DIR [--only NAME] [--keep DIR]

Each family, in float32, merged by half: what --emit map writes must load with trust_remote_code without a missing or unknown key, into
modules that have half the experts, and give the logits of what --emit tied writes within 1e-5 of the largest; or be refused with a
reason. Its tensors must be those of --emit native, but for the router's rows, and its bytes these and no more. Without
trust_remote_code it must not load: rows would be missing. The demo model, with every kind of fit: perplexity in transformers against
`moecompress eval` of the plan within 0.1 %; layers of unequal numbers; saved by transformers and loaded again it is the same. Exit 0:
nothing differs.
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
REFUSED = "no class of its own|part of another|have biases|not called experts|stand as .out, in|with biases|without a network"
WINDOW, WINDOWS = 64, 24


def load(folder, code=True):
    """The model, and how many experts each of its layers has."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", trust_remote_code=code,
        output_loading_info=True)
    keys = [k for what in ("missing_keys", "mismatched_keys", "unexpected_keys") for k in info[what]]
    experts = [m.down_proj.shape[0] for n, m in model.named_modules() if n.endswith(".experts") and hasattr(m, "down_proj")]
    return model.eval(), keys, experts


def values(tensors):
    return sum(t.numel() for t in tensors.values())


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

    def merge(self, emit):
        out = os.path.join(self.work, emit)
        p = self.tool("merge", self.source, "--text", self.ids, "--method", "m-smoe", "--remove", "50%", "--dtype", "f32", "--compute",
                      "f32", "--repair", "none", "--emit", emit, "-o", out, "-q")
        if p.returncode == 0 and self.tool("verify", out, self.source, "-q").returncode != 0:
            self.wrong.append(f"{emit}: verify")
        return out, p

    def logits(self, model):
        with torch.no_grad():
            return torch.cat([model(torch.tensor([w])).logits[0].float() for w in self.windows])

    def run(self):
        mapped, p = self.merge("map")
        if p.returncode:
            self.check(re.search(REFUSED, p.stderr), f"map: {p.stderr.strip()}")
            return "refused: " + re.sub(r".*error: (--emit map: )?", "", p.stderr.strip())[:60]
        if self.spec["as_type"]:
            return "refused: transformers has no such model_type"
        tied, p = self.merge("tied")
        want = families.load(self.spec, tied, os.path.join(self.work, "plain"))
        model, keys, experts = load(mapped)
        keys = [k for k in keys if not (self.spec["mtp"] and re.match(self.spec["mtp"], k)) and ".indexer." not in k]
        self.check(not keys, f"keys: {keys[:4]}")
        self.check(len(experts) > 0 and all(e == families.expert_count(want) // 2 for e in experts), f"{experts} experts")
        a, b = self.logits(want), self.logits(model)
        off = ((a - b).abs().max() / a.abs().max()).item()
        self.check(off <= LOOSE.get(self.spec["name"], LIMIT), f"logits differ by {off:.3g} of the largest")
        if not self.spec["mtp"]:
            self.forms(mapped, families.expert_count(want))
        return f"{off:.1e}"

    def forms(self, mapped, n):
        """The names of native, and router rows besides."""
        native, p = self.merge("native")
        self.check(p.returncode == 0, f"native: {p.stderr.strip()}")
        a, b = families.read_tensors(native), families.read_tensors(mapped)
        rows = [k for k in a if a[k].shape != b[k].shape]
        self.check(a.keys() == b.keys() and all(n // 2 in a[k].shape and n in b[k].shape for k in rows), "names or shapes")
        self.check(values(b) == values(a) + sum(a[k].numel() for k in rows) < values(families.read_tensors(self.source)), "sizes")
        self.check(len(rows) > 0 and all(re.search(r"gate|router|bias", k) and not re.search(r"experts\.(\d|gate_up|down)", k) for k in rows),
                   f"rows: {rows}")


def run_row(a, spec, seed, work):
    row, told = Row(a, spec, seed, work), ""
    try:
        told = row.run()
    except (ValueError, RuntimeError, OSError) as e:
        row.wrong.append(f"{type(e).__name__}: {str(e)[:600]}")
    print(f"{spec['name']:28} {'FAIL' if row.wrong else 'ok'}  {told}")
    for what in row.wrong:
        print("   ", what)
    return not row.wrong


def perplexity(model, ids):
    w = torch.tensor(ids[:WINDOW * WINDOWS]).reshape(-1, WINDOW)
    with torch.no_grad():
        p = torch.log_softmax(model(w).logits.double(), -1)
    return math.exp(-p[:, :-1].gather(2, w[:, 1:, None]).mean().item())


def demo(a, folder):
    """What is measured here is what runs there, fitted or not."""
    wrong = []
    text = os.path.join(DEMO, "samples.txt")
    ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(open(text, encoding="utf-8").read()).ids
    tool = os.path.join(a.build, "moecompress")
    stats, cut = os.path.join(folder, "stats.h5"), ["--text", text, "--seq-len", str(WINDOW), "--max-windows"]
    subprocess.run([tool, "calibrate", DEMO, "-o", stats, *cut, "40", "-q"], capture_output=True, check=True)
    for name, more in {"none": ["--repair", "none"], "ridge": [], "deep": ["--repair", "deep", "--repair-epochs", "2"],
                       "unequal": ["--allocation", "global", "--stats", stats]}.items():
        out, plan = os.path.join(folder, "demo-" + name), os.path.join(folder, name + ".json")
        args = [tool, "merge", DEMO, *cut, "40", "--method", "m-smoe", "--remove", "50%", "--dtype", "f32", "--emit", "map", "-q", "--json",
                *more, "-o"]
        told = json.loads(subprocess.run([*args, out], capture_output=True, text=True, check=True).stdout)
        subprocess.run([*args, plan, "--plan-only"], capture_output=True, text=True, check=True)
        scores = json.loads(subprocess.run([tool, "eval", DEMO, "--plan", plan, *cut, str(WINDOWS), "--json", "-q"],
                                           capture_output=True, text=True, check=True).stdout)
        ours, (model, keys, experts) = scores["overall"]["perplexity"], load(out)
        theirs = perplexity(model, ids)
        size = sum(t.numel() * t.element_size() for t in families.read_tensors(out).values())
        checks = {f"perplexity {theirs}": abs(ours / theirs - 1) < 1e-3, f"keys {keys[:4]}": not keys, "bytes": told["bytes"]["output"] == size,
                  f"experts {experts}": sum(experts) == 32 and (len(set(experts)) > 1) == (name == "unequal")}
        if name == "ridge":
            model.save_pretrained(os.path.join(folder, "saved"))
            again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
            saved = families.read_tensors(os.path.join(folder, "saved"))
            checks["saved"] = saved.keys() == families.read_tensors(out).keys() and \
                all(torch.equal(t, saved[k]) for k, t in families.read_tensors(out).items())
            checks["other kernels"] = abs(perplexity(again.eval(), ids) / theirs - 1) < 1e-4
            try:
                load(out, False)
                wrong.append("demo: loads without its code")
            except RuntimeError as e:
                checks[f"refusal {e}"] = "mismatched" in str(e)
        wrong += [f"demo {name}: {k}" for k, ok in checks.items() if not ok]
        print(f"demo {name:8} perplexity {ours:.4f}, transformers' {theirs:.4f}; {experts} experts, {size} bytes of tensors")
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
    rows = [s for s in families.ROWS if s["make"] not in ("relu", "top_p", "plus_plus", "null_experts") and
            not (s["mtp"] and "fp8" in s["name"])]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_MODULES_CACHE"] = folder
        good = a.only is not None or demo(a, folder)
        bad = families.run_rows(rows, a, folder, run_row)
    sys.exit(0 if good and bad == 0 else 1)


main()
