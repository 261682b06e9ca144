"""An oracle that shares nothing with the package: the original eager module, frozen by detaching.

Every branch's output is detached, and so are 1/σ of each norm and each attention pattern. One branch, one head or one
neuron is scaled by α (or a constant, or one attention's values, are made a leaf). What differentiation then finds is
the direct effect, by definition. The library's own forward runs everywhere; hooks, a norm's forward and torch's
attention kernel are all that is put in its way, and the output has to stay what it was.
"""

import re
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from torch.nn import functional

POST_NORM_BLOCKS = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")


def tower_of(model):
    """The image tower: of a whole CLIP its visual part, else the model itself."""
    return getattr(model, "visual", model)


def trunk_of(model):
    """The module that holds the blocks: of open_clip's wrapper of timm models the trunk, else the tower itself."""
    tower = tower_of(model)
    return getattr(tower, "trunk", tower)


def blocks_of(model):
    """The blocks of a model of timm or open_clip."""
    trunk = trunk_of(model)
    return trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks


def pools_of(model):
    """The attention pools that stand behind the blocks."""
    pools = (getattr(trunk_of(model), name, None) for name in ("attn_pool", "attn_pool_contrastive"))
    return [pool for pool in pools if pool is not None]


def attentions_of(block):
    """What calls torch's attention in a block: the block itself where it has no module for that."""
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    return [block if hasattr(block, "in_split") else block.attn]


def mlps_of(block):
    """What holds the MLP's last layer in a block, likewise."""
    if hasattr(block, "ffns"):
        return [branch.mlp for branch in block.ffns]
    return [block if hasattr(block, "in_split") else block.mlp]


def last_layer(module, names):
    """The first of the layers named that the module has."""
    return next(layer for name in names if (layer := getattr(module, name, None)) is not None)


def frozen_norm(module):
    """A forward for a LayerNorm or RMSNorm whose statistic is detached."""

    def layer_norm(x):
        inverse = (x.var(-1, unbiased=False, keepdim=True) + module.eps).rsqrt().detach()
        return (x - x.mean(-1, keepdim=True)) * inverse * module.weight + module.bias

    def rms_norm(x):
        inverse = (x.square().mean(-1, keepdim=True) + module.eps).rsqrt().detach()
        return x * inverse * module.weight

    return layer_norm if isinstance(module, nn.LayerNorm) else rms_norm


def norms_on_the_way(model):
    """The norms that a branch's output, or an attention's values, meet before the representation."""
    trunk = trunk_of(model)
    found = [getattr(trunk, name, None) for name in ("norm_pre", "ln_pre", "norm", "fc_norm", "ln_post")]
    for block in blocks_of(model):
        behind = ("norm1", "norm2") if type(block).__name__ in POST_NORM_BLOCKS else ("ln_attn",)
        found += [getattr(block, name, None) for name in behind]
        found += [getattr(a, n, None) for a in attentions_of(block) for n in ("sub_norm", "norm", "ln_inner")]
    found += [getattr(pool, "ln_k", None) for pool in pools_of(model)]
    return [norm for norm in found if hasattr(norm, "eps")]


def whole(label):
    """A module whose output all belongs to one component."""
    return lambda inputs, out: {label: out}


def fused(module, width, attn, mlp):
    """A linear layer that attention and MLP share: its first columns are the attention's, its bias is the MLP's."""

    def shares(inputs, out):
        from_attn = functional.linear(inputs[0][..., :width], module.weight[:, :width])
        return {attn: from_attn, mlp: out - from_attn}

    return shares


