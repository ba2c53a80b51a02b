"""The promises of docs/architecture.md as checks on any model: each returns '' or says how the promise is broken.

They compare with the user's own model, run by plain PyTorch; ``tests/`` does the same over fewer models, in more ways.
Promise 4 stands in :mod:`gradient_promise` and promise 8 in :mod:`onnx_promise`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from catalogue import Entry
from hooked import whole_loss
from states import digest, fingerprint, moved, restore, settle
from torch import nn
from trees import call, difference, tensors

import sedona_fx

EXPORTED = 1e-6
"""What a program captured by ``torch.export`` may differ by where gradients are off: PyTorch takes fast paths there."""
LEAST_BLOCKS = 2


@dataclass
class Case:
    """A user's model, what it was, a second one to compare with, and a net.

    Attributes:
        entry: the row.
        model: handed to ``decouple``; nothing here changes it, so it is also where the others are restored from.
        before: its fingerprint when it was handed over.
        twin: a copy that is run.
        net: made of the model.
        inputs: one batch.
        target: for the loss.
        fewer: why the net has fewer blocks than the row asks for; empty if it has not.
    """

    entry: Entry
    model: nn.Module
    before: dict[str, str]
    twin: nn.Module
    net: sedona_fx.Net
    inputs: Any
    target: Any
    fewer: str = ""

    def reset(self, training: bool = True) -> tuple[nn.Module, sedona_fx.Net]:
        """Return the twin and the net with the model's numbers, without gradients, in one mode."""
        restore(self.twin, self.model)
        restore(self.net.model, self.model)
        self.net.zero_grad()
        self.net.steps = 0
        return self.twin.train(training), self.net.train(training)

    @property
    def exported(self) -> bool:
        """Whether the graph was captured by ``torch.export``."""
        return self.net.capture.front_end == "export"


def ready(entry: Entry) -> tuple[nn.Module, Any, Any]:
    """Return a row's model with settled statistics in train mode, and its batch."""
    model = entry.make()
    inputs, target = entry.pair()
    settle(model, inputs)
    return model.train(), inputs, target


def decoupled(entry: Entry, model: nn.Module, inputs: Any, target: Any, **how: Any) -> sedona_fx.Net:
    """Decouple a model as its row says; with fewer blocks than four where it has too few cuts."""
    return decoupled_as_far(entry, model, inputs, target, **how)[0]


def decoupled_as_far(entry: Entry, model: nn.Module, inputs: Any, target: Any, **how: Any) -> tuple[sedona_fx.Net, str]:
    """Return the same, and the error that more blocks gave; empty if none did."""
    options = {"blocks": 4, "search": "balanced", "progress": False, **entry.options, **how}
    if entry.loss is not None:
        options["loss"] = entry.loss
    fewer = ""
    while True:
        try:
            return sedona_fx.decouple(model, (inputs, target), **options), fewer
        except sedona_fx.errors.CutError as error:
            fewer = fewer or str(error)
            if options["blocks"] <= LEAST_BLOCKS or "cuts" in how:  # nothing is left to be given up
                raise
            options["blocks"] -= 1


def make_case(entry: Entry) -> Case:
    """Build a row's model and its net."""
    model, inputs, target = ready(entry)
    before, twin = fingerprint(model), copy.deepcopy(model)
    net, fewer = decoupled_as_far(entry, model, inputs, target)
    return Case(entry, model, before, twin, net, inputs, target, fewer)


def forward(case: Case) -> str:
    """Promise 1: ``net(x)`` equals ``model(x)`` bit for bit, in both modes, with gradients and without."""
    for training in (True, False):
        for gradients in (True, False):
            model, net = case.reset(training)
            tolerance = EXPORTED if case.exported and not gradients else 0.0
            with torch.set_grad_enabled(gradients):
                torch.manual_seed(3)
                expected = call(model, case.inputs)
                torch.manual_seed(3)
                actual = net.call(case.inputs)
            where = f"in {'train' if training else 'eval'} mode, gradients {'on' if gradients else 'off'}"
            if reason := difference(actual, expected, tolerance):
                return f"{where}: {reason}"
            if [t.requires_grad for t in tensors(actual)] != [t.requires_grad for t in tensors(expected)]:
                return f"{where}: requires_grad of the outputs differs"
            if type(actual) is not type(expected):
                return f"{where}: returns {type(actual).__name__}, the model {type(expected).__name__}"
            if not tolerance and (name := moved(dict(model.named_buffers()), dict(net.model.named_buffers()))):
                return f"{where}: the buffer {name} moved differently"
    return ""


def names(case: Case, fresh: Callable[[], nn.Module] | None = None) -> str:
    """Promise 2: names are the model's, in every block; the state loads with ``strict=True`` into a fresh model."""
    _, net = case.reset()
    if list(net.original_state_dict()) != list(case.model.state_dict()):
        return "the state of the net has other names than the model's"
    for block in net.blocks:
        for module in (block.module, block.eval_module):
            if wrong := _renamed(module, net):
                return f"block {block.index} {wrong}"
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.mul_(0.999)
    model = fresh() if fresh is not None else case.twin
    model.load_state_dict(net.original_state_dict(), strict=True)
    missing = moved(dict(net.model.named_parameters()), dict(model.named_parameters()))
    return f"{missing} did not arrive in a fresh model" if missing else ""


