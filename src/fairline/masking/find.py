"""Finding a model's ReLUs and putting masks in their place.

An ``nn.ReLU`` that a forward pass calls once is swapped for its mask. Functions, and modules that are called several
times, are redirected from the lines of code that call them (:mod:`fairline.masking.redirect`). Either way the masked
model is a copy of the user's own object, whose code runs as it did.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fairline.errors import FairlineError
from fairline.masking.copying import copy_model, unwrap
from fairline.masking.equal import difference, same_random, tensors_of
from fairline.masking.layer import masked_relus
from fairline.masking.plan import Plan, others_of
from fairline.masking.published import take_over_published
from fairline.masking.surrogates import Surrogate
from fairline.masking.watch import ACTIVATIONS, Seen, count_calls, is_plain_relu, watch

logger = logging.getLogger(__name__)


def mask_relus(
    model: nn.Module, example: Tensor, surrogate: Surrogate | None = None, *, check: bool = True
) -> nn.Module:
    """Replace every ReLU of a model by a :class:`MaskedReLU` that keeps all of its units.

    A ReLU is whatever computes max(x, 0): ``nn.ReLU``, ``F.relu``, ``.relu()``, ``clamp`` with a minimum of 0 alone, or
    ``threshold`` with 0 and 0. A module that is called twice gets two masks. What runs only while training, and
    what no image reaches, stays as it is. Optional arguments of the forward keep their defaults.

    Args:
        model: Any module that maps a batch to a batch. It is not changed. Of a wrapper (``DataParallel``,
            ``DistributedDataParallel``, ``AveragedModel``, ``torch.compile``) the network inside is taken.
        example: Input, (B, …), B ≥ 1, of the shape that the model will see; its values do not matter.
        surrogate: What will stand in a ReLU's place; the identity by default, and what a masked model has already. See
            :meth:`MaskedReLU.use_surrogate`.
        check: Whether the copy is compared with the model, which takes most of the time; a network of an architecture
            that was compared before need not be.

    Returns:
        A copy with masks, of the model's own class. It equals the model in evaluation and in training mode: outputs,
        gradients, randomness and buffers. The names of its weights are the same; a surrogate that is learned adds
        its coefficients.

    Raises:
        FairlineError: The model has no ReLU, cannot be copied, has ReLUs that a mask cannot reach, or would not
            stay what it is.

    Example:
        >>> model = mask_relus(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
        >>> list(masked_relus(model))
        ['1']
        >>> masked_relus(model)["1"].set_mask(torch.tensor([True, False, False]))
        >>> masked_relus(model)["1"](torch.tensor([[-1.0, -1.0, 2.0]]))
        tensor([[ 0., -1.,  2.]])
    """
    model = unwrap(model)
    masked = copy_model(model) if masked_relus(model) else _mask_relus(model, example, check)
    if surrogate is not None:
        for layer in masked_relus(masked).values():
            layer.use_surrogate(surrogate)
    return masked


def _mask_relus(model: nn.Module, example: Tensor, check: bool) -> nn.Module:
    if not isinstance(example, Tensor) or example.ndim < 1 or len(example) < 1:
        what = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise FairlineError(f"An example input is a batch of images, (B, …), not {what}.")
    device = next((p.device for p in model.parameters()), example.device)
    batches = [_batch(example, seed).to(device) for seed in range(2)]
    plain = copy_model(model)
    if take_over_published(plain, batches[0]):
        model = copy_model(plain)
        if _missed(plain, batches[0], varies=False) is None:
            return plain
    _separate(plain)
    passes = _observe(plain, batches)
    plan = Plan.of(type(model).__name__, *passes)
    masked = plan.carry_out(copy_model(plain), device)
    if plan.in_place:
        strict = Plan.of(type(model).__name__, *passes, overwrite=True)
        overwriting = strict.carry_out(copy_model(plain), device)
        if _reads_again(masked, overwriting, batches[0]):
            plan, masked = strict, overwriting
    plan.require_no_checkpoint()
    if check:
        found = difference(model, masked, batches) or _missed(masked, batches[0], varies=plan.varies)
        if found is not None:
            raise FairlineError(f"{type(model).__name__} {found}.")
        _report(plain, *passes)
    return masked


def _report(model: nn.Module, evaluated: Sequence[Seen], trained: Sequence[Seen]) -> None:
    """Log what masks do not reach."""
    name = type(model).__name__
    if ACTIVATIONS & evaluated[0].others.keys():
        logger.warning("%s: masks act on its ReLUs alone%s", name, others_of(evaluated[0]))
    used = {call.relu for seen in (*evaluated, *trained) for call in seen.calls}
    idle = [path for path, module in model.named_modules() if is_plain_relu(module) and path not in used]
    if idle:
        logger.warning("%s: no forward pass called %s; they stay as they are", name, ", ".join(idle))


def _reads_again(masked: nn.Module, overwriting: nn.Module, images: Tensor) -> bool:
    """Whether anything reads the input of an in-place ReLU after it, and meets its output; seen under mixed masks."""
    outputs = []
    for each in (copy_model(masked).eval(), copy_model(overwriting).eval()):
        generator = torch.Generator().manual_seed(0)
        # Named differently, but in the same order.
        for layer in masked_relus(each).values():
            layer.set_mask(torch.rand(layer.shape, generator=generator) < 0.5)
        with torch.no_grad(), same_random(0):
            outputs.append(list(tensors_of(each(images.clone()))))
    return not all(torch.equal(*each) for each in zip(*outputs, strict=True))


def _batch(example: Tensor, seed: int, size: int = 2) -> Tensor:
    """Random images of the example's shape; whole numbers may be indices, and are the example's own."""
    if example.is_floating_point():
        generator = torch.Generator().manual_seed(seed)
        return torch.randn((size, *example.shape[1:]), generator=generator).to(example)
    return example[torch.arange(size) % len(example)]


def _separate(model: nn.Module) -> None:
    """One ReLU module in several places becomes one for each, and none is passed over."""
    seen: set[int] = set()
    for module in list(model.modules()):
        if hasattr(module, "activation_relu_or_gelu"):
            # Transformer layers would evaluate their own ReLU in one operator, whatever module stands there.
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]
        for name, child in module._modules.items():
            if child is None or not is_plain_relu(child):
                continue
            if id(child) in seen:
                module._modules[name] = twin = copy.copy(child)
                vars(twin).update({key: copy.copy(value) for key, value in vars(child).items()})
            seen.add(id(child))


def _observe(model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Seen], list[Seen]]:
    """What a model evaluates in evaluation mode, for each batch, and while training."""
    evaluated, trained = [], []
    observed = copy_model(model).eval()
    try:
        for images in (batches[0], torch.cat([batches[1], batches[1][:1]])):
            with same_random(0), torch.no_grad():
                evaluated.append(watch(observed, images.clone()))
    except FairlineError:
        raise
    except Exception as error:
        # The user's own forward may raise anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        shape = tuple(batches[0].shape)
        raise FairlineError(f"{type(model).__name__} fails on an example of shape {shape} ({reason}).") from None
    observed = copy_model(model).train()
    for seed, images in enumerate(batches):
        try:
            with same_random(seed), torch.enable_grad():
                trained.append(watch(observed, images.clone()))
        except Exception:
            # A model that does not train can be masked all the same.
            logger.info("%s fails in training mode", type(model).__name__, exc_info=True)
    return evaluated, trained


def _missed(masked: nn.Module, images: Tensor, *, varies: bool) -> str | None:
    """Whether each mask acts once in a forward pass, and no ReLU that an image reaches goes without.

    Args:
        masked: The masked model.
        images: (B, …).
        varies: Whether other images may call other ReLUs.

    Returns:
        What is wrong, in words; None if nothing is.
    """
    masked = copy_model(masked).eval()
    layers = masked_relus(masked)
    with torch.no_grad(), same_random(0):
        # Unwatched: some layers of torch take another way while they are watched.
        calls = count_calls(masked, images.clone())
        seen = watch(masked, images.clone())
    for call in seen.calls:
        if call.reached:
            return f"evaluates a ReLU of '{call.scope}' without its mask once it is masked"
    allowed = (0, 1) if varies else (1,)
    wrong = [name for name in layers if calls[name] not in allowed]
    return f"calls the mask '{wrong[0]}' {calls[wrong[0]]} times once it is masked" if wrong else None
