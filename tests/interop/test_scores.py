"""Recomputes what every prune method ranks by, with torch and numpy, from transformers' own activations and weights.

    python tests/interop/test_scores.py --build BUILD_DIR

For the demo model and a small random Qwen3-MoE without renormalised weights: hooks on transformers' layers take the residual stream,
the router's input, logits, choice and weights of every token; each expert's un-gated output is computed from them in float64. The
scores of BUILD_DIR/moecompress prune must agree within 1e-5 of the largest of the layer, for one text and for two with weights.
Scores from routers and weights, STUN's clusters and the sharing out over layers are repeated by simple programs of their own; plans
of several shares must be contained in each other. Exit 0: nothing differs.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

import checks
from checks import check

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
LIMIT = 1e-5
QWEN = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=24, vocab_size=320,
            intermediate_size=80, moe_intermediate_size=32, num_experts=12, num_experts_per_tok=3, norm_topk_prob=False,
            mlp_only_layers=[1], max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2)


def run(a, *args):
    p = subprocess.run([os.path.join(a.build, "moecompress"), *args], capture_output=True, text=True)
    check(p.returncode == 0, f"{' '.join(args)}: exit {p.returncode}: {p.stderr.strip()}")
    return p.stdout


def plan(a, work, source, method, *args):
    path = os.path.join(work, "plan.json")
    run(a, "prune", source, "--method", method, "--plan-only", "--overwrite", "-q", "-o", path, *args)
    return json.load(open(path))


def scores(p):
    return np.array([layer["score"] for layer in p["layers"]])


def load(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager",
                                                             experts_implementation="eager").eval()


# ---- statistics of one text -------------------------------------------------------------------------------------------

def moe_layers(model):
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def observe(model, windows):
    """{name: [L, E]} sums over the tokens of one text, and its number of tokens."""
    layers = moe_layers(model)
    L, E = len(layers), layers[0].mlp.gate.weight.shape[0]
    s = {k: np.zeros((L, E)) for k in ("n", "g", "y", "yy", "gy", "gygy", "ugy", "prob", "seq", "top1", "topk", "first", "g1")}
    s["pairs"] = np.zeros((L, E, E))
    got = [{} for _ in layers]
    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, args, i=i: got[i].__setitem__("h", args[0][0].double())))
        hooks.append(layer.mlp.gate.register_forward_hook(
            lambda m, args, out, i=i: got[i].update(x=args[0].double(), z=out[0].double(), g=out[1].double(), id=out[2])))
    for ids in windows:
        with torch.no_grad():
            model(torch.tensor([ids]))
        for i, layer in enumerate(layers):
            add_window(s, i, got[i], layer.mlp.experts)
    for h in hooks:
        h.remove()
    s["tokens"] = sum(map(len, windows))
    return s


def add_window(s, i, o, experts):
    T, E = o["z"].shape
    gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
    half = gate_up.shape[1] // 2
    prob = torch.softmax(o["z"], dim=-1).numpy()
    z, g, chosen = o["z"].numpy(), o["g"].numpy(), o["id"].numpy()
    norm = np.zeros((T, E))
    r = torch.zeros_like(o["x"])
    weight = np.zeros((T, E))
    np.put_along_axis(weight, chosen, g, axis=1)
    hit = np.zeros((T, E), dtype=bool)
    np.put_along_axis(hit, chosen, True, axis=1)
    for e in range(E):
        y = (torch.nn.functional.silu(o["x"] @ gate_up[e, :half].T) * (o["x"] @ gate_up[e, half:].T)) @ down[e].T
        norm[:, e] = y.norm(dim=1).numpy()
        r += y * torch.tensor(weight[:, e:e + 1])
    after = o["h"] + r
    cosine = ((o["h"] * after).sum(1) / (o["h"].norm(dim=1) * after.norm(dim=1))).numpy()
    u = np.maximum(1 - cosine, 0)[:, None]
    k = chosen.shape[1]
    largest = np.argsort(-z, axis=1)[:, :k]
    s["n"][i] += hit.sum(0)
    s["g"][i] += weight.sum(0)
    s["y"][i] += (hit * norm).sum(0)
    s["yy"][i] += (hit * norm ** 2).sum(0)
    s["gy"][i] += (weight * norm).sum(0)
    s["gygy"][i] += (weight ** 2 * norm ** 2).sum(0)
    s["ugy"][i] += (u * weight * norm).sum(0)
    s["prob"][i] += prob.sum(0)
    s["seq"][i] += prob.mean(0)
    for t in range(T):
        s["top1"][i, largest[t, 0]] += z[t, largest[t, 0]]
        s["topk"][i, largest[t]] += z[t, largest[t]]
        first = chosen[t, np.argmax(g[t])]
        s["first"][i, first] += 1
        s["g1"][i, first] += g[t].max()
    s["pairs"][i] += hit.T.astype(float) @ hit.astype(float)


def expected(texts):
    """{method: [L, E]} of texts [(weight, statistics)]."""
    one = len(texts) == 1
    weigh = lambda w: 1.0 if one else w

    def total(key):
        if one:
            return texts[0][1][key]
        return sum(w * s[key] / s[key].sum(1, keepdims=True) for w, s in texts)

    def mean(key):
        count = sum(w * s["n"] for w, s in texts)
        return sum(w * s[key] for w, s in texts) / np.where(count > 0, count, 1)

    def per_token(key):
        return sum(weigh(w) * s[key] / s["tokens"] for w, s in texts)

    nllb = sum(weigh(w) * s["first"] / s["tokens"] * np.exp(s["g1"] / np.maximum(s["first"], 1)) for w, s in texts)
    return {"frequency": total("n"), "gate": total("g"), "ean-sum": total("y"), "ean-mean": mean("y"), "msan": mean("yy"),
            "reap": mean("gy"), "weighted-ean": total("gy"), "energy": total("gygy"), "easy-ep": total("ugy"),
            "unified": total("prob"), "seuf": total("seq"), "tcess": per_token("top1"), "tcess-k": per_token("topk"),
            "tcess-prob": per_token("g1"), "nllb": nllb}


def close(name, got, want):
    worst = (np.abs(got - want).max(1) / np.abs(want).max(1)).max()
    check(worst <= LIMIT, f"{name}: differs by {worst:.3g}")
    return worst


# ---- routers, weights, clusters ---------------------------------------------------------------------------------------

def weight_scores(model, base):
    rows = np.stack([l.mlp.gate.weight.detach().double().numpy() for l in moe_layers(model)])
    old = np.stack([l.mlp.gate.weight.detach().double().numpy() for l in moe_layers(base)])
    flat = np.stack([torch.cat([l.mlp.experts.gate_up_proj.detach().double().flatten(1),
                                l.mlp.experts.down_proj.detach().double().flatten(1)], dim=1).numpy() for l in moe_layers(model)])
    norm = np.linalg.norm
    return rows, flat, {"router-norm": norm(rows, axis=2) - norm(old, axis=2), "router-change": norm(rows - old, axis=2),
                        "router-row": norm(rows, axis=2), "weight-norm": norm(flat, axis=2),
                        "aimer": np.sqrt((flat ** 2).mean(2)) / np.abs(flat).mean(2)}


def agglomerate(distance, theta, k):
    """STUN's loop as it is written down, on a matrix."""
    v = distance.copy()
    np.fill_diagonal(v, np.inf)
    cluster = [{i} for i in range(len(v))]
    while v.min() < theta and len({id(c) for c in cluster}) > k:
        i, j = np.unravel_index(np.argmin(v), v.shape)
        tested = [(c, j) for c in cluster[i]] + [(c, i) for c in cluster[j]]
        if cluster[i] is not cluster[j] and max(v[p] for p in tested) < theta:
            for a, b in tested:
                v[a, b] = v[b, a] = np.inf
            both = cluster[i] | cluster[j]
            for c in both:
                cluster[c] = both
        else:
            v[i, j] = v[j, i] = np.inf
    return {frozenset(c) for c in cluster}


