"""What a CLIP makes of texts, averaged over templates, and a name for the space that this lives in.

`TextBank.from_open_clip` is the way to use it; `space_of` is for whoever has image embeddings of the same CLIP.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from vitdecomp_lens.errors import InputError, UnsupportedModelError
from vitdecomp_lens.hooked import HookedViT
from vitdecomp_lens.hooked.checks import check_training
from vitdecomp_lens.weights import weights_hash

Tokenizer = Callable[[list[str]], Tensor]
Progress = Callable[[int, int], None]

_OF_LOGITS = ("logit_scale", "logit_bias")  # they scale similarities and move no embedding
_CLIP_VOCABULARY = 49408  # of the tokenizer that CLIP came with


def tower_of(clip: nn.Module) -> str | None:
    """The hash of a CLIP's image tower, as decompositions of it state it; None where it is no tower that has hooks."""
    try:
        return weights_hash(HookedViT(clip))
    except UnsupportedModelError:
        return None


def space_of(clip: nn.Module) -> str:
    """A name for the space of a CLIP's embeddings: its class, their width, and a hash of all that makes them.

    The hash is of the names, shapes and values of all parameters and stored buffers but the scale and bias of
    logits, and of the kinds of activation functions, because the same weights with another one are another space.
    Values count as float32: the space is the same on every device, and for a model taken to float64; for one taken
    to a half precision only where its weights are exact in that. SHA-256 reads about 1.5 GB a second, a ViT-L/14 in
    somewhat more than a second.

    Args:
        clip: An open_clip model, or any module with ``encode_text``.

    Returns:
        Such as ``"CLIP-512-0123456789abcdef"``.

    Raises:
        UnsupportedModelError: If the module embeds no texts.

    Example:
        >>> from vitdecomp_lens.testbed.models import build
        >>> space_of(build("clip")) == space_of(build("clip").double()), space_of(build("clip", seed=1))[:8]
        (True, 'CLIP-64-')
    """
    _check_clip(clip)
    digest = hashlib.sha256()
    for line in sorted(_functions(clip)):
        digest.update(line.encode())
    for name, tensor in sorted(clip.state_dict().items()):
        if name not in _OF_LOGITS:
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    widths = [getattr(getattr(clip, tower, None), "output_dim", None) for tower in ("visual", "text")]
    known = [str(width) for width in widths if isinstance(width, int)]
    return "-".join([type(clip).__name__, *known[:1], digest.hexdigest()[:16]])


def embedded(
    clip: nn.Module,
    texts: Sequence[str],
    *,
    templates: Sequence[str],
    tokenizer: Tokenizer,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Float[Tensor, "text d_clip"]:
    """The mean over templates of a text's unit embeddings, of unit length itself: CLIP's zero-shot recipe.

    Everything runs on the model's device and in its dtype, without gradients; what it gives is summed in float64.

    Args:
        clip: A model with ``encode_text``. Its mode is left as it is.
        texts: What goes into the templates.
        templates: Each with ``{}``, where a text goes.
        tokenizer: Gives the tokens of a list of texts.
        batch_size: How many prompts run at once; there is one for each text and template.
        progress: Called with the number of prompts done and of all prompts.

    Returns:
        On the CPU, in float64.

    Raises:
        UnsupportedModelError: If the module embeds no texts, or is in training mode with active dropout.
        InputError: If tokens do not fit the model, or it gives NaN, infinite or zero embeddings.
    """
    _check_clip(clip)
    _check_mode(clip)
    if batch_size < 1:
        raise InputError(f"Expected batch_size of at least 1; got {batch_size}.")
    prompts = [prompt for text in texts for prompt in formatted(text, templates)]
    device = next(clip.parameters()).device
    encode: Callable[[Tensor], Tensor] = clip.encode_text  # type: ignore[assignment]
    sums: Tensor | None = None
    for start in range(0, len(prompts), batch_size):
        several = prompts[start : start + batch_size]
        tokens = tokens_of(several, clip=clip, tokenizer=tokenizer)
        with torch.no_grad():
            rows = _units(encode(tokens.to(device)), several)
        text = torch.arange(start, start + len(several)) // len(templates)
        sums = rows.new_zeros(len(texts), rows.shape[1]) if sums is None else sums
        sums.index_add_(0, text, rows)
        if progress is not None:
            progress(start + len(several), len(prompts))
    if sums is None:
        raise InputError("Expected at least one text and one template; there is no prompt to embed.")
    return functional.normalize(sums, dim=1)


def formatted(text: str, templates: Sequence[str]) -> list[str]:
    """A text in each template. Braces within the text stay as they are.

    >>> formatted("set {1, 2}", ["{}", "the {}."])
    ['set {1, 2}', 'the set {1, 2}.']
    """
    return [template.replace("{}", text) for template in templates]


def tokens_of(texts: Sequence[str], *, clip: nn.Module, tokenizer: Tokenizer) -> Int[Tensor, "text token"]:
    """Tokens, if the model can read them.

    Raises:
        InputError: If the tokenizer is another model's, or cuts a text off.
    """
    tokens = tokenizer(list(texts))
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != len(texts) or tokens.is_floating_point():
        came = f"{tuple(tokens.shape)} of {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(
            f'Expected of the tokenizer Int[Tensor, "text token"] for {len(texts)} texts; got {came}. Pass '
            f"tokenizer=open_clip.get_tokenizer(NAME), NAME being the model's."
        )
    context, vocabulary = _reads(clip)
    if (context and tokens.shape[1] > context) or (vocabulary and int(tokens.max()) >= vocabulary):
        raise InputError(
            f"Expected tokens of a text tower that reads {context} tokens out of {vocabulary}; the tokenizer gives "
            f"{tokens.shape[1]}, up to number {int(tokens.max())}. It belongs to another model: pass "
            f"tokenizer=open_clip.get_tokenizer(NAME), NAME being the model's."
        )
    for text in _cut_off(texts, tokens, tokenizer):
        raise InputError(
            f"Expected texts of at most {tokens.shape[1] - 2} tokens with their template; the tokenizer cuts off "
            f"{text!r}. Shorten it."
        )
    return tokens


