"""Compares layer-wise choice of experts (moec_choose_lu) with the same done by torch on transformers' own activations.

    python tests/interop/test_lu.py --build BUILD_DIR

For every layer of the demo model: hooks take the input and the output of transformers' MoE block; the outputs of all experts are computed
from its weights in float64, and the sum of the windows' errors without two and four experts for every choice of them.
BUILD_DIR/tests/dump_choice must choose the one with the least. Exit 0: nothing differs.
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

import checks
from checks import check

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(ROOT, "recipes", "demo-model")
WINDOW, TOKENS = 64, 256


def activations(model, ids):
    """(x, y) of each layer's MoE block, [T,H]."""
    taken = []

    def hook(_, args, out):
        y = out[0] if isinstance(out, tuple) else out
        taken.append((args[0].reshape(-1, args[0].shape[-1]), y.reshape(-1, y.shape[-1])))

    hooks = [layer.mlp.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor(ids).reshape(-1, WINDOW))
    for h in hooks:
        h.remove()
    return taken


def tensors(names):
    """The checkpoint's tensors of these names, in float64."""
    found = {}
    for file in os.listdir(DEMO):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(DEMO, file), "pt") as f:
                found.update({n: f.get_tensor(n).double() for n in f.keys() if n in names})
    return [found[n] for n in names]


def outputs(layer, x, experts):
    """[T,E,H]"""
    out = []
    for e in range(experts):
        gate, up, down = tensors([f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight" for p in ("gate", "up", "down")])
        out.append((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return torch.stack(out, 1)


def loss(kept, logits, out, y, top_k):
    z = torch.full_like(logits, -torch.inf)
    z[:, kept] = logits[:, kept]
    weight, index = torch.topk(torch.softmax(z, -1), min(top_k, len(kept)), -1)
    weight = weight / weight.sum(-1, keepdim=True)
    r = (weight.unsqueeze(-1) * torch.gather(out, 1, index.unsqueeze(-1).expand(-1, -1, out.shape[-1]))).sum(1)
    return (y - r).square().sum(-1).reshape(-1, WINDOW).sum(-1).sqrt().sum().item()


def best(keep, *args):
    """Scores of the best subset, and how much larger the second's loss is."""
    experts = args[0].shape[1]
    tried = sorted((loss(list(s), *args), s) for s in itertools.combinations(range(experts), keep))
    return [float(experts) if e in tried[0][1] else 0.0 for e in range(experts)], tried[1][0] / tried[0][0] - 1


def ours(a, layer, keep, x, y, logits):
    with tempfile.NamedTemporaryFile(suffix=".f32") as f:
        for t in (x, y, logits):
            f.write(t.float().contiguous().numpy().tobytes())
        f.flush()
        p = subprocess.run([os.path.join(a.build, "tests", "dump_choice"), DEMO, str(layer), str(keep), str(WINDOW), str(len(x)),
                            f.name], capture_output=True, text=True)
    check(p.returncode == 0, f"dump_choice: exit {p.returncode}: {p.stderr.strip()}")
    return [float(v) for v in p.stdout.split()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    a = parser.parse_args()
    text = open(os.path.join(DEMO, "samples.txt"), encoding="utf-8").read()
    ids = Tokenizer.from_file(os.path.join(DEMO, "tokenizer.json")).encode(text).ids
    ids = (ids * (TOKENS // len(ids) + 1))[:TOKENS]
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    for layer, (x, y) in enumerate(activations(model, ids)):
        router, = tensors([f"model.layers.{layer}.mlp.gate.weight"])
        logits = (x.double() @ router.T).float()
        args = (logits.double(), outputs(layer, x.double(), experts), y.double(), top_k)
        for keep in (experts - 2, experts - 4):
            want, gap = best(keep, *args)
            check(ours(a, layer, keep, x, y, logits) == want, f"layer {layer}: {keep} of {experts}")
            print(f"layer {layer}: {keep} of {experts} experts, the second is {gap:.1e} behind")
    sys.exit(checks.failed != 0)


main()
