"""A vision transformer as somebody else might write one for TransformerLens: its names, weights by head, einsums."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint


@dataclass
class Shape:
    """What the model is built from."""

    image: int = 24
    patch: int = 6
    width: int = 12
    heads: int = 3
    head: int = 5
    hidden: int = 20
    depth: int = 3
    classes: int = 7


class Norm(nn.Module):
    """A layer norm with its scale and what it gives hooked."""

    def __init__(self, width):
        super().__init__()
        self.w = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
        return self.hook_normalized(x / scale) * self.w + self.b


def weight(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-2] ** 0.5)


class Heads(nn.Module):
    def __init__(self, s):
        super().__init__()
        for name in "QKV":
            setattr(self, f"W_{name}", weight(s.heads, s.width, s.head))
            setattr(self, f"b_{name}", nn.Parameter(torch.zeros(s.heads, s.head)))
        self.W_O = weight(s.heads, s.head, s.width)
        self.b_O = nn.Parameter(torch.zeros(s.width))
        for name in ("q", "k", "v", "attn_scores", "pattern", "z", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def project(self, x, name):
        projected = torch.einsum("btm,hmd->bthd", x, getattr(self, f"W_{name}")) + getattr(self, f"b_{name}")
        return getattr(self, f"hook_{name.lower()}")(projected)

    def forward(self, x):
        q, k, v = (self.project(x, name) for name in "QKV")
        scores = self.hook_attn_scores(torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
        pattern = self.hook_pattern(scores.softmax(-1))
        z = self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        return z.flatten(2) @ self.W_O.flatten(0, 1) + self.b_O


class Neurons(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.W_in, self.b_in = weight(s.width, s.hidden), nn.Parameter(torch.zeros(s.hidden))
        self.W_out, self.b_out = weight(s.hidden, s.width), nn.Parameter(torch.zeros(s.width))
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_post(gelu(self.hook_pre(x @ self.W_in + self.b_in))) @ self.W_out + self.b_out


class Layer(nn.Module):
    """Residuals are added in place; what a branch gives is scaled after its hook."""

    def __init__(self, s):
        super().__init__()
        self.ln1, self.ln2 = Norm(s.width), Norm(s.width)
        self.attn, self.mlp = Heads(s), Neurons(s)
        self.gain = nn.Parameter(torch.ones(2, s.width))
        for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(self, stream):
        stream = self.hook_resid_pre(stream)
        stream += self.gain[0] * self.hook_attn_out(self.attn(self.ln1(stream)))
        stream = self.hook_resid_mid(stream)
        stream += self.gain[1] * self.hook_mlp_out(self.mlp(self.ln2(stream)))
        return self.hook_resid_post(stream)


class ForeignViT(HookedRootModule):
    """Patches, a class token in front, blocks, and class scores of the class token."""

    def __init__(self, shape=None):
        super().__init__()
        self.shape = s = shape or Shape()
        side = s.image // s.patch
        self.W_E = weight(s.patch * s.patch * 3, s.width)
        self.cls = nn.Parameter(torch.randn(s.width))
        self.W_pos = nn.Parameter(torch.randn(side * side + 1, s.width))
        self.blocks = nn.ModuleList(Layer(s) for _ in range(s.depth))
        self.ln_final = Norm(s.width)
        self.W_U, self.b_U = weight(s.width, s.classes), nn.Parameter(torch.zeros(s.classes))
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()
        self.hook_unused = HookPoint()
        self.setup()

    def embed(self, images):
        p = self.shape.patch
        patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        return self.hook_embed(patches @ self.W_E)

    def forward(self, images):
        tokens = self.embed(images)
        tokens = torch.cat([self.cls.expand(tokens.shape[0], 1, -1), tokens], 1)
        stream = tokens + self.hook_pos_embed(self.W_pos)
        for block in self.blocks:
            stream = block(stream)
        return self.ln_final(stream)[:, 0] @ self.W_U + self.b_U
