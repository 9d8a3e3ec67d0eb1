#!/usr/bin/env python3
"""Trains a small upcycled Mixture-of-Experts model and writes it as a Hugging Face Mixtral folder.

    python tests/models/make_upcycled.py --text FOLDER --tokenizer FILE --out DIR [--steps DENSE MOE | --minutes DENSE MOE]
           [--dense FILE] [--seed N] [--threads N] [--hidden N] [--layers N] [--width N] [--experts N] [--top-k N] ...

Upcycled (arXiv:2212.05055) means: a dense model is trained, the MLP of each layer is copied into every expert, a router is put in
front, and training goes on. Since the weights of a token's experts add up to 1, the copies give at first exactly what the dense
model gave; the experts then drift apart from one common point.

Why such a model is needed: tests and measurements of merging cannot do with one kind of model. Experts that were upcycled are
merging's best case: neuron j of one expert still corresponds to neuron j of another, and the mean of two experts lies near both.
Experts trained from scratch are its worst case: they share no order of neurons, and nothing says that they are alike in any order.
A method that is judged on one of the two alone is judged wrongly.

FOLDER holds *.txt, each of which is one stream; FILE is a tokenizer.json, which is copied. The share --held-out at the end of each
text is not trained on, only measured. The loss is cross-entropy in nats, in the second phase plus --balance times the
load-balancing loss of Switch and Mixtral, E * sum over experts of (selections per token * mean router probability), its mean over
layers; that is top-k when all experts are used alike. AdamW; the learning rate of each phase rises over its first 5 % and then falls
in a line to a tenth, in the second phase to 0.

With --steps the same seed, threads, machine and versions give the same bytes; with --minutes, which then counts instead, the
schedule follows the clock, and they do not. DIR gets config.json, model.safetensors (bf16, embedding and head tied), tokenizer.json,
tokenizer_config.json; --dense keeps the dense model's weights (torch.save, float32), or starts from that file where it exists.
Needs torch, safetensors, and tokenizers to read FILE. The defaults take some 8 minutes of one core and give 3.9 million parameters.
"""
import argparse
import copy
import glob
import json
import math
import os
import shutil
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

EPS, THETA = 1e-5, 10000.0


class Attention(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.dim, self.groups = a.head_dim, a.heads // a.kv_heads
        self.q_proj = nn.Linear(a.hidden, a.heads * a.head_dim, bias=False)
        self.k_proj = nn.Linear(a.hidden, a.kv_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.hidden, a.kv_heads * a.head_dim, bias=False)
        self.o_proj = nn.Linear(a.heads * a.head_dim, a.hidden, bias=False)

    def forward(self, x, cos, sin):
        def heads(y):
            return y.unflatten(-1, (-1, self.dim)).transpose(1, 2)

        def rotated(y):
            left, right = y.chunk(2, -1)
            return y * cos + torch.cat((-right, left), -1) * sin

        q, k, v = rotated(heads(self.q_proj(x))), rotated(heads(self.k_proj(x))), heads(self.v_proj(x))
        k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Expert(nn.Module):
    """w2(silu(w1 x) * w3 x): the dense model's MLP, and each expert made of it."""

    def __init__(self, hidden, width):
        super().__init__()
        self.w1, self.w3 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """A router and copies of one MLP. .balance is the load-balancing loss of the last forward."""

    def __init__(self, mlp, a):
        super().__init__()
        self.top_k = a.top_k
        self.gate = nn.Linear(a.hidden, a.experts, bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(a.experts))

    def forward(self, x):
        flat = x.flatten(0, -2)
        probs = self.gate(flat).softmax(-1)
        weight, chosen = probs.topk(self.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        share = F.one_hot(chosen, len(self.experts)).float().sum(1).mean(0)
        self.balance = len(self.experts) * (share * probs.mean(0)).sum()
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None])
        return out.view_as(x)


