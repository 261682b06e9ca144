"""An oracle that shares nothing with the package: the original eager module, frozen by detaching.

Every branch's output is detached, and so are 1/σ of each norm and each attention pattern. Each branch, or each head and
neuron, is scaled by an α of its own (constants, or one attention's values, are made leaves). What differentiation then
finds is the direct effect, by definition. The library's own forward runs everywhere; hooks, a norm's forward and
torch's attention kernel are all that is put in its way, and the output has to stay what it was.

Blocks are numbered in the order in which they run, through all stages. What has one sum with the stream is a block: of
a MaxViT block its convolution, its attention in windows and its attention in a grid are three.
"""

import re
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from torch.nn import functional


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
    if hasattr(trunk, "transformer"):
        return [*trunk.transformer.resblocks]
    stages = next((getattr(trunk, name) for name in ("layers", "stages") if hasattr(trunk, name)), None)
    if stages is not None:
        return [unit for stage in stages for block in stage.blocks for unit in units_of(block)]
    behind = ("blocks_token_only", "cls_attn_blocks")
    return [*trunk.blocks, *(block for name in behind for block in getattr(trunk, name, ()))]


def units_of(block):
    """What a block of a stage consists of: of timm's MaxViT blocks the parts that each add to the stream."""
    names = {"MaxxVitBlock": ("conv", "attn_block", "attn_grid"), "ParallelMaxxVitBlock": ("conv", "attn")}
    parts = [getattr(block, name) for name in names[type(block).__name__]] if type(block).__name__ in names else [block]
    for part in parts:
        if part is not None:
            yield from part if isinstance(part, nn.Sequential) else [part]


def pools_of(model):
    """The attention pools that stand behind the blocks."""
    pools = (getattr(trunk_of(model), name, None) for name in ("attn_pool", "attn_pool_contrastive"))
    return [pool for pool in pools if pool is not None]


def is_convolution(block):
    """Whether all of a block is one convolutional branch."""
    return type(block).__name__ in ("MbConvBlock", "ConvNeXtBlock")


def attentions_of(block):
    """What mixes values in a block: the block itself where it has no module for that."""
    if is_convolution(block):
        return []
    if hasattr(block, "attns"):
        return [branch.attn for branch in block.attns]
    if hasattr(block, "attn_grid"):
        return [block.attn_block, block.attn_grid]
    return [block if hasattr(block, "in_split") else block.attn]


def mlps_of(block):
    """What holds the MLP's last layer in a block, likewise."""
    if is_convolution(block):
        return []
    if hasattr(block, "ffns"):
        return [branch.mlp for branch in block.ffns]
    return [block if hasattr(block, "in_split") else block.mlp]


def last_layer(module, names):
    """The first of the layers named that the module has."""
    return next(layer for name in names if (layer := getattr(module, name, None)) is not None)


def frozen_norm(module):
    """A forward for a LayerNorm or RMSNorm whose statistic is detached."""
    channels = 1 if "2d" in type(module).__name__ else -1

    def layer_norm(x):
        x = x.movedim(channels, -1)
        inverse = (x.var(-1, unbiased=False, keepdim=True) + module.eps).rsqrt().detach()
        return ((x - x.mean(-1, keepdim=True)) * inverse * module.weight + module.bias).movedim(-1, channels)

    def rms_norm(x):
        inverse = (x.square().mean(-1, keepdim=True) + module.eps).rsqrt().detach()
        return x * inverse * module.weight

    return layer_norm if isinstance(module, nn.LayerNorm) else rms_norm


def norms_of(model):
    """All norms with a statistic, on the way to the representation or not; none that ends in an activation."""
    for module in tower_of(model).modules():
        is_norm = isinstance(module, nn.LayerNorm) or "rmsnorm" in type(module).__name__.lower()
        if is_norm and not hasattr(module, "act"):
            yield module


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
    embeddings = (getattr(trunk, name, None) for name in ("patch_embed", "stem", "conv1"))
    yield next(module for module in embeddings if module is not None), whole("embed")
    for i, block in enumerate(blocks_of(model)):
        attn, mlp = f"attn.{i}", f"mlp.{i}"
        if is_convolution(block):
            yield block.drop_path, whole(f"conv.{i}")
        elif hasattr(block, "attns"):
            yield from ((branch.drop_path, whole(attn)) for branch in block.attns)
            yield from ((branch.drop_path, whole(mlp)) for branch in block.ffns)
        elif hasattr(block, "in_split") and block.out_proj is not None:
            yield block.out_proj, fused(block.out_proj, block.in_split[1], attn, mlp)
        else:
            pairs = (("attn_out_proj", "mlp_out_proj"), ("drop_path1", "drop_path2"), ("ls_1", "ls_2"), ("attn", "mlp"))
            # In class attention what drop_path1 sees has the normed patches beside the attention's output.
            pairs = pairs[-1:] if "ClassAtt" in type(block).__name__ else pairs
            first, second = next(pair for pair in pairs if hasattr(block, pair[0]))
            yield getattr(block, first), whole(attn)
            yield getattr(block, second), whole(mlp)
            if hasattr(block, "local_mp"):
                yield block.drop_path3, whole(f"conv.{i}")
    for pool in pools_of(model):
        if type(pool).__name__ == "AttentionPoolPrr":  # its queries are the image's: it is a component, and no path
            yield pool, whole("pool.attn")
        elif getattr(pool, "mlp", None) is not None:
            yield pool.mlp, whole("pool.mlp")


