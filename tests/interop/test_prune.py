"""Loads pruned checkpoints with transformers and compares them with the unpruned model whose removed experts cannot be chosen.

    python tests/interop/test_prune.py --build BUILD_DIR

For the demo model and for small random Qwen3-MoE and Mixtral checkpoints that are written here with transformers' own
save_pretrained (float32, bfloat16; one file, shards): BUILD_DIR/moecompress prunes by a random plan, and applies plans with
keep sets chosen here. Each output must load without a missing, unexpected or mismatched key, hold what its index and its
safetensors headers say, pass `verify`, and give the logits of the source with the removed experts' router logits at minus
infinity, within 1e-5 of the largest. Exit 0: nothing differs.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import torch
import transformers
from safetensors import safe_open

import checks
from checks import check

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
LIMIT = 1e-5

QWEN = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24, vocab_size=320,
            intermediate_size=80, moe_intermediate_size=32, num_experts=12, num_experts_per_tok=3, norm_topk_prob=True,
            mlp_only_layers=[1], max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2)
MIXTRAL = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
               intermediate_size=48, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=128,
               tie_word_embeddings=False, initializer_range=0.2)
FIXTURES = [
    ("qwen3-one-file", transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, QWEN, torch.float32, None),
    ("qwen3-shards", transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, QWEN, torch.bfloat16, "60KB"),
    ("qwen3-no-renorm", transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, {**QWEN, "norm_topk_prob": False},
     torch.bfloat16, None),
    ("mixtral-one-file", transformers.MixtralConfig, transformers.MixtralForCausalLM, MIXTRAL, torch.float32, None),
    ("mixtral-shards", transformers.MixtralConfig, transformers.MixtralForCausalLM, MIXTRAL, torch.bfloat16, "40KB"),
]


def load(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        check(not info.get(kind), f"{path}: {kind}: {info.get(kind)}")
    return model.eval()


def gates(model):
    """The routers, layer by layer: {layer: weight}."""
    found = {}
    for name, module in model.named_modules():
        part = name.split(".")
        if part[-1] == "gate" and getattr(module, "weight", None) is not None:
            found[int(part[part.index("layers") + 1])] = module.weight
    return found


class without_experts:
    """While it is entered, a linear layer with a router's weight gives minus infinity for the removed experts."""

    def __init__(self, model, keep):
        self.mask = {}
        for layer, weight in gates(model).items():
            mask = torch.full((weight.shape[0],), float("-inf"))
            mask[keep[layer]] = 0.0
            self.mask[id(weight)] = mask

    def __enter__(self):
        self.linear = plain = torch.nn.functional.linear

        def linear(x, w, b=None):
            y = plain(x, w, b)
            return y if id(w) not in self.mask else y + self.mask[id(w)]
        torch.nn.functional.linear = linear

    def __exit__(self, *_):
        torch.nn.functional.linear = self.linear


def run(a, *args):
    p = subprocess.run([os.path.join(a.build, "moecompress"), *args], capture_output=True, text=True)
    check(p.returncode == 0, f"{' '.join(args)}: exit {p.returncode}: {p.stderr.strip()}")
    return p.stdout


def check_files(path):
    files = [f for f in sorted(os.listdir(path)) if f.endswith(".safetensors")]
    where, total = {}, 0
    for f in files:
        with safe_open(os.path.join(path, f), "pt") as s:
            check((s.metadata() or {}).get("format") == "pt", f"{path}/{f}: metadata is {s.metadata()}")
            for name in s.keys():
                check(name not in where, f"{path}: {name} is in two shards")
                where[name] = f
                t = s.get_tensor(name)
                total += t.numel() * t.element_size()
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        index = json.load(open(index))
        check(index["weight_map"] == where, f"{path}: weight_map is not what the shards hold")
        check(index["metadata"]["total_size"] == total, f"{path}: total_size")
    else:
        check(files == ["model.safetensors"], f"{path}: {files} without an index")
    return len(where)


def compare(a, name, source, out, plan, ids):
    keep = {l["layer"]: l["keep"] for l in plan["layers"]}
    check_files(out)
    run(a, "verify", out, source, "-q")
    check(transformers.AutoConfig.from_pretrained(out).num_local_experts == len(plan["layers"][0]["keep"]),
          f"{name}: number of experts in config.json")
    model, pruned = load(source), load(out)
    with torch.no_grad(), without_experts(model, keep):
        want = model(ids).logits
    with torch.no_grad():
        got = pruned(ids).logits
        whole = load(source)(ids).logits
    diff, scale = (got - want).abs().max().item(), want.abs().max().item()
    check(diff <= LIMIT * scale, f"{name}: logits differ by {diff:.3g} of {scale:.3g}")
    check((whole - want).abs().max().item() > 100 * LIMIT * scale or len(keep) == 0, f"{name}: the removal changed nothing")
    print(f"{name}: {len(plan['layers'][0]['keep'])} experts, logits differ by {diff / scale:.2g} of the largest")


def prune_and_compare(a, name, source, ids, work, rng):
    plan_file, out = os.path.join(work, name + ".json"), os.path.join(work, name + "-half")
    run(a, "prune", source, "--method", "random", "--seed", "5", "--remove", "50%", "--plan-only", "-o", plan_file, "-q")
    run(a, "prune", source, "--method", "random", "--seed", "5", "--remove", "50%", "-o", out, "-q")
    plan = json.load(open(plan_file))
    compare(a, name + " 50%", source, out, plan, ids)
    n = plan["layers"][0]["experts"]
    for keep in (plan["top_k"], n - 1):
        for layer in plan["layers"]:
            layer["keep"] = sorted(rng.sample(range(n), keep))
            layer.pop("score", None)
        edited, out = os.path.join(work, f"{name}-{keep}.json"), os.path.join(work, f"{name}-{keep}")
        json.dump(plan, open(edited, "w"))
        run(a, "apply", source, edited, "-o", out, "-q")
        compare(a, f"{name} own plan", source, out, plan, ids)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--build", required=True)
    a = ap.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rng = random.Random(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        generator = torch.Generator().manual_seed(2)
        prune_and_compare(a, "demo-model", DEMO, torch.randint(0, 4096, (2, 96), generator=generator), work, rng)
        for i, (name, config, cls, numbers, dtype, shard) in enumerate(FIXTURES):
            torch.manual_seed(10 + i)
            source = os.path.join(work, name)
            model = cls(config(**numbers)).to(dtype)
            model.save_pretrained(source, **({"max_shard_size": shard} if shard else {}))
            ids = torch.randint(0, numbers["vocab_size"], (3, 40), generator=generator)
            prune_and_compare(a, name, source, ids, work, rng)
    print(f"{checks.failed} differences")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
