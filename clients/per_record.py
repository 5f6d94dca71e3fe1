"""Gradients of single records, clipped one by one and added up."""
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedcore.clients.data import Dataset
from fedcore.clients.task import Task
from fedcore.errors import UnsupportedModel
from fedcore.privacy.mechanism import Tally, clipped_sum
from fedcore.vectors import FlatModule

# Values of per-record gradients that are held at a time.
MOST_VALUES = 2**23
MOST_RECORDS = 1024
NORMALISED = (nn.modules.batchnorm._BatchNorm,)

# Gradients of a chunk of records at a point, shape (records, d).
Gradients = Callable[[Tensor, Tensor, Tensor], Tensor]


def refuse_mixing(module: nn.Module) -> None:
    """Raise `UnsupportedModel` for a model in which a record's gradient depends on other records."""
    for name, part in module.named_modules():
        if isinstance(part, NORMALISED):
            raise UnsupportedModel(
                f"{name or 'The model'} is {type(part).__name__}: it mixes the records of a batch, so no gradient "
                "belongs to one record and nothing can be promised about one. Use GroupNorm or LayerNorm."
            )


def record_gradients(task: Task, flat: FlatModule) -> Gradients:
    """Return the function that computes every record's gradient at a parameter vector.

    The model runs in evaluation mode: dropout would make a gradient depend on more than its record and the parameters.

    Raises:
        UnsupportedModel: the model mixes records.
    """
    refuse_mixing(flat.module)
    module, layout = flat.module, flat.layout
    fixed = {name: parameter.detach() for name, parameter in module.named_parameters() if not parameter.requires_grad}
    fixed |= dict(module.named_buffers())

    def loss(params: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        values = {**layout.views(params), **fixed}

        def forward(batch: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(module, values, (batch,))
            return found

        return task.loss(forward, inputs[None], targets[None])  # type: ignore[arg-type]

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def gradients(params: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        was_training = module.training
        module.eval()
        try:
            found: Tensor = each(params, inputs, targets)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UnsupportedModel(f"Gradients of single records cannot be computed for it: {reason}") from error
        finally:
            module.train(was_training)
        return found.detach()

    return gradients


def chunk_size(num_params: int) -> int:
    """Return for how many records gradients are computed at a time; it follows from the model alone."""
    return max(1, min(MOST_RECORDS, MOST_VALUES // num_params))


def summed_gradients(
    gradients: Gradients, data: Dataset, indices: Tensor, params: Tensor, clip_gradient: float, weight: float,
    previous: Tensor | None, clip_difference: float, tally: Tally | None = None,
) -> Tensor:
    """Return sum_z [ a clip(g_z(x), C1) + (1 - a) clip(g_z(x) - g_z(x'), C2 |x - x'|) ], shape (d,).

    Args:
        indices: which records.
        params: x, shape (d,).
        clip_gradient: C1.
        weight: a; 1 asks for gradients, 0 for differences.
        previous: x', shape (d,); not needed when a is 1.
        clip_difference: C2 |x - x'|, of two points that are known to the public.
        tally: counts what became of the records.

    Source: Murata and Suzuki, 2023, arXiv:2302.03884, algorithm 1; the mixture as in STORM-type estimators.
    """
    total, chunk = torch.zeros_like(params), chunk_size(len(params))
    for start in range(0, len(indices), chunk):
        inputs, targets = data.batch(indices[start:start + chunk])
        here = gradients(params, inputs, targets)
        if weight:
            found = clipped_sum(here, clip_gradient, tally)
            total = total + (found if weight == 1 else weight * found)
        if weight < 1 and clip_difference:
            assert previous is not None
            found = clipped_sum(here - gradients(previous, inputs, targets), clip_difference, tally)
            total = total + (found if weight == 0 else (1 - weight) * found)
    return total