class Layer(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(a.hidden, EPS)
        self.self_attn = Attention(a)
        self.post_attention_layernorm = nn.RMSNorm(a.hidden, EPS)
        self.block_sparse_moe = Expert(a.hidden, a.width)  # becomes Experts

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.block_sparse_moe(self.post_attention_layernorm(x))


class Model(nn.Module):
    """Modules are named as in Mixtral's checkpoints, so that state_dict() is one (below "model.")."""

    def __init__(self, a):
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab, a.hidden)
        self.layers = nn.ModuleList(Layer(a) for _ in range(a.layers))
        self.norm = nn.RMSNorm(a.hidden, EPS)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        for layer in self.layers:
            for p in (layer.self_attn.o_proj.weight, layer.block_sparse_moe.w2.weight):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * a.layers))
        angle = torch.arange(a.seq_len)[:, None] / THETA ** (torch.arange(0, a.head_dim, 2) / a.head_dim)
        angle = torch.cat((angle, angle), -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids):
        """Mean cross-entropy of each token behind the first, in nats."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x[:, :-1]), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def upcycle(self, a):
        for layer in self.layers:
            layer.block_sparse_moe = Experts(layer.block_sparse_moe, a)

    def balance(self):
        return torch.stack([layer.block_sparse_moe.balance for layer in self.layers]).mean()


def read(a):
    """Token ids to train on, in one stream, and held-out windows [N, seq_len]."""
    tokenizer = Tokenizer.from_file(a.tokenizer)
    a.vocab, a.end = tokenizer.get_vocab_size(), tokenizer.token_to_id(a.eos)
    if a.end is None:
        raise SystemExit(f"{a.tokenizer}: has no token {a.eos}; give its end-of-text token with --eos")
    train, held = [], []
    for path in sorted(glob.glob(os.path.join(a.text, "*.txt"))):
        with open(path, encoding="utf-8") as f:
            ids = tokenizer.encode(f.read(), add_special_tokens=False).ids
        windows = int(len(ids) * a.held_out) // a.seq_len
        cut = len(ids) - windows * a.seq_len
        train += ids[:cut] + [a.end]
        held += ids[cut:]
    if len(train) <= a.seq_len:
        raise SystemExit(f"{a.text}: *.txt hold {len(train)} tokens to train on, more than --seq-len {a.seq_len} are needed")
    return torch.tensor(train), torch.tensor(held).view(-1, a.seq_len)


@torch.no_grad()
def perplexity(model, windows):
    model.eval()
    losses = [model(part).item() * len(part) for part in windows.split(64)]
    model.train()
    return math.exp(sum(losses) / len(windows)) if len(windows) else math.nan


@torch.no_grad()
def alikeness(model):
    """For each layer, over pairs of experts and neurons: mean and least cosine of neuron j (its rows of w1 and w3, its column of
    w2) in both experts, and the share of neurons to which no other neuron of the other expert is nearer than their own copy."""
    out = []
    for layer in model.layers:
        unit = [F.normalize(torch.cat((e.w1.weight, e.w3.weight, e.w2.weight.T), 1), dim=1)
                for e in layer.block_sparse_moe.experts]
        cosine = torch.stack([x @ y.T for i, x in enumerate(unit) for y in unit[:i]])
        own = cosine.diagonal(dim1=1, dim2=2)
        out.append((own.mean().item(), own.min().item(), (own >= cosine.amax(2)).float().mean().item()))
    return out


def train(a, model, ids, held, name, rate, last, steps, minutes):
    """One phase; `last` is the share of the learning rate that is left in the end."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    opt = torch.optim.AdamW([{"params": matrices, "weight_decay": a.decay}, {"params": others, "weight_decay": 0.0}],
                            lr=rate, betas=(0.9, 0.95))
    draw = torch.Generator().manual_seed(a.seed + (name == "moe"))
    began, step, seen, mean = time.monotonic(), 0, 0, [0.0, 0.0]
    while True:
        done = (time.monotonic() - began) / (60 * minutes) if minutes is not None else step / steps if steps else 1
        if step % a.report == 0 or done >= 1:
            n, line = max(1, step - seen), f"{name} step {step} {100 * done:.0f}% {time.monotonic() - began:.0f} s"
            line += f" loss {mean[0] / n:.4f} held-out perplexity {perplexity(model, held):.3f}"
            if name == "moe":
                line += f" balance {mean[1] / n:.3f} alike {' '.join(f'{layer[0]:.3f}' for layer in alikeness(model))}"
            print(line, flush=True)
            seen, mean = step, [0.0, 0.0]
        if done >= 1:
            return
        for group in opt.param_groups:
            group["lr"] = rate * min((done + 0.002) / 0.05, 1 - (1 - last) * done, 1)
        start = torch.randint(len(ids) - a.seq_len, (a.batch, 1), generator=draw)
        loss = model(ids[start + torch.arange(a.seq_len)])
        balance = model.balance() if name == "moe" else torch.zeros(())
        opt.zero_grad()
        (loss + a.balance * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        mean[0], mean[1], step = mean[0] + loss.item(), mean[1] + balance.item(), step + 1


def save(a, model):
    os.makedirs(a.out, exist_ok=True)
    tensors = {"model." + key: value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": a.vocab, "hidden_size": a.hidden,
        "intermediate_size": a.width, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_dim, "num_local_experts": a.experts,
        "num_experts_per_tok": a.top_k, "hidden_act": "silu", "rms_norm_eps": EPS, "rope_theta": THETA,
        "max_position_embeddings": a.seq_len, "sliding_window": None, "attention_dropout": 0.0, "initializer_range": 0.02,
        "output_router_logits": False, "router_aux_loss_coef": a.balance, "router_jitter_noise": 0.0,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": a.end, "use_cache": True, "torch_dtype": "bfloat16",
    }
    tokens = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": a.eos, "pad_token": a.eos}
    for name, value in (("config.json", config), ("tokenizer_config.json", tokens)):
        with open(os.path.join(a.out, name), "w", encoding="utf-8") as f:
            json.dump(value, f, indent=2)
            f.write("\n")
    shutil.copyfile(a.tokenizer, os.path.join(a.out, "tokenizer.json"))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("text", "tokenizer", "out"):
        ap.add_argument("--" + name, required=True)
    ap.add_argument("--steps", type=int, nargs=2, metavar=("DENSE", "MOE"), default=[1800, 1000])
    ap.add_argument("--minutes", type=float, nargs=2, metavar=("DENSE", "MOE"), default=[None, None])
    ap.add_argument("--dense", help="keep the dense model here; start from it where it exists")
    ap.add_argument("--eos", default="<|endoftext|>")
    for name, value in (("seed", 0), ("threads", 1), ("hidden", 128), ("layers", 4), ("width", 256), ("experts", 8), ("top-k", 2),
                        ("heads", 4), ("kv-heads", 2), ("head-dim", 32), ("seq-len", 128), ("batch", 8), ("report", 100)):
        ap.add_argument("--" + name, type=int, default=value)
    for name, value in (("dense-rate", 3e-3), ("moe-rate", 1e-3), ("balance", 0.02), ("decay", 0.1),
                        ("held-out", 0.03)):
        ap.add_argument("--" + name, type=float, default=value)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(a.seed)
    ids, held = read(a)
    model = Model(a)
    print(f"{len(ids)} tokens to train on, {held.numel()} held out; dense {sum(p.numel() for p in model.parameters())} parameters")
    if a.dense and os.path.exists(a.dense):
        model.load_state_dict(torch.load(a.dense))
    else:
        train(a, model, ids, held, "dense", a.dense_rate, 0.1, a.steps[0], a.minutes[0])
        if a.dense:
            torch.save(model.state_dict(), a.dense)
    torch.manual_seed(a.seed + 1)  # whether the dense model was trained now or read
    model.upcycle(a)
    print(f"upcycled {sum(p.numel() for p in model.parameters())} parameters")
    train(a, model, ids, held, "moe", a.moe_rate, 0.0, a.steps[1], a.minutes[1])
    for number, (mean, least, nearest) in enumerate(alikeness(model)):
        print(f"layer {number}: cosine of a neuron's copies {mean:.4f}, least {least:.4f}; nearest to its copy {100 * nearest:.2f}%")
    save(a, model)


if __name__ == "__main__":
    main()
