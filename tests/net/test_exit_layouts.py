"""Early exits and ensembles of models that do not have the batch in dimension 0, against the same by hand."""

import pytest
import torch
from layouts import (
    EachMember,
    EachStep,
    EachStepFirst,
    EveryFrame,
    Frames,
    InputsStepsFirst,
    Siamese,
    StepsFirst,
    made,
    outputs_in_eval,
)
from torch import nn


@pytest.mark.parametrize("kind", [InputsStepsFirst, Siamese, EachMember, EachStep, EachStepFirst, Frames, EveryFrame])
def test_each_example_leaves_at_the_first_head_that_is_sure(kind):
    """Where the output has several rows an example and no dimension of examples, each row leaves by itself."""
    _, net = made(kind)
    batch_dim = 1 if kind is EachStepFirst else 0
    by_row = [output.movedim(batch_dim, 0) for output in outputs_in_eval(kind, net)]
    class_dim = by_row[0].dim() - 1
    sure = torch.stack([o.softmax(class_dim).amax(class_dim).reshape(len(o), -1).mean(1) for o in by_row])
    threshold = sure[0].median().item() - 1e-6
    block = torch.stack([*(sure[:2] >= threshold), torch.ones(sure.shape[1], dtype=torch.bool)]).int().argmax(0)
    assert len(block.unique()) > 1
    wanted = torch.stack([by_row[k][row] for row, k in enumerate(block)])
    found = net.early_exit(threshold)(*kind.inputs)
    assert torch.equal(found.blocks, block)
    torch.testing.assert_close(found.output, wanted.movedim(0, batch_dim), rtol=1e-10, atol=1e-12)


def test_steps_of_examples_that_left_are_not_computed():
    _, net = made(StepsFirst, cuts=["l.1"])
    said = outputs_in_eval_of_one_cut(net)
    threshold = said.softmax(1).amax(1).median().item() - 1e-6
    exits, seen = net.early_exit(threshold), []
    for module in exits.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(lambda _module, _args, output: seen.append(tuple(output.shape)))
    found = exits(*StepsFirst.inputs)
    left = int((said.softmax(1).amax(1) >= threshold).sum())
    assert int((found.blocks == 0).sum()) == left < 4
    assert seen == [(7, 4, 8)] * 2 + [(7, 4 - left, 8)] * 4
    last = net.model.eval()(*StepsFirst.inputs)
    wanted = torch.where((found.blocks == 0)[:, None], said, last)
    torch.testing.assert_close(found.output, wanted.detach(), rtol=1e-6, atol=1e-9)


def outputs_in_eval_of_one_cut(net):
    """Return what the head behind the second layer says."""
    model = net.model.eval()
    with torch.no_grad():
        h = model.l[1](model.l[0](model.e(*StepsFirst.inputs).transpose(0, 1)))
        return net.heads["0"].eval().head(h.transpose(0, 1))


@pytest.mark.parametrize("kind", [Siamese, EachStep, EachStepFirst, Frames])
def test_ensembles(kind):
    _, net = made(kind)
    *_, before, last = outputs_in_eval(kind, net)
    dim = 2 if last.dim() == 3 else 1
    wanted = before.log_softmax(dim) + last.log_softmax(dim)
    torch.testing.assert_close(net.ensemble(2)(*kind.inputs), wanted, rtol=1e-10, atol=1e-12)