def stun(distance, flat, count, k):
    """Who is kept: the smallest theta that comes down to k clusters, by bisection; then the nearest to each mean."""
    values = sorted(distance[np.triu_indices(len(distance), 1)]) + [np.inf]
    lo, hi = -1, len(values) - 1
    while hi - lo > 1:
        mid = (lo + hi) // 2
        lo, hi = (lo, mid) if len(agglomerate(distance, values[mid], k)) <= k else (mid, hi)
    keep = {}
    for c in agglomerate(distance, values[hi], k):
        members = sorted(c)
        far = ((flat[members] - flat[members].mean(0)) ** 2).sum(1)
        best = members[int(np.argmin(far))]
        if len(members) == 2:
            best = members[int(count[members[1]] > count[members[0]])]
        keep[best] = len(members)
    return keep


def check_stun(a, name, work, source, stats, texts, rows, flat):
    count = sum(s["n"] for _, s in texts)
    E = rows.shape[1]
    for l1, l2 in ((1, 0), (0, 1), (0.5, 0.25)):
        for k in (E - 1, E * 3 // 4, E // 2, E // 4, 1):
            p = plan(a, work, source, "stun", "--keep", str(k), "--stats", stats, "--stun-lambda1", str(l1), "--stun-lambda2", str(l2))
            for i, layer in enumerate(p["layers"]):
                d = l1 * np.linalg.norm(rows[i][:, None] - rows[i][None], axis=2)
                total = sum(w for w, _ in texts)
                for w, s in texts:
                    pairs = s["pairs"][i]
                    d = d - l2 * w / total * pairs / pairs[np.triu_indices(E, 1)].mean()
                want = stun((d + d.T) / 2, flat[i], count[i], k)
                got = {e: int(layer["score"][e]) for e in layer["keep"]}
                check(got == want, f"{name}: stun {l1} {l2}, keep {k}, layer {i}: {got}, expected {want}")


def share_out(score, how, keep, least):
    """Experts kept of each layer: sets."""
    share = score / score.sum(1, keepdims=True)
    order = np.argsort(-share, axis=1, kind="stable")
    kept = [list(o[:least]) for o in order]
    pool = []
    for i, o in enumerate(order):
        mass = 0.0
        for e in o[least:]:
            mass += share[i, e]
            pool.append((mass if how == "mass" else -share[i, e], i, e))
    for _, i, e in sorted(pool, key=lambda x: x[:2])[:keep * len(score) - least * len(score)]:
        kept[i].append(e)
    return [sorted(map(int, k)) for k in kept]


def check_allocation(a, name, work, source, stats, want, top_k, E):
    for method in ("nllb", "reap", "frequency"):
        for how, least in (("global", top_k), ("mass", max(4, top_k)), ("mass", top_k + 1)):
            extra = () if how == "global" or least == max(4, top_k) else ("--min-experts", str(least))
            p = plan(a, work, source, method, "--stats", stats, "--keep", str(E // 2), "--allocation", how, *extra)
            got = [layer["keep"] for layer in p["layers"]]
            check(got == share_out(want[method], how, E // 2, least), f"{name}: {method} {how} {least}: {got}")


def check_nested(a, name, work, source, stats):
    for method, how in (("reap", "uniform"), ("nllb", "mass"), ("aimer", "global")):
        out = os.path.join(work, f"{name}-nested-{method}")
        run(a, "prune", source, "--method", method, "--stats", stats, "--remove", "10%,25%,0.5", "--allocation", how, "--plan-only",
            "-o", out, "-q")
        check(sorted(os.listdir(out)) == ["remove-10.json", "remove-25.json", "remove-50.json"], f"{name}: {os.listdir(out)}")
        plans = [json.load(open(os.path.join(out, f"remove-{r}.json"))) for r in (10, 25, 50)]
        for big, small in zip(plans, plans[1:]):
            for x, y in zip(big["layers"], small["layers"]):
                check(set(y["keep"]) <= set(x["keep"]), f"{name}: {method}: layer {x['layer']} is not contained")


# ---- the whole --------------------------------------------------------------------------------------------------------

def check_model(a, name, source, windows, work):
    texts, files = [], []
    model = load(source)
    for i, (part, weight) in enumerate(((windows[::2], 2.0), (windows[1::2], 0.5))):
        path = os.path.join(work, f"{name}-{i}.ids")
        with open(path, "w", encoding="ascii") as f:
            f.writelines(" ".join(map(str, w)) + "\n" for w in part)
        files.append(f"text{i}={path}:{weight}")
        texts.append((weight, observe(model, part)))
    E, top_k = model.config.num_experts, model.config.num_experts_per_tok
    worst = 0.0
    for n in (1, 2):
        stats = os.path.join(work, f"{name}-{n}.h5")
        run(a, "calibrate", source, "--text", *files[:n], "--seq-len", str(max(map(len, windows))), "-o", stats, "-q")
        want = expected(texts[:n])
        for method, score in want.items():
            p = plan(a, work, source, method, "--stats", stats, "--remove", "50%")
            worst = max(worst, close(f"{name}, {n} texts: {method}", scores(p), score))
        check_allocation(a, f"{name}, {n} texts", work, source, stats, want, top_k, E)
    base = os.path.join(work, name + "-base")
    torch.manual_seed(3)
    older = load(source)
    with torch.no_grad():
        for layer in moe_layers(older):
            layer.mlp.gate.weight += 0.01 * torch.randn_like(layer.mlp.gate.weight)
    older.save_pretrained(base)
    rows, flat, want = weight_scores(model, older)
    for method, score in want.items():
        extra = ("--base", base) if method in ("router-norm", "router-change") else ()
        worst = max(worst, close(f"{name}: {method}", scores(plan(a, work, source, method, "--keep", str(top_k), *extra)), score))
    check_stun(a, name, work, source, stats, texts, rows, flat)
    check_nested(a, name, work, source, stats)
    print(f"{name}: scores differ by {worst:.2g} of the largest")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    a = ap.parse_args()
    transformers.utils.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        with open(os.path.join(DEMO, "samples.txt"), encoding="utf-8") as f:
            ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(f.read(40000), add_special_tokens=False).ids
        lengths = [96, 64, 96, 17, 80, 96]
        starts = np.cumsum([0] + [400] * len(lengths))
        check_model(a, "demo-model", DEMO, [ids[s:s + n] for s, n in zip(starts, lengths)], work)
        torch.manual_seed(7)
        source = os.path.join(work, "qwen3-no-renorm")
        transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**QWEN)).save_pretrained(source)
        rng = np.random.default_rng(1)
        check_model(a, "qwen3-no-renorm", source, [rng.integers(0, 320, n).tolist() for n in (60, 50, 64, 40)], work)
    print(f"{checks.failed} differences")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
