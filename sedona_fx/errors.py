"""Every error that sedona_fx raises on purpose. Its message names the place in the user's model and the next step.

Each class says what is wrong and which calls raise it. An exception from the user's own code goes through unchanged,
with its traceback. One kind is told in other words: of a loss that fails on what a block gives it, since the shapes say
more there than the line; the exception is the ``__cause__`` of the :class:`DataError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

_AT_ZERO = (
    "The gradient of a root, logarithm, norm or quotient at 0 is such a one (torch.autograd.detect_anomaly() finds the "
    "line): keep it away from 0."
)


class SedonaError(Exception):
    """Base of all errors that sedona_fx raises on purpose; catch it to catch them all."""


class SettingsError(SedonaError, ValueError):
    """A setting of a search or of a head rule has a value that it cannot have.

    Raised when the object is made (``Guided(states=0)``), or by the search if it depends on the data: steps or seconds
    that do not pay for a search.
    """


class MissingExtraError(SedonaError, ImportError):
    """A part of sedona_fx needs a package that is not installed.

    Raised by the first call that needs it, such as ``net.to_onnx`` or a picture of a plan, never by ``import
    sedona_fx``.

    Attributes:
        package: the package that is missing.
        extra: the extra of sedona_fx that installs it; the message has the command.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f'{what} needs {package}, which is not installed: pip install "sedona-fx[{extra}]"')


class TraceError(SedonaError):
    """The model's forward cannot be turned into a graph, or the graph does not compute what the model computes.

    Raised by ``decouple`` and ``load``, with the line of the model's code or the first module that differs; while a net
    runs, only if the code around ``root=`` does not call that module exactly once.
    """


class GraphSpecError(SedonaError):
    """A pass produced a graph that breaks the specification of its phase: a bug in sedona_fx, not in the model.

    May be raised wherever graphs are made. Users meet it with passes of their own, otherwise it should be reported.
    """


class CutError(SedonaError):
    """The blocks asked for cannot be had: too many, too few, or cut at a place where no cut is legal.

    Raised by ``decouple`` and ``pareto`` for values of ``blocks=``, ``cuts=``, ``root=``, ``no_cut=``, ``search=`` and
    ``budget=`` that cannot be had on this model.
    """


class BudgetError(CutError):
    """No plan keeps within ``budget=``.

    Raised before anything is trained. The message has the least possible value of each limit, and a plan that has it.
    """


class HeadError(SedonaError):
    """An auxiliary head cannot be built for the place where it should stand, or does not fit there.

    Raised by ``decouple``, ``load``, ``register_head`` and ``transfer_plan`` for ``heads=`` and ``local_loss=``, and by
    ``net.early_exit`` and ``net.ensemble`` if the net's heads do not serve.
    """


class OutputError(SedonaError):
    """The primary output of the model cannot be found, or a loss does not return a scalar tensor.

    The first is raised by ``decouple`` (name the output with ``output=``), the second in training.
    """


class DataError(SedonaError):
    """The data cannot be used: empty, exhausted, without targets, or not fitting the model or the loss.

    Raised by ``decouple`` and ``fit`` for the data they are given, by the net for the arguments of a call, and in
    training for a target that the loss does not take.
    """


class PlanError(SedonaError):
    """A plan cannot be read, or was made for another model.

    Raised by ``Plan.load``, ``decouple(plan=...)``, ``load``, ``transfer_plan`` and ``released_plan``, and for
    ``devices=`` that the blocks cannot be placed on.
    """


class CheckpointError(SedonaError):
    """A file of weights, of a training run or of a search cannot be read, or belongs to another net, plan or schedule.

    Raised by ``load``, ``net.load_weights``, ``net.load_state_dict``, ``net.save`` and ``fit`` with a checkpoint
    (weights that have turned infinite or NaN, extra state that could not be read again), a schedule's
    ``load_state_dict``, and a search with ``folder=``, which another search may be using.
    """


class ScheduleError(SedonaError):
    """A schedule cannot train this net, or has options that it cannot have.

    Raised when the schedule is made, by a step that it cannot take, and by a call of a net that has a module in a mode
    which its graph was not made for, or in which something was replaced that its graphs cannot follow.
    """