def _renamed(module: nn.Module, net: sedona_fx.Net) -> str:
    """Say which tensor of the model has another name in a block, or which name another tensor; else ''.

    Constants that the forward made while it was recorded are no tensors of the model, and have names of their own.
    """
    owned = [*net.model.named_parameters(remove_duplicate=False), *net.model.named_buffers(remove_duplicate=False)]
    tensors_of, names_of = dict(owned), {(id(tensor), name) for name, tensor in owned}
    mine = {id(tensor) for _, tensor in owned}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if id(tensor) in mine and (id(tensor), name) not in names_of:
            return f"calls a tensor {name} that has another name in the model"
        if name in tensors_of and tensors_of[name] is not tensor:
            return f"calls another tensor {name} than the model does"
    return ""


def isolation(case: Case) -> str:
    """Promise 3: no local loss has a gradient with respect to an unshared parameter of another block."""
    for training in (True, False):
        _, net = case.reset(training)
        inside = [
            {id(p) for p in (*b.parameters(), *b.module.parameters(), *b.eval_module.parameters())} for b in net.blocks
        ]
        everything = [p for p in net.parameters() if p.requires_grad]
        losses = net.losses(case.inputs, case.target)
        if len(losses) != len(net.blocks):
            return f"{len(losses)} losses of {len(net.blocks)} blocks"
        for index, loss in enumerate(losses):
            found = torch.autograd.grad(loss, everything, allow_unused=True)
            reached = {id(p) for p, gradient in zip(everything, found, strict=True) if gradient is not None}
            if not reached:
                return f"the loss of block {index} reaches no parameter"
            if not reached <= inside[index]:
                where = {id(p): name for name, p in net.named_parameters()}
                return f"the loss of block {index} reaches {where[min(reached - inside[index])]} of another block"
    return ""


def modes(case: Case) -> str:
    """Promise 5: ``train()`` and ``eval()`` do what they do to the model, and training moves the buffers alike."""
    for training in (False, True):
        model, net = case.reset(training)
        flags = {path: m.training for path, m in model.named_modules()}
        ours = {path: m.training for path, m in net.model.named_modules()}
        if ours != flags:
            return f"train({training}) leaves {next(p for p in flags if ours.get(p) != flags[p])} in the other mode"
        if any(m.training != training for m in (net, *net.heads.modules())):
            return f"train({training}) leaves the net or a head in the other mode"
    model, net = case.reset(False)
    before = {name: digest(t) for name, t in net.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    call(model, case.inputs)
    draws = not torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    net.call(case.inputs)
    if draws is torch.equal(state, torch.get_rng_state()):
        return "in eval mode the net draws random numbers and the model does not, or the other way round"
    if before != {name: digest(t) for name, t in net.state_dict().items()}:
        return "a forward in eval mode changes a tensor"
    model, net = case.reset(True)
    state = torch.get_rng_state()
    call(model, case.inputs)
    draws = not torch.equal(state, torch.get_rng_state())
    if not case.entry.headless:
        net.backward(case.inputs, case.target)
        for (name, theirs), ours_ in zip(model.named_buffers(), net.model.buffers(), strict=True):
            if not (draws and theirs.is_floating_point()) and not torch.equal(theirs, ours_):
                return f"a training step moves the buffer {name} otherwise than the model"
    return ""


def untouched(case: Case) -> str:
    """Promise 6: after a training step the user's model is what it was, and shares no memory with the net."""
    _, net = case.reset()
    if not case.entry.headless:
        net.backward(case.inputs, case.target)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1e-3)
    after = fingerprint(case.model)
    if changed := next((key for key in case.before if after.get(key) != case.before[key]), None):
        return f"the user's model changed: {changed}"
    ours = {p.untyped_storage().data_ptr() for p in net.parameters()}
    shared = [name for name, p in case.model.named_parameters() if p.untyped_storage().data_ptr() in ours]
    if shared:
        return f"the net shares {shared[0]} with the user's model"
    if len({id(p) for p in net.model.parameters()}) != len({id(p) for p in case.model.parameters()}):
        return "the net owns another number of parameters than the model"
    return ""


def whole(case: Case) -> str:
    """Promise 7: one block is backpropagation, bit for bit."""
    model, _ = case.reset()
    torch.manual_seed(5)
    loss = whole_loss(case.entry.criterion, call(model, case.inputs), case.target)
    loss.backward()
    net = decoupled(case.entry, case.model, case.inputs, case.target, blocks=1)
    torch.manual_seed(5)
    result = net.backward(case.inputs, case.target)
    if not torch.equal(result.losses[0], loss.detach()):
        return f"the loss is {result.losses[0].item()!r}, by backpropagation {loss.item()!r}"
    for (name, theirs), ours in zip(model.named_parameters(), net.model.parameters(), strict=True):
        if (theirs.grad is None) != (ours.grad is None):
            return f"{name} has {'no' if ours.grad is None else 'a'} gradient, unlike by backpropagation"
        if theirs.grad is not None and ours.grad is not None and (reason := difference(ours.grad, theirs.grad)):
            return f"the gradient of {name}: {reason}"
    return ""
