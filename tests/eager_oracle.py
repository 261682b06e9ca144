"""An oracle that shares nothing with the package: the original eager module, frozen by detaching.

Every branch's output is detached, 1/σ of the norms on the way is detached, and one branch is scaled by α (or one
attention's values are made a leaf). What differentiation then finds is the direct effect, by definition.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn


def frozen_norm(module):
    """A forward for a LayerNorm or RMSNorm whose statistic is detached."""

    def layer_norm(x):
        inverse = (x.var(-1, unbiased=False, keepdim=True) + module.eps).rsqrt().detach()
        return (x - x.mean(-1, keepdim=True)) * inverse * module.weight + module.bias

    def rms_norm(x):
        inverse = (x.square().mean(-1, keepdim=True) + module.eps).rsqrt().detach()
        return x * inverse * module.weight

    return layer_norm if isinstance(module, nn.LayerNorm) else rms_norm


def frozen_pool(pool):
    """A forward for timm's attention pool whose pattern is detached and whose MLP is a source."""

    def forward(x, attn_mask=None):
        batch, tokens, width = x.shape
        query = pool.q(pool.latent.expand(batch, -1, -1)).reshape(batch, -1, pool.num_heads, pool.head_dim)
        keys, values = pool.kv(x).reshape(batch, tokens, 2, pool.num_heads, pool.head_dim).unbind(2)
        pattern = torch.einsum("bqhd,bkhd->bhqk", query * pool.scale, keys).softmax(-1).detach()
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, values).reshape(batch, -1, width)
        out = pool.proj(mixed)
        return (out + pool.mlp(pool.norm(out)).detach())[:, 0]

    return forward


def read_outs(model):
    """Modules between the stream and the representation that are frozen, with their frozen forwards."""
    for name in ("norm", "fc_norm", "ln_post"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module) and hasattr(module, "eps"):
            yield module, frozen_norm(module)
    for block in blocks_of(model):
        # Norms behind a branch lie between it and the stream.
        behind = ("norm1", "norm2") if type(block).__name__ == "ResPostBlock" else ("ln_attn",)
        for module in (getattr(block, name, None) for name in behind):
            if hasattr(module, "eps"):
                yield module, frozen_norm(module)
    if getattr(model, "attn_pool", None) is not None:
        yield model.attn_pool, frozen_pool(model.attn_pool)


def blocks_of(model):
    """The blocks of a model of timm or open_clip."""
    return model.blocks if hasattr(model, "blocks") else model.transformer.resblocks


def branch_ends(model):
    """The modules whose outputs are added to the stream, by the labels of layers."""
    for i, block in enumerate(blocks_of(model)):
        attn, mlp = ("drop_path1", "drop_path2") if hasattr(block, "drop_path1") else ("ls_1", "ls_2")
        yield f"attn.{i}", getattr(block, attn)
        yield f"mlp.{i}", getattr(block, mlp)


def out_projections(model):
    """Each block's attention output projection and number of heads."""
    for block in blocks_of(model):
        attn = block.attn
        yield (attn.proj if hasattr(attn, "proj") else attn.out_proj), attn.num_heads


@contextmanager
def frozen(model, *, scaled=None, alpha=None, head=None, value_layer=None, leaf=None):
    """The model with every branch detached but one.

    Args:
        model: An eager model of timm or open_clip.
        scaled: Label of the branch to scale by ``alpha``; with ``head``, of one of its heads.
        alpha: A leaf.
        head: Number of a head of the attention ``scaled``.
        value_layer: Layer whose attention passes gradients to its values.
        leaf: A dictionary that gets the query-key-value tensor of that layer as ``"qkv"``.
    """
    with ExitStack() as stack:
        for module, forward in read_outs(model):
            module.forward = forward
            stack.callback(module.__dict__.pop, "forward")
        for label, end in branch_ends(model):
            kept = label == f"attn.{value_layer}" or (label == scaled and head is not None)

            def at_end(module, inputs, out, label=label, kept=kept):
                if kept:
                    return out
                return out.detach() * alpha if label == scaled else out.detach()

            handle = end.register_forward_hook(at_end)
            stack.callback(handle.remove)
        for i, (projection, heads) in enumerate(out_projections(model)):
            if head is not None and scaled == f"attn.{i}":

                def before(module, inputs, heads=heads):
                    split = inputs[0].detach().unflatten(-1, (heads, -1))
                    factor = torch.ones(heads, 1, dtype=split.dtype).index_put(
                        (torch.tensor([head]),), alpha.reshape(1, 1)
                    )
                    return ((split * factor).flatten(-2),)

                handle = projection.register_forward_pre_hook(before)
                stack.callback(handle.remove)
        if value_layer is not None:

            def at_qkv(module, inputs, out):
                leaf["qkv"] = out.detach().requires_grad_()
                return leaf["qkv"]

            handle = model.blocks[value_layer].attn.qkv.register_forward_hook(at_qkv)
            stack.callback(handle.remove)
        yield


def representation(model, images):
    """What the design calls the representation."""
    if hasattr(model, "forward_head"):
        return model.forward_head(model.forward_features(images), pre_logits=True)
    return model(images)


def contribution(model, images, direction, label, *, head=None):
    """⟨direction, contribution⟩ an image: the derivative by α of one branch, or of one head."""
    found = []
    for image in images.split(1):
        alpha = torch.ones((), dtype=images.dtype, requires_grad=True)
        with frozen(model, scaled=label, alpha=alpha, head=head):
            score = representation(model, image) @ direction
        found.append(torch.autograd.grad(score.sum(), alpha)[0])
    return torch.stack(found)


def value_scores(model, images, direction, layer):
    """⟨direction, what each token's value vector writes⟩ as [head, batch, token], by perturbing values."""
    leaf = {}
    with frozen(model, value_layer=layer, leaf=leaf):
        score = (representation(model, images) @ direction).sum()
    (gradient,) = torch.autograd.grad(score, leaf["qkv"])
    attn = model.blocks[layer].attn
    effect = (gradient * leaf["qkv"].detach()).unflatten(-1, (3, attn.num_heads, -1))
    return effect[:, :, 2].sum(-1).permute(2, 0, 1)