class ExportError(SedonaError):
    """The net cannot be exported or pickled, or the exported file does not compute what the net computes.

    Raised by ``net.to_onnx``, and by ``pickle`` and ``torch.save`` of a whole net.
    """


class ParallelError(SedonaError):
    """A net is wrapped for training in several processes or on several devices, by something that would not train it.

    Raised where a net is put into ``DataParallel``, ``DistributedDataParallel`` or ``FullyShardedDataParallel``, or
    given to ``fully_shard``; and by the next step of a net whose ``net.model`` was. The message has the way that works.
    """


class NonFiniteLossError(SedonaError):
    """A local loss turned infinite or NaN.

    Raised by ``net.backward``, ``schedule.step`` and ``fit``; where the check waits for an accelerator, up to one step
    later.

    Attributes:
        block: 0-based index of the block whose loss it is.
        step: 0-based number of the training step.
        value: the loss.
        blocks: the indices of all blocks whose loss was not finite.
    """

    def __init__(self, block: int, step: int, value: float, advice: str = "", blocks: Sequence[int] = ()) -> None:
        self.block, self.step, self.value, self.blocks = block, step, value, list(blocks) or [block]
        super().__init__(
            f"the loss of block {block} is {value} at step {step}. The parameters, optimizer state and BatchNorm "
            f"statistics of block {block} keep their values from before this step. "
            + (advice or "Lower the learning rate, clip the gradient, or look at the batch of this step.")
        )


class NonFiniteGradientError(NonFiniteLossError):
    """The gradient of a block turned infinite or NaN, although its loss is finite.

    Raised like :class:`NonFiniteLossError`, and caught with it: by ``net.backward`` before it returns, by
    ``schedule.step`` and ``fit`` before the block's optimizer steps; where the check waits for an accelerator, up to
    one step later.

    Attributes:
        block: 0-based index of the block whose gradient it is.
        step: 0-based number of the training step.
        value: a number in the gradient that is not finite; NaN where it is not known.
        parameter: the name of the parameter that the gradient is of; empty where it is not known, on accelerators.
        blocks: the indices of all blocks that failed.
    """

    def __init__(
        self, block: int, step: int, parameter: str = "", value: float = float("nan"), *, blocks: Sequence[int] = ()
    ) -> None:
        self.block, self.step, self.value, self.blocks = block, step, value, list(blocks) or [block]
        self.parameter = parameter
        where = f"{value} at step {step}, in that of {parameter!r}," if parameter else f"not finite at step {step},"
        SedonaError.__init__(
            self,
            f"the gradient of block {block} is {where} although the losses are finite. The parameters, optimizer state "
            f"and BatchNorm statistics of block {block} keep their values from before this step. {_AT_ZERO} If the "
            "numbers grew too large, lower the learning rate or clip.",
        )


class SearchDivergedError(SedonaError):
    """A search met losses or gradients that are not finite, and cannot go on.

    Raised by ``decouple`` with a search that trains, and by ``pareto``.

    Attributes:
        plan: the :class:`~sedona_fx.Plan` decoded from what was learned until then; None if there is none yet.
        fault: the first loss or gradient that was not finite, in words; empty where it is not known.
    """

    def __init__(self, where: str, plan: Any, fault: str = "") -> None:
        self.plan, self.fault = plan, fault
        kept = "the plan found so far is kept in `error.plan`" if plan is not None else "no plan had been found yet"
        super().__init__(
            f"a loss or a gradient of the search is not finite {where}{f': {fault}' if fault else ''}; {kept}. "
            f"Lower `lr`, or check the data. Where losses are finite and gradients are not: {_AT_ZERO}"
        )


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return ``"; the nearest names are 'a', 'b'"``, or an empty string if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.5)
    return "; the nearest names are " + ", ".join(repr(n) for n in near) if near else ""


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as people write it: ``(2, 64, 8, 8)``."""
    return "(" + ", ".join(str(int(s)) for s in shape) + ("," if len(shape) == 1 else "") + ")"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