def branch_ends(model):
    """Modules whose outputs are added to the stream, and functions that say which component has which share of them."""
    trunk = trunk_of(model)
    yield (trunk.patch_embed if hasattr(trunk, "patch_embed") else trunk.conv1), whole("embed")
    for i, block in enumerate(blocks_of(model)):
        attn, mlp = f"attn.{i}", f"mlp.{i}"
        if hasattr(block, "attns"):
            yield from ((branch.drop_path, whole(attn)) for branch in block.attns)
            yield from ((branch.drop_path, whole(mlp)) for branch in block.ffns)
        elif hasattr(block, "in_split") and block.out_proj is not None:
            yield block.out_proj, fused(block.out_proj, block.in_split[1], attn, mlp)
        else:
            pairs = (("attn_out_proj", "mlp_out_proj"), ("drop_path1", "drop_path2"), ("ls_1", "ls_2"))
            first, second = next(pair for pair in pairs if hasattr(block, pair[0]))
            yield getattr(block, first), whole(attn)
            yield getattr(block, second), whole(mlp)
    for pool in pools_of(model):
        if type(pool).__name__ == "AttentionPoolPrr":  # its queries are the image's: it is a component, and no path
            yield pool, whole("pool.attn")
        elif getattr(pool, "mlp", None) is not None:
            yield pool.mlp, whole("pool.mlp")


def head_places(block):
    """For each head what mixes it, the layer that reads it, and the columns that it has there."""
    for attn in attentions_of(block):
        layer = last_layer(attn, ("proj", "out_proj", "attn_out_proj"))
        width = (attn.in_split[1] if hasattr(attn, "in_split") else layer.in_features) // attn.num_heads
        for head in range(attn.num_heads):
            yield attn, layer, slice(head * width, (head + 1) * width)


def neuron_places(block):
    """For each neuron what holds it, the layer that reads it, and the column that it has there."""
    for mlp in mlps_of(block):
        layer = last_layer(mlp, ("fc2", "c_proj", "mlp_out_proj", "out_proj"))
        start = mlp.in_split[1] if hasattr(mlp, "in_split") and mlp.out_proj is not None else 0
        for column in range(start, layer.in_features):
            yield mlp, layer, slice(column, column + 1)