def head_places(block):
    """For each head what mixes it, the layer that reads it, and the columns that it has there."""
    for attn in attentions_of(block):
        layer = last_layer(attn, ("proj", "out_proj", "attn_out_proj"))
        heads = attn.heads if type(attn).__name__ == "MaskUnitAttention" else attn.num_heads
        width = (attn.in_split[1] if hasattr(attn, "in_split") else width_of(layer)) // heads
        for head in range(heads):
            yield attn, layer, slice(head * width, (head + 1) * width)


def width_of(layer):
    """How many columns, or channels, a layer reads."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def neuron_places(block):
    """For each neuron what holds it, the layer that reads it, and the column that it has there."""
    for mlp in mlps_of(block):
        layer = last_layer(mlp, ("fc2", "c_proj", "mlp_out_proj", "out_proj"))
        start = mlp.in_split[1] if hasattr(mlp, "in_split") and mlp.out_proj is not None else 0
        for column in range(start, width_of(layer)):
            yield mlp, layer, slice(column, column + 1)


class Pattern:
    """What stands in for a pattern that a library multiplies by values itself: it says when that comes."""

    def __init__(self, pattern, mixed):
        self.pattern, self.mixed = pattern, mixed

    def __matmul__(self, values):
        return self.mixed(self.pattern.detach(), values)


@contextmanager
def frozen_attention(model, mixed):
    """Attention by its definition, with a detached pattern: torch's kernel, or what a library writes out.

    Args:
        model: An eager model of timm or open_clip.
        mixed: Called with the module at work, its pattern and its values; returns what is mixed.
    """
    at_work = []

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        assert not dropout_p
        assert not is_causal
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        bias = 0 if attn_mask is None else attn_mask
        pattern = (q @ k.mT * scale + bias).softmax(-1).detach()
        return mixed(at_work[-1], pattern, v)

    def written_out(module, inputs, out):
        return Pattern(out, lambda pattern, values: mixed(at_work[-1], pattern, values))

    with ExitStack() as stack:
        for module in [attn for block in blocks_of(model) for attn in attentions_of(block)] + pools_of(model):
            enter = module.register_forward_pre_hook(lambda module, inputs: at_work.append(module))
            leave = module.register_forward_hook(lambda module, inputs, out: at_work.pop() and None)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
            if isinstance(getattr(module, "attn_drop", None), nn.Module):
                stack.callback(module.attn_drop.register_forward_hook(written_out).remove)
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", attend))
        yield


@contextmanager
def frozen(model, *, branches=None, places=None, kept=(), leaves=None):
    """The model with every branch, statistic and pattern detached.

    Args:
        model: An eager model of timm or open_clip.
        branches: Leaves that are one, by the labels of the branches that they scale.
        places: Pairs of a place of heads or neurons, as above, and a leaf that is one and scales them, or None. What
            the layers of these places read is detached.
        kept: Labels of the branches through whose ends gradients pass.
        leaves: A dictionary whose keys are attention modules; their values become leaves and are put there.
    """
    branches, places, seen = branches or {}, places or [], set()

    def mixed(module, pattern, values):
        if leaves is not None and module in leaves:
            # Differential attention mixes the same values twice.
            leaves[module] = values.detach().requires_grad_() if leaves[module] is None else leaves[module]
            values = leaves[module]
        out = pattern @ values
        if isinstance(module, nn.MultiheadAttention) and module.out_proj in layers:
            # It uses its output layer without calling it, so heads are scaled where they are mixed.
            batch, heads, tokens, width = out.shape
            flat = scaled(module.out_proj, out.transpose(1, 2).reshape(batch, tokens, -1))
            return flat.reshape(batch, tokens, heads, width).transpose(1, 2)
        return out

    layers = {place[1] for place, _ in places}

    def scaled(layer, x):
        channels = 1 if isinstance(layer, nn.Conv2d) else -1
        scales = torch.ones(x.shape[channels], dtype=x.dtype)
        for (_, reader, columns), alpha in places:
            if reader is layer and alpha is not None:
                scales = torch.cat(
                    [scales[: columns.start], alpha.expand(columns.stop - columns.start), scales[columns.stop :]]
                )
        return (x.detach().movedim(channels, -1) * scales).movedim(-1, channels)

    with ExitStack() as stack:
        stack.enter_context(frozen_attention(model, mixed))
        for module in norms_of(model):
            stack.enter_context(mock.patch.object(module, "forward", frozen_norm(module)))
        for module, shares in branch_ends(model):

            def at_end(module, inputs, out, shares=shares):
                out, *others = out if isinstance(out, tuple) else (out,)
                parts = []
                for label, part in shares(inputs, out).items():
                    seen.add(label)
                    part = part if label in kept else part.detach()
                    parts.append(part * branches.get(label, 1))
                return (sum(parts), *others) if others else sum(parts)

            stack.callback(module.register_forward_hook(at_end).remove)
        for layer in layers:
            before = layer.register_forward_pre_hook(lambda module, inputs: (scaled(module, inputs[0]),))
            stack.callback(before.remove)
        yield
    assert not branches.keys() - seen, f"no branches of the model: {branches.keys() - seen}"


def representation(model, images):
    """What the design calls the representation: of a head with a hidden layer, what enters its activation."""
    tower = tower_of(model)
    hidden = getattr(getattr(tower, "head", None), "pre_logits", None)
    with ExitStack() as stack:
        if isinstance(hidden, nn.Sequential):
            stack.enter_context(mock.patch.object(hidden.act, "forward", lambda x: x))
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


def contributions(model, images, direction, labels, read=representation):
    """⟨direction, contribution⟩ an image, by label: the derivatives by α of what the labels name.

    Two runs find all of them: all that is scaled is detached, so no α shows in what another scales. In one the
    branches are scaled, each at its end; in the other heads and neurons, and constants lie behind these.

    Args:
        model: An eager model of timm or open_clip.
        images: Images.
        direction: A vector.
        labels: Of layers (``mlp.0``), heads (``L0H1``), neurons (``L0N7``), and parameters' names for constants: with
            a plus between them where several add up to one.
        read: What gets the model and the images, and returns one vector an image.
    """
    parameters, places, branches, constants = dict(tower_of(model).named_parameters()), {}, {}, {}
    for label in labels:
        one = torch.ones((), dtype=images.dtype, requires_grad=True)
        if part := re.fullmatch(r"L(\d+)([HN])(\d+)", label):
            of = head_places if part[2] == "H" else neuron_places
            places[label] = (list(of(blocks_of(model)[int(part[1])]))[int(part[3])], one)
        elif parameters.keys() >= set(label.split("+")):
            constants |= {name: parameters[name] for name in label.split("+")}
        else:
            branches[label] = one
    found = derivatives(model, images, direction, read, branches, branches=branches) if branches else {}
    if places or constants:
        blocks = blocks_of(model)
        all_places = [(place, None) for block in blocks for place in (*head_places(block), *neuron_places(block))]
        kept = {f"{branch}.{i}" for branch in ("attn", "mlp") for i in range(len(blocks))}
        how = {"places": [*places.values(), *all_places], "kept": kept}
        leaves = {label: alpha for label, (_, alpha) in places.items()} | constants
        found |= derivatives(model, images, direction, read, leaves, **how)
    return {label: sum(found[part] for part in label.split("+")) for label in labels}


def derivatives(model, images, direction, read, leaves, **how):
    """The derivative of every image's score by each leaf, times the leaf."""
    wanted = {label: leaf.requires_grad for label, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()  # a fixed position embedding asks for none
    scores = scores_of(model, images, direction, read, **how)
    # Where a score reads no patch, as from a class token, the patches' own direct effect is none.
    again = {"retain_graph": True, "materialize_grads": True}
    found = [torch.autograd.grad(score, list(leaves.values()), **again) for score in scores]
    for label, leaf in leaves.items():
        leaf.requires_grad_(wanted[label])
    return {
        label: torch.stack([(gradient * leaf.detach()).sum() for gradient in gradients])
        for (label, leaf), gradients in zip(leaves.items(), zip(*found, strict=True), strict=True)
    }


def contribution(model, images, direction, label, read=representation):
    """What `contributions` finds for one label."""
    return contributions(model, images, direction, [label], read)[label]


def value_scores(model, images, direction, layer, read=representation):
    """⟨direction, what each token's value vector writes⟩ as [head, batch, token], by perturbing values.

    Where tokens lie in windows the result has the axes of the library: [head, batch·window, token], and of Hiera
    [head, batch, window, token].
    """
    leaves = dict.fromkeys(attentions_of(blocks_of(model)[layer]))
    score = scores_of(model, images, direction, read, kept={f"attn.{layer}"}, leaves=leaves).sum()
    values = list(leaves.values())
    effects = [g * v.detach() for g, v in zip(torch.autograd.grad(score, values), values, strict=True)]
    # Cross-covariance attention mixes channels: its values are [batch, head, d_head, token].
    last = -2 if type(next(iter(leaves))).__name__ == "XCA" else -1
    return torch.cat([effect.sum(last) for effect in effects], dim=1).transpose(0, 1)
