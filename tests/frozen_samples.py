"""What the tests of the frozen engine share: tiny modules around one operation, and how they are read out."""

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

IMAGE = (3, 4, 4)


def images(batch: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Bank(nn.Module):
    """Random parameters, made when they are first asked for: ``bank("weight", 3, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.ParameterDict()
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.made:
            self.made[name] = nn.Parameter(torch.randn(shape, generator=self.generator, dtype=torch.float64))
        return self.made[name]


class Lifted(nn.Module):
    """Images -> a nonlinear source of a given shape, with a hook on it -> a tail -> ``[batch, d]``."""

    def __init__(self, shape, tail) -> None:
        super().__init__()
        self.shape, self.tail, self.bank = tuple(shape), tail, Bank()
        self.hook_source = HookPoint()

    def lifted(self, name: str, x: Tensor, *shape: int) -> Tensor:
        """Something else that depends on the images."""
        weight = self.bank(name, torch.Size(shape).numel(), 48)
        return nn.functional.linear(x.flatten(1), weight).sin().view(-1, *shape)

    def source(self, x: Tensor) -> Tensor:
        return self.lifted("source", x, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.hook_source(self.source(x)), x)


def read_out(model: Lifted, y: Tensor, x: Tensor, skip=()) -> Tensor:
    """Linear read-outs side by side, each of which lets other factors own the dimensions of ``y``."""
    ways = {"flat": flat, "tokens": tokens, "mixed": mixed, "merged": merged, "heads": heads}
    ways |= {"columns": columns, "rows": rows, "values": values}
    outs = [way(model.bank, model, y, x) for name, way in ways.items() if name not in skip]
    return torch.cat([out for out in outs if out is not None], dim=1)


def flat(p, model, y, x):
    """Weights own every dimension."""
    y = y.flatten(1)
    return nn.functional.linear(y, p("flat", 2, y.shape[1]), p("flat_bias", 2))


def tokens(p, model, y, x):
    """A owns dimension 1, M the channels."""
    if y.dim() != 3:
        return None
    y = (y * p("tokens_weight", y.shape[1], 1)).mean(1)
    return nn.functional.linear(y, p("tokens", 2, y.shape[1]))


def mixed(p, model, y, x):
    """M owns dimension 1, A the channels."""
    if y.dim() != 3:
        return None
    y = (y * p("mixed_weight", y.shape[2])).sum(2)
    return nn.functional.linear(y, p("mixed", 2, y.shape[1]))


def merged(p, model, y, x):
    """Patch merging: two tokens become the channels of one."""
    if y.dim() != 3 or y.shape[1] % 2:
        return None
    y = y.reshape(-1, y.shape[1] // 2, 2 * y.shape[2])
    y = nn.functional.linear(y, p("merged", 3, y.shape[2])) * p("merged_weight", y.shape[1], 1)
    return y.mean(1)


def heads(p, model, y, x):
    """Values of two heads, split from the channels."""
    if y.dim() != 3 or y.shape[2] % 2:
        return None
    n, c = y.shape[1:]
    v = y.reshape(-1, n, 2, c // 2).transpose(1, 2)
    pattern = model.lifted("heads_scores", x, 2, n, n).softmax(-1)
    out = (pattern @ v).transpose(1, 2).reshape(-1, n, c)
    return nn.functional.linear(out, p("heads", 2, c))[:, 1]


def columns(p, model, y, x):
    """Channels first: A owns rows and columns."""
    if y.dim() != 4:
        return None
    y = (y * p("columns_weight", *y.shape[2:])).mean((2, 3))
    return nn.functional.linear(y, p("columns", 2, y.shape[1]))


def rows(p, model, y, x):
    """Channels last: A owns rows and columns."""
    if y.dim() != 4:
        return None
    y = (y * p("rows_weight", *y.shape[1:3], 1)).sum((1, 2))
    return nn.functional.linear(y, p("rows", 2, y.shape[1]))


def values(p, model, y, x):
    """``[batch, head, token, d_head]`` as the values of an attention: both factors own the heads."""
    if y.dim() != 4:
        return None
    h, n, d = y.shape[1:]
    pattern = model.lifted("values_scores", x, h, n, n).softmax(-1)
    out = (pattern @ y).transpose(1, 2).reshape(-1, n, h * d)
    return nn.functional.linear(out, p("values_out", 2, h * d))[:, n // 2]


def model_of(shape, operation, *, skip=()) -> Lifted:
    """A `Lifted` whose tail is one operation, read out in every way that fits its shape."""
    model = Lifted(shape, lambda m, s, x: read_out(m, operation(m.bank, m, s, x), x, skip))
    with torch.no_grad():
        model(images())  # makes the parameters
    return model.double().eval().requires_grad_(False)