@contextmanager
def frozen_attention(model, mixed):
    """Torch's attention kernel by its definition, with a detached pattern.

    Args:
        model: An eager model of timm or open_clip.
        mixed: Called with the module at work, its pattern and its values; returns what is mixed.
    """
    at_work = []

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        assert not dropout_p
        assert not is_causal
        bias = 0 if attn_mask is None else attn_mask
        pattern = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1).detach()
        return mixed(at_work[-1], pattern, v)

    with ExitStack() as stack:
        for module in [attn for block in blocks_of(model) for attn in attentions_of(block)] + pools_of(model):
            enter = module.register_forward_pre_hook(lambda module, inputs: at_work.append(module))
            leave = module.register_forward_hook(lambda module, inputs, out: at_work.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        yield


@contextmanager
def frozen(model, *, scaled=None, alpha=None, place=None, kept=None, leaves=None):
    """The model with every branch, statistic and pattern detached.

    Args:
        model: An eager model of timm or open_clip.
        scaled: Label of the branch to scale by ``alpha``.
        alpha: A leaf that is one.
        place: Of a head or neuron to scale by ``alpha`` in place of a branch, as the places above.
        kept: Label of the branch through whose end gradients pass.
        leaves: A dictionary whose keys are attention modules; their values become leaves and are put there.
    """

    def mixed(module, pattern, values):
        if leaves is not None and module in leaves:
            # Differential attention mixes the same values twice.
            leaves[module] = values.detach().requires_grad_() if leaves[module] is None else leaves[module]
            values = leaves[module]
        out = pattern @ values
        if place is not None and module is place[0] and isinstance(module, nn.MultiheadAttention):
            # It uses its output layer without calling it, so the head is scaled where it is mixed.
            batch, heads, tokens, width = out.shape
            flat = scale(out.transpose(1, 2).reshape(batch, tokens, -1))
            return flat.reshape(batch, tokens, heads, width).transpose(1, 2)
        return out

    def scale(x):
        mask = torch.zeros_like(x)
        mask[..., place[2]] = 1
        return x.detach() * (1 + (alpha - 1) * mask)

    with ExitStack() as stack:
        stack.enter_context(frozen_attention(model, mixed))
        for module in norms_on_the_way(model):
            stack.enter_context(mock.patch.object(module, "forward", frozen_norm(module)))
        for module, shares in branch_ends(model):

            def at_end(module, inputs, out, shares=shares):
                parts = []
                for label, part in shares(inputs, out).items():
                    part = part if label == kept else part.detach()
                    parts.append(part * alpha if label == scaled else part)
                return sum(parts)

            stack.callback(module.register_forward_hook(at_end).remove)
        if place is not None:
            before = place[1].register_forward_pre_hook(lambda module, inputs: (scale(inputs[0]),))
            stack.callback(before.remove)
        yield


def representation(model, images):
    """What the design calls the representation."""
    tower = tower_of(model)
    if hasattr(tower, "forward_head"):
        return tower.forward_head(tower.forward_features(images), pre_logits=True)
    out = tower(images)
    return out[0] if isinstance(out, tuple) else out


def scores_of(model, images, direction, read, **how):
    """The scores of the frozen model, which are those of the model itself."""
    with frozen(model, **how):
        scores = read(model, images) @ direction
    with torch.no_grad():
        torch.testing.assert_close(scores.detach(), read(model, images) @ direction, rtol=1e-10, atol=1e-10)
    return scores


def branch_of(constant):
    """The branch that a constant is inside of, by its parameter's name; None outside the blocks."""
    inside = re.search(r"blocks\.(\d+)\.(attn|norm1|ln_attn)?", constant)
    return inside and ("attn" if inside[2] else "mlp") + f".{inside[1]}"


def contribution(model, images, direction, label, read=representation):
    """⟨direction, contribution⟩ an image: the derivative by α of what the label names.

    Args:
        model: An eager model of timm or open_clip.
        images: Images.
        direction: A vector.
        label: Of a layer (``mlp.0``), head (``L0H1``), neuron (``L0N7``), or a parameter's name for a constant.
        read: What gets the model and the images, and returns one vector an image.
    """
    part = re.fullmatch(r"L(\d+)([HN])(\d+)", label)
    constant = dict(tower_of(model).named_parameters()).get(label)
    leaf = torch.ones((), dtype=images.dtype, requires_grad=True) if constant is None else constant
    wanted = leaf.requires_grad
    leaf.requires_grad_()  # a fixed position embedding asks for none
    if part:
        layer, kind, number = int(part[1]), part[2], int(part[3])
        places = (head_places if kind == "H" else neuron_places)(blocks_of(model)[layer])
        branch = ("attn" if kind == "H" else "mlp") + f".{layer}"
        how = {"place": list(places)[number], "alpha": leaf, "kept": branch}
    elif constant is None:
        how = {"scaled": label, "alpha": leaf}
    else:
        how = {"kept": branch_of(label)}
    scores = scores_of(model, images, direction, read, **how)
    # Where a score reads no patch, as from a class token, the patches' own direct effect is none.
    how = {"retain_graph": True, "materialize_grads": True}
    found = [torch.autograd.grad(score, leaf, **how)[0] for score in scores]
    leaf.requires_grad_(wanted)
    return torch.stack([(gradient * leaf.detach()).sum() for gradient in found])


def value_scores(model, images, direction, layer, read=representation):
    """⟨direction, what each token's value vector writes⟩ as [head, batch, token], by perturbing values."""
    leaves = dict.fromkeys(attentions_of(blocks_of(model)[layer]))
    score = scores_of(model, images, direction, read, kept=f"attn.{layer}", leaves=leaves).sum()
    values = list(leaves.values())
    effects = [g * v.detach() for g, v in zip(torch.autograd.grad(score, values), values, strict=True)]
    return torch.cat([effect.sum(-1) for effect in effects], dim=1).transpose(0, 1)
