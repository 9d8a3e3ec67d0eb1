"""Runs a Mixture-of-Experts model as moecompress wrote it: one whose experts' matrices are factors (config.json:
moecompress_factors), or one whose router has more rows than there are experts (moecompress_map).

    transformers.AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The architecture's own class is made (config.architectures), and in each of its layers the module with all experts' matrices is
replaced by one that computes with the factors:

    pivot         some rows of A B x, the others from these
    svd, mc-smoe  y = A (B x) (+ S x, S zero but for some rows)    base-delta  y = M x + A (B x)    mpo  y = (T_1 .. T_n) x

Or that module has fewer experts, which rows of the router share: what is selected is looked up in the layer's table first, and an
expert that is selected twice adds both weights.

Needs transformers 5, where experts are one module with gate_up_proj [E, 2I, H] and down_proj [E, H, I].
"""
import re
import types

import torch
import transformers
from torch import nn
from torch.nn.functional import linear


class FactoredExperts(nn.Module):
    """Takes the place of `experts`: same arguments, same result but for what the factors leave out."""

    def __init__(self, experts, spec):
        super().__init__()
        self.method = spec["method"]
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts.down_proj.shape
        self.act_fn = experts.act_fn
        self._apply_gate = types.MethodType(type(experts)._apply_gate, self)
        like = experts.down_proj
        for name, shape in spec["tensors"].items():
            shape = shape if name in spec["shared"] else [self.num_experts, *shape]
            if name.endswith("_index"):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.int32, device=like.device))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device)))
        for name in ("alpha", "limit"):  # of activations that have bounds
            if hasattr(experts, name):
                setattr(self, name, getattr(experts, name))

    def train_matrix(self, name, expert, rows, cols):
        """Dense matrix of a tensor train: cores [D, out, in, D'], contracted from the left."""
        cores = [getattr(self, name)[expert]]
        while hasattr(self, f"{name}_core{len(cores) + 1}"):
            cores.append(getattr(self, f"{name}_core{len(cores) + 1}")[expert])
        w = cores[0].reshape(-1, cores[0].shape[-1])
        for core in cores[1:]:
            w = (w @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
        n = len(cores)
        w = w.reshape([size for core in cores for size in core.shape[1:3]])  # o_1 i_1 o_2 i_2 ..
        return w.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).reshape(rows, cols)

    def product(self, name, expert, x, rows):
        """W' x without what all experts share."""
        if self.method == "mpo":
            return linear(x, self.train_matrix(name, expert, rows, x.shape[-1]))
        if self.method == "pivot":  # some rows, and the others as combinations of them
            z = linear(x, getattr(self, name + "_in")[expert])
            y = torch.cat((z, linear(z, getattr(self, name)[expert])), -1)
            return torch.empty_like(y).index_copy(1, getattr(self, name + "_index")[expert].long(), y)
        y = linear(linear(x, getattr(self, name + "_in")[expert]), getattr(self, name)[expert])
        if hasattr(self, name + "_rows"):
            y = y.index_add(1, getattr(self, name + "_index")[expert], linear(x, getattr(self, name + "_rows")[expert]))
        return y

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        based = self.method == "base-delta"
        if based:  # the base is multiplied once a token: in front for gate and up, for down behind the weighted sum
            gate_base, up_base = linear(hidden_states, self.gate_proj_base), linear(hidden_states, self.up_proj_base)
            mixed = hidden_states.new_zeros(hidden_states.shape[0], self.intermediate_dim)
        for expert in top_k_index.unique().tolist():
            if expert < 0 or expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            x, weight = hidden_states[token], top_k_weights[token, slot, None]
            gate = self.product("gate_proj", expert, x, self.intermediate_dim)
            up = self.product("up_proj", expert, x, self.intermediate_dim)
            if based:
                gate, up = gate + gate_base[token], up + up_base[token]
            act = self._apply_gate(torch.cat((gate, up), -1))
            out.index_add_(0, token, (self.product("down_proj", expert, act, self.hidden_dim) * weight).to(out.dtype))
            if based:
                mixed.index_add_(0, token, (act * weight).to(mixed.dtype))
        return out + linear(mixed, self.down_proj_base) if based else out


_shared = {}


def shared_class(base):
    """A class of experts, and of its name, whose number is looked up first."""
    if base not in _shared:
        def forward(self, hidden_states, top_k_index, top_k_weights):
            at = top_k_index.device
            if at not in self.tables:  # no buffer: those that no file has are lost where models are made without memory
                self.tables[at] = torch.tensor(self.expert_of_row, device=at)
            return base.forward(self, hidden_states, self.tables[at][top_k_index], top_k_weights)

        _shared[base] = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})
    return _shared[base]


def share_experts(experts, table):
    """`table`: number of the expert that each row of the router leads to."""
    n = 1 + max(table)
    for name in ("gate_up_proj", "down_proj"):
        old = getattr(experts, name)
        if old.shape[0] != len(table):
            raise ValueError(f"moecompress_map: {len(table)} rows, config.json says {old.shape[0]} experts")
        setattr(experts, name, nn.Parameter(torch.empty((n, *old.shape[1:]), dtype=old.dtype, device=old.device)))
    experts.num_experts = n
    experts.expert_of_row, experts.tables = table, {}
    experts.__class__ = shared_class(type(experts))


def experts_of(model):
    found = [(parent, name, child, at + "." + name) for at, parent in model.named_modules() for name, child in parent.named_children()
             if name == "experts" and hasattr(child, "down_proj") and hasattr(child, "gate_up_proj")]
    if not found or not all(hasattr(child, "_apply_gate") for _, _, child, _ in found):
        raise ValueError(f"{type(model).__name__} of transformers {transformers.__version__} has no modules with all experts' "
                         "matrices that could be replaced; transformers 5 is needed")
    return found


def replace_experts(model, config):
    for parent, name, child, at in experts_of(model):
        if hasattr(config, "moecompress_factors"):
            setattr(parent, name, FactoredExperts(child, config.moecompress_factors))
        else:
            share_experts(child, config.moecompress_map[re.search(r"layers\.(\d+)\.", at).group(1)])


_classes = {}


def compressed_class(base):
    """A class of the architecture, and of its name, that has these experts."""
    if base not in _classes:
        def init(self, config, *args, **kwargs):
            base.__init__(self, config, *args, **kwargs)
            replace_experts(self, config)

        _classes[base] = type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})
    return _classes[base]


class CompressedForCausalLM:
    """What auto_map names: makes the class that config.architectures says."""

    @staticmethod
    def _of(config):
        base = getattr(transformers, config.architectures[0])
        ours = hasattr(config, "moecompress_factors") or hasattr(config, "moecompress_map")
        return compressed_class(base) if ours else base

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        pass

    @classmethod
    def from_pretrained(cls, path, *args, config=None, **kwargs):
        config = transformers.AutoConfig.from_pretrained(path) if config is None else config
        return cls._of(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config, **kwargs):
        return cls._of(config)._from_config(config, **kwargs)
