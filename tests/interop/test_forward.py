"""Compares the layer pass with transformers in float32: hidden states, logits, selections, perplexity, KL, top-1.

    python tests/interop/test_forward.py --build BUILD_DIR [--only NAME] [--keep DIR]

Each row of FIXTURES is a small random checkpoint that is written here with transformers' own save_pretrained, in one of the
two dialects of config.json, and run by transformers (eager attention, eager experts) and by BUILD_DIR/tests/dump_forward on
windows of unequal length. The demo model runs on its own text. Limits: logits within 1e-4 of the largest, the same most
likely id everywhere, the same experts selected. Two experts whose logits differ by rounding may be selected the other way
round: such near-ties are counted, printed with their margin, and what depends on one is left out of the comparison.
Exit 0: nothing differs.
"""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
LENGTHS = (9, 70, 2, 33, 64, 48)
LIMIT = 1e-4   # of the largest logit
TIE = 1e-4     # of the spread of a token's router logits

QWEN = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24, vocab_size=320,
            intermediate_size=80, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True,
            max_position_embeddings=128, tie_word_embeddings=False)
MIXTRAL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
               intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=128,
               tie_word_embeddings=False)


def row(name, family, rope=None, dtype="float32", dialect="5", shard=None, **config):
    return dict(name=name, family=family, rope=rope or {"rope_type": "default", "rope_theta": 10000.0}, dtype=dtype,
                dialect=dialect, shard=shard, config=config)


FIXTURES = [
    row("qwen3-dense-layer", "qwen3_moe", mlp_only_layers=[1]),
    row("qwen3-sparse-step-tied-hub", "qwen3_moe", {"rope_type": "default", "rope_theta": 1e6}, "bfloat16", "4", "60KB",
        norm_topk_prob=False, decoder_sparse_step=2, num_hidden_layers=4, tie_word_embeddings=True),
    row("qwen3-bias-f16", "qwen3_moe", dtype="float16", shard="80KB", attention_bias=True),
    row("qwen3-bias-hub-bf16", "qwen3_moe", dtype="bfloat16", dialect="4", attention_bias=True, norm_topk_prob=False),
    row("qwen3-odd-sizes", "qwen3_moe", dtype="bfloat16", hidden_size=70, head_dim=22, num_attention_heads=3,
        num_key_value_heads=1, moe_intermediate_size=27, vocab_size=333, num_experts=41, num_experts_per_tok=5),
    row("qwen3-top1", "qwen3_moe", num_experts_per_tok=1, num_key_value_heads=4),
    row("qwen3-all-experts", "qwen3_moe", dialect="4", num_experts=4, num_experts_per_tok=4, norm_topk_prob=False),
    row("qwen3-window", "qwen3_moe", dialect="4", use_sliding_window=True, sliding_window=16, max_window_layers=3),
    row("qwen3-window-off", "qwen3_moe", use_sliding_window=False, sliding_window=16),
    row("qwen3-yarn", "qwen3_moe", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                                    "original_max_position_embeddings": 32}, "bfloat16"),
    row("qwen3-yarn-hub", "qwen3_moe", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "beta_fast": 16.0,
                                        "beta_slow": 2.0, "attention_factor": 0.9,
                                        "original_max_position_embeddings": 16}, dialect="4", norm_topk_prob=False),
    row("qwen3-yarn-mscale", "qwen3_moe", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7,
                                           "mscale_all_dim": 1.1, "truncate": False,
                                           "original_max_position_embeddings": 32}, "float16"),
    row("qwen3-llama3", "qwen3_moe", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, "bfloat16",
        head_dim=32),
    row("qwen3-dynamic", "qwen3_moe", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        max_position_embeddings=32),
    row("qwen3-linear-hub", "qwen3_moe", {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, "float16", "4"),
    row("mixtral-window", "mixtral", {"rope_type": "default", "rope_theta": 1e6}, "bfloat16", "4", "70KB", sliding_window=16),
    row("mixtral-full", "mixtral", {"rope_type": "default", "rope_theta": 1e6}, "float16", sliding_window=None),
    row("mixtral-linear-tied", "mixtral", {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}, dialect="4",
        tie_word_embeddings=True, head_dim=20),
    row("mixtral-dynamic-window", "mixtral", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        max_position_embeddings=32, sliding_window=24, head_dim=16),
    row("mixtral-yarn", "mixtral", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                    "original_max_position_embeddings": 32}, shard="50KB", head_dim=16),
]