def default_tokenizer(clip: nn.Module) -> Tokenizer:
    """The tokenizer of a model that reads CLIP's own vocabulary; a model does not carry any other.

    Raises:
        UnsupportedModelError: If the module embeds no texts.
        InputError: If it has another vocabulary.
    """
    _check_clip(clip)
    context, vocabulary = _reads(clip)
    if vocabulary != _CLIP_VOCABULARY or not context:
        raise InputError(
            f"Expected tokenizer=, because {type(clip).__name__} reads {vocabulary or 'an unknown number of'} tokens "
            f"and not the {_CLIP_VOCABULARY} of CLIP's own tokenizer. Pass open_clip.get_tokenizer(NAME), NAME being "
            f"the model's; for the testbed's CLIP, vitdecomp_lens.testbed.vocabulary.tokenize."
        )
    import open_clip

    tokenizer: Tokenizer = open_clip.SimpleTokenizer(context_length=context)
    return tokenizer


def _check_clip(clip: nn.Module) -> None:
    if not callable(getattr(clip, "encode_text", None)):
        raise UnsupportedModelError(
            f"Expected a model that embeds texts, with encode_text, such as open_clip.create_model(...); got "
            f"{type(clip).__name__}. A HookedViT is an image tower: pass the CLIP that it was made from."
        )


def _check_mode(clip: nn.Module) -> None:
    for name, child in clip.named_children():
        if child.training and name != "visual":
            check_training(child)


def _reads(clip: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens the text tower reads, and how many there are."""
    holders = (clip, getattr(clip, "text", None))
    context, vocabulary = (
        next((n for n in (getattr(holder, name, None) for holder in holders) if isinstance(n, int) and n), None)
        for name in ("context_length", "vocab_size")
    )
    return context, vocabulary


def _functions(clip: nn.Module) -> Iterator[str]:
    """Where there are which modules without weights. Those that do nothing in evaluation mode do not count."""
    for path, module in clip.named_modules():
        kind = type(module).__name__
        idle = isinstance(module, nn.Identity) or "drop" in kind.lower()
        if not idle and next(module.children(), None) is None and not module.state_dict():
            yield f"{path} {kind};"


def _bytes(tensor: Tensor) -> memoryview:
    tensor = tensor.detach().cpu().to(torch.float32 if tensor.is_floating_point() else torch.int64)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _units(embeddings: Float[Tensor, "prompt d_clip"], prompts: Sequence[str]) -> Float[Tensor, "prompt d_clip"]:
    rows = embeddings.detach().cpu().double()
    lengths = rows.norm(dim=1, keepdim=True)
    sound = lengths.isfinite() & (lengths > 0)
    if not bool(sound.all()):
        first = int((~sound).nonzero()[0, 0])
        raise InputError(
            f"Expected embeddings that are finite and not zero; the model gives {prompts[first]!r} one of length "
            f"{float(lengths[first])}. Check its weights, and run it in float32."
        )
    return rows / lengths


def _cut_off(texts: Sequence[str], tokens: Int[Tensor, "text token"], tokenizer: Any) -> Iterator[str]:
    """Texts that lost their end. Only CLIP's own tokenizer can be asked; it says nothing of its own accord."""
    encode, end = getattr(tokenizer, "encode", None), getattr(tokenizer, "eot_token_id", None)
    if encode is None or end is None or not hasattr(tokenizer, "bpe_ranks"):
        return
    for row in (tokens[:, -1] == end).nonzero()[:, 0].tolist():
        if len(encode(texts[row])) > tokens.shape[1] - 2:
            yield texts[row]
