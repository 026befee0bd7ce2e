# SPDX-License-Identifier: Apache-2.0
"""What is asked of every model beside an oracle: equal outputs, losses and gradients, in each dtype; compile; export.

``ours`` and ``theirs`` are two modules with equal weights, which a converter saw to. ``call(model, images)`` gives the
tensor, or the scalar loss, whose gradients count; it is the model itself if not given.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

Call = Callable[[nn.Module, Tensor], Tensor]
Gradients = dict[str, Tensor | None]


def randomise(model: nn.Module, std: float = 0.2, seed: int = 0) -> nn.Module:
    """Gives every parameter random values, so that none hides at its initial zero or one, and buffers of norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.float64) + 0.5)
    return model


def plain_call(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output."""
    return model(images)


def loss_of(output: Tensor) -> Tensor:
    """A loss that weighs every element differently; a scalar is its own."""
    if output.ndim == 0:
        return output
    rows = output.reshape(-1, output.shape[-1])
    return cross_entropy(rows, torch.arange(len(rows), device=rows.device) % rows.shape[1])


def outputs_and_gradients(model: nn.Module, images: Tensor, call: Call = plain_call) -> tuple[Tensor, Gradients]:
    """The output, and the gradient of its loss for the images (where they are float) and for every parameter."""
    model.zero_grad(set_to_none=True)
    if images.is_floating_point():
        images = images.detach().clone().requires_grad_()
    output = call(model, images)
    loss_of(output).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.detach(), ({"images": images.grad} if images.is_floating_point() else {}) | gradients


def assert_same(
    ours: nn.Module,
    theirs: nn.Module,
    images: Tensor,
    call: Call = plain_call,
    their_call: Call | None = None,
    *,
    converted: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    tolerance: float = 1e-9,
    no_gradient: tuple[str, ...] = (),
) -> None:
    """Asserts equal outputs and equal gradients of every parameter.

    Args:
        ours, theirs, images: in float64.
        call, their_call: how each is called; ``call`` for both if only that is given.
        converted: turns a dict of their gradients into our names; not needed where the names are equal.
        tolerance: relative to the largest element of a tensor.
        no_gradient: our parameters that rightly get none, or only zeros.
    """
    output, gradients = outputs_and_gradients(ours, images, call)
    expected, their_gradients = outputs_and_gradients(theirs, images, their_call or call)
    image_gradient = their_gradients.pop("images", None)
    their_gradients = converted(their_gradients)
    if image_gradient is not None:
        their_gradients["images"] = image_gradient
    _assert_near("output", output, expected, tolerance)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        if name in no_gradient:
            assert gradient is None or not gradient.any(), f"{name} should have no gradient"
            continue
        assert gradient is not None and gradient.abs().max() > 0, f"{name} should have a gradient"
        _assert_near(f"gradient of {name}", gradient, their_gradients[name], tolerance)


def _assert_near(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    atol = tolerance * float(theirs.abs().max())
    assert_close(ours, theirs, atol=atol, rtol=0.0, msg=lambda text: f"{name}: {text}")


def assert_float32_rule(model: nn.Module, images: Tensor, call: Call = plain_call) -> None:
    """In float32 no gradient is further from float64's than 1e-5 of it, or 1e-7 of the largest of all gradients."""
    exact_output, exact = outputs_and_gradients(copy.deepcopy(model).double(), images.double(), call)
    output, gradients = outputs_and_gradients(copy.deepcopy(model).float(), images.float(), call)
    _assert_near("output", output.double(), exact_output, 1e-5)
    largest = max(float(g.abs().max()) for g in exact.values() if g is not None)
    for name, gradient in gradients.items():
        if gradient is None:
            continue
        error = float((gradient.double() - exact[name]).abs().max())
        bound = max(1e-5 * float(exact[name].abs().max()), 1e-7 * largest)
        assert error <= bound, f"gradient of {name} is off by {error:.2e}, bound {bound:.2e}"


def assert_bfloat16_rule(
    ours: nn.Module, theirs: nn.Module, images: Tensor, call: Call = plain_call, their_call: Call | None = None
) -> None:
    """In bfloat16 our output is at most twice as far from float64's as theirs (root mean square)."""
    exact = call(copy.deepcopy(ours).double(), images.double()).detach()
    errors = []
    for model, how in ((ours, call), (theirs, their_call or call)):
        output = how(copy.deepcopy(model).bfloat16(), images.bfloat16()).detach()
        errors.append(float((output.double() - exact).square().mean().sqrt()))
    assert errors[0] <= 2 * errors[1], f"root mean square error {errors[0]:.3e}, the oracle's {errors[1]:.3e}"


def assert_native_and_torch_agree(model: nn.Module, images: Tensor, call: Call = plain_call) -> None:
    """Both backends give the same output and gradients, in float64."""
    import fvm_fast

    output, gradients = outputs_and_gradients(model, images, call)
    with fvm_fast.backend("torch"):
        plain_output, plain = outputs_and_gradients(model, images, call)
    _assert_near("output", output, plain_output, 1e-9)
    for name, gradient in gradients.items():
        if gradient is not None:
            _assert_near(f"gradient of {name}", gradient, plain[name], 1e-9)


def assert_checkpointing_changes_nothing(model: nn.Module, images: Tensor, call: Call = plain_call) -> None:
    """``set_grad_checkpointing`` gives the same bits."""
    output, gradients = outputs_and_gradients(model, images, call)
    model.set_grad_checkpointing()
    again, recomputed = outputs_and_gradients(model, images, call)
    model.set_grad_checkpointing(False)
    assert torch.equal(output, again)
    for name, gradient in gradients.items():
        assert gradient is None or torch.equal(gradient, recomputed[name]), name


def assert_compiles_without_a_break(model: nn.Module, images: Tensor, call: Call = plain_call) -> None:
    """Forward and backward under torch.compile(fullgraph=True) equal eager ones."""
    output, gradients = outputs_and_gradients(model, images, call)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(model, x), backend="aot_eager", fullgraph=True)
    again, compiled_gradients = outputs_and_gradients(model, images, lambda _, x: compiled(x))
    assert_close(again, output, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        if gradient is not None:
            assert_close(compiled_gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def assert_exports(model: nn.Module, images: Tensor) -> None:
    """torch.export with a dynamic batch, run at another batch size than it was traced with."""
    model = model.eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        assert_close(program.module()(images[:3]), model(images[:3]), atol=1e-5, rtol=1e-5)