def make(spec, folder, seed):
    """Writes the checkpoint; values are drawn so that norms, routers and residual stream are all far from trivial."""
    kind = {"qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, QWEN),
            "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, MIXTRAL)}[spec["family"]]
    config = kind[0](**{**kind[2], **spec["config"], "rope_parameters": dict(spec["rope"])})
    model = kind[1](config).eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if "norm" in name:
                p.copy_(1.0 + 0.25 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_(0.2 * noise)
            elif name.endswith("gate.weight"):
                p.copy_(0.4 * noise)
            else:
                p.copy_(noise * 1.2 / math.sqrt(p.shape[-1]))
    model.to(getattr(torch, spec["dtype"])).save_pretrained(folder, max_shard_size=spec["shard"] or "1GB")
    if spec["dialect"] == "4":
        path = os.path.join(folder, "config.json")
        with open(path, encoding="utf-8") as f:
            c = json.load(f)
        with open(path, "w", encoding="utf-8") as f:
            json.dump(hub_dialect(c), f, indent=2)


def hub_dialect(c):
    """The key names of releases on the hub, which transformers 4 wrote."""
    rope = c.pop("rope_parameters")
    c["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    c["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    c["torch_dtype"] = c.pop("dtype")
    if c["model_type"] == "qwen3_moe":
        c["num_experts"] = c.pop("num_local_experts", c.get("num_experts"))
    return c


def load(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    wrong = [k for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(k)]
    if wrong:
        raise SystemExit(f"{folder}: transformers reports {wrong}: {info}")
    return model.eval()


@torch.no_grad()
def reference(model, windows):
    """hidden.N, logits, router_logits.L, topk_index.L, topk_weight.L of all windows, one after the other, as dump_forward."""
    out, at = {}, {}
    layers = model.model.layers

    def note(key, value):
        at[key] = value.reshape(-1, value.shape[-1])

    def watch_router(layer):
        def hook(module, args, result):
            x = args[0].reshape(-1, args[0].shape[-1])
            weight, order = result[1].sort(dim=-1, descending=True, stable=True)
            note(f"router_logits.{layer}", x @ module.weight.T)
            note(f"topk_index.{layer}", result[2].gather(1, order))
            note(f"topk_weight.{layer}", weight)
        return hook

    handles = []
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(
            lambda m, a, k, i=i: note(f"hidden.{i}", a[0] if a else k["hidden_states"]), with_kwargs=True))
        handles.append(layer.register_forward_hook(
            lambda m, a, o, i=i: note(f"hidden.{i + 1}", o[0] if isinstance(o, tuple) else o)))
        if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
            handles.append(layer.mlp.gate.register_forward_hook(watch_router(i)))
    parts = [None] * len(windows)
    # Shortest first: dynamic scaling keeps the frequencies of the longest window so far.
    for w in sorted(range(len(windows)), key=lambda i: len(windows[i])):
        at.clear()
        logits = model(torch.tensor([windows[w]]), use_cache=False).logits[0]
        parts[w] = {"logits": logits, **{k: v.clone() for k, v in at.items()}}
    for h in handles:
        h.remove()
    for key in parts[0]:
        out[key] = torch.cat([p[key] for p in parts])
    return out


def loss(ref, windows):
    """Sum of next-token losses, their number, and log-probabilities of the scored positions, in float64."""
    at, total, rows = 0, 0.0, []
    for w in windows:
        lp = ref["logits"][at:at + len(w) - 1].double().log_softmax(-1)
        total -= lp.gather(1, torch.tensor(w[1:])[:, None]).sum().item()
        rows.append(lp)
        at += len(w)
    lp = torch.cat(rows)
    return total, len(lp), lp


def write_ids(path, windows):
    with open(path, "w", encoding="ascii") as f:
        f.writelines(" ".join(map(str, w)) + "\n" for w in windows)


class Check:
    """Counts what was compared and what differed."""

    def __init__(self):
        self.failed, self.ties, self.worst = 0, 0, {}

    def limit(self, where, what, value, limit):
        self.worst[what] = max(self.worst.get(what, 0.0), value)
        if not value <= limit:
            self.failed += 1
            print(f"  DIFFERS {where}: {what} {value:.3g}, limit {limit:g}")


def usable(ref, got, windows, check, where):
    """Tokens that no near-tie has touched: a flipped selection changes that token and, by attention, the later ones of its
    window in the layers that follow. A flip that is no near-tie is a failure."""
    good = torch.ones(sum(map(len, windows)), dtype=torch.bool)
    starts = torch.tensor([0] + [len(w) for w in windows]).cumsum(0)
    layers = sorted(int(k.split(".")[1]) for k in ref if k.startswith("topk_index"))
    for layer in layers:
        z, k = ref[f"router_logits.{layer}"], ref[f"topk_index.{layer}"].shape[1]
        # dump_forward's order is by weight, so equal lists mean the same experts in the same order
        same = (ref[f"topk_index.{layer}"].long() == got[f"topk_index.{layer}"].long()).all(1)
        broken = torch.zeros_like(good)
        for t in torch.nonzero(good & ~same).flatten().tolist():
            top = z[t].sort(descending=True).values
            margin = ((top[:k] - top[1:k + 1]) if k < len(top) else (top[:-1] - top[1:])).min().item()
            spread = (top[0] - top[-1]).item()
            sets = set(ref[f"topk_index.{layer}"][t].tolist()) == set(got[f"topk_index.{layer}"][t].tolist())
            if margin > TIE * spread:
                check.failed += 1
                print(f"  DIFFERS {where}: layer {layer} token {t}: experts {ref[f'topk_index.{layer}'][t].tolist()}, "
                      f"ours {got[f'topk_index.{layer}'][t].tolist()}, margin {margin:.3g} of {spread:.3g}")
            else:
                check.ties += 1
                print(f"  near-tie {where}: layer {layer} token {t}: margin {margin:.2g} of {spread:.3g}"
                      f"{' (order only)' if sets else ''}")
            if not sets:
                broken[t] = True
        for lo, hi in zip(starts[:-1].tolist(), starts[1:].tolist()):
            first = torch.nonzero(broken[lo:hi]).flatten()
            if len(first):
                good[lo + int(first[0]):hi] = False
    return good


def compare(spec_name, build, folder, windows, work, check, bf16=True):
    ids, path = os.path.join(work, "windows.ids"), os.path.join(work, "dump.safetensors")
    write_ids(ids, windows)
    tool = os.path.join(build, "tests", "dump_forward")
    model = load(folder)
    ref = reference(model, windows)
    subprocess.run([tool, "--threads", "2", folder, ids, path], check=True)
    got = load_file(path)
    missing = set(ref) ^ set(got)
    if missing:
        check.failed += 1
        print(f"  DIFFERS {spec_name}: tensors of one side only: {sorted(missing)}")
        return ref
    good = usable(ref, got, windows, check, spec_name)
    rel = {}
    for key in ref:
        if key.startswith("topk_index"):
            continue
        a, b = ref[key][good].double(), got[key][good].double()
        rel[key] = ((a - b).abs().max() / a.abs().max()).item()
        check.limit(spec_name, key.split(".")[0], rel[key], LIMIT)
    a, b = ref["logits"][good], got["logits"][good]
    other = int((a.argmax(-1) != b.argmax(-1)).sum())
    check.limit(spec_name, "top-1 differences", other, 0)
    line = f"logits {rel['logits']:.1e}, hidden {max(v for k, v in rel.items() if k[0] == 'h'):.1e}, top-1 {other} of {len(a)}"
    if bf16:
        subprocess.run([tool, "--threads", "2", "--compute", "bf16", folder, ids, path], check=True)
        low = load_file(path)["logits"]
        z = ref["logits"].double()
        rms = ((low.double() - z).pow(2).mean().sqrt() / z.pow(2).mean().sqrt()).item()
        check.limit(spec_name, "bf16 logits (rms)", rms, 0.5)
        line += f"; bf16 rms {rms:.1e}"
    print(f"{spec_name}: {line}" + ("" if bool(good.all()) else f"; {int((~good).sum())} tokens behind a near-tie left out"))
    return ref


def evaluate(build, folder, ids, seq_len, base=None):
    words = [os.path.join(build, "moecompress"), "eval", folder, "--text", ids, "--seq-len", str(seq_len), "--json", "-q"]
    out = subprocess.run(words + (["--base", base] if base else []), check=True, capture_output=True, text=True).stdout
    return json.loads(out)["overall"]


def drop_experts(folder, out, keep):
    """The checkpoint with the experts `keep` in every layer, by hand: weights renamed, router rows taken, config counted."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        config = json.load(f)
    tensors, kept = {}, {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            tensors.update(load_file(os.path.join(folder, name)))
    for name, t in tensors.items():
        parts = name.split(".")
        if "experts" in parts:
            at = parts.index("experts") + 1
            if int(parts[at]) not in keep:
                continue
            parts[at] = str(keep.index(int(parts[at])))
        elif name.endswith("mlp.gate.weight") or name.endswith("block_sparse_moe.gate.weight"):
            t = t[keep]
        kept[".".join(parts)] = t.contiguous()
    os.makedirs(out)
    save_file(kept, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    for key in ("num_experts", "num_local_experts"):
        if key in config:
            config[key] = len(keep)
    with open(os.path.join(out, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)


def compare_scores(name, build, folder, ref, windows, keep, work, check):
    """Perplexity, and KL and top-1 against a copy without some experts."""
    ids, small = os.path.join(work, "windows.ids"), os.path.join(work, "small")
    write_ids(ids, windows)
    longest = max(map(len, windows))
    drop_experts(folder, small, keep)
    total, n, base = loss(ref, windows)
    mine = evaluate(build, folder, ids, longest)
    check.limit(name, "perplexity", abs(math.exp(mine["cross_entropy"] - total / n) - 1), 1e-3)
    check.limit(name, "scored tokens", abs(mine["tokens"] - n), 0)
    low, _, lp = loss(reference(load(small), windows), windows)
    both = evaluate(build, small, ids, longest, base=folder)
    kl = (base.exp() * (base - lp)).sum(-1).mean().item()
    same = int((base.argmax(-1) == lp.argmax(-1)).sum())
    check.limit(name, "perplexity, pruned", abs(math.exp(both["cross_entropy"] - low / n) - 1), 1e-3)
    check.limit(name, "KL, pruned", abs(both["kl"] / kl - 1), 1e-3)
    check.limit(name, "top-1 agreement, pruned", abs(round(both["top1"] * n) - same), 0)
    print(f"{name}: perplexity {mine['perplexity']:.5f} (transformers {math.exp(total / n):.5f}); with {len(keep)} experts "
          f"{both['perplexity']:.5f} ({math.exp(low / n):.5f}), KL {both['kl']:.6f} ({kl:.6f}), top-1 {same} of {n}")


def random_windows(vocab, seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=rng).tolist() for n in LENGTHS]


def demo_windows(count, length):
    with open(os.path.join(DEMO, "samples.txt"), encoding="utf-8") as f:
        ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(f.read(), add_special_tokens=False).ids
    return [ids[i * length:(i + 1) * length] for i in range(count)]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--build", required=True)
    ap.add_argument("--only", help="fixtures whose name contains this")
    ap.add_argument("--keep", help="leave the fixtures in this folder")
    a = ap.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    check = Check()
    with tempfile.TemporaryDirectory() as folder:
        for i, spec in enumerate(FIXTURES):
            if a.only and a.only not in spec["name"]:
                continue
            work = os.path.join(folder, spec["name"])
            model = os.path.join(a.keep, spec["name"]) if a.keep else os.path.join(work, "model")
            os.makedirs(work)
            shutil.rmtree(model, ignore_errors=True)
            make(spec, model, 100 + i)
            windows = random_windows({**QWEN, **spec["config"]}["vocab_size"], i)
            ref = compare(spec["name"], a.build, model, windows, work, check)
            if spec["name"] in ("qwen3-sparse-step-tied-hub", "mixtral-window"):
                compare_scores(spec["name"], a.build, model, ref, windows, [0, 2, 3, 5, 7], work, check)
        if not a.only or a.only in "demo-model":
            windows = demo_windows(24, 128)
            ref = compare("demo-model", a.build, DEMO, windows, folder, check)
            compare_scores("demo-model", a.build, DEMO, ref, windows, [i for i in range(16) if i not in (1, 6, 11, 12)],
                           folder, check)
    print("worst: " + ", ".join(f"{k} {v:.2g}" for k, v in check.worst.items()))
    print(f"{check.ties} near-ties, {check.failed} differences")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
