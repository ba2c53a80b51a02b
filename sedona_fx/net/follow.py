"""Take over into the graphs what was replaced in a net's modules, or refuse it by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from sedona_fx.capture.proof import autograd_nodes, check_equal_forward
from sedona_fx.data.args import same_plain
from sedona_fx.errors import DataError, ScheduleError, TraceError, first_line
from sedona_fx.ir.graph import HEADS
from sedona_fx.ir.outputs import pick
from sedona_fx.net.parallel import refuse_sharded
from sedona_fx.net.placing import relink
from sedona_fx.net.trial import Trial
from sedona_fx.net.watch import MISSING, Change, Watch, noting_reads
from sedona_fx.runtime.engine import Engine

_AGAIN = "decouple the model again: sedona_fx.decouple(net.model, ...)"


class Follower:
    """Keeps the graphs of a net right while its modules change.

    - A tensor of the same form is what the graphs read from then on.
    - A module that graphs call whole, and that was replaced, is called from then on, if the graphs then still compute
      what the model computes; so are other tensors. That is proven as it was when the model was decoupled.
    - An attribute that the forward reads is frozen in the graphs: it is refused, like everything else.

    Args:
        net: the module with the children ``model`` and ``heads``.
        engine, trial: of the net.
        graphs: mode (True: train) -> the graph without heads; the LOWERED eval graph; a function that returns all
            graphs of the net.
        flags: path of each module whose own code depends on its training flag -> the flags that its graphs are right
            for, in train mode and in eval mode.
        root: path of the module in ``model`` whose code is part of the graphs; empty for all of it.

    Attributes:
        flags: as given.
    """

    def __init__(
        self,
        net: nn.Module,
        engine: Engine,
        trial: Trial,
        graphs: tuple[Mapping[bool, fx.GraphModule], fx.GraphModule, Callable[[], list[fx.GraphModule]]],
        *,
        flags: Mapping[str, tuple[bool, bool]],
        root: str,
    ) -> None:
        self._net, self._engine, self._trial = net, engine, trial
        self._plain, self._lowered, self._graphs = graphs
        model, self.flags = trial.model, flags
        self._flagged = [(path, model.get_submodule(path), pair) for path, pair in flags.items()]
        nodes = [node for graph in self._plain.values() for node in graph.graph.nodes]
        named = _tensors(model)
        self._named = [name for name in {str(node.target) for node in nodes if node.op == "get_attr"} if name in named]
        self._since = ""  # path of the change since which heads may not fit
        self._watch = Watch(net, self._trial.whole, root)

    def check(self, training: bool) -> int:
        """Take over what changed since the last call, and look at the modes of modules.

        Args:
            training: the net's mode.

        Returns:
            A number that is another one whenever something was taken over.

        Raises:
            ScheduleError: something changed that the graphs cannot follow, or a module's training flag is not the one
                that the graph was made for.
        """
        version = self.follow()
        for path, module, (in_train, in_eval) in self._flagged:
            if module.training != (in_train if training else in_eval):
                raise ScheduleError(
                    f"{path or type(self._trial.model).__name__} computes differently in train and in eval mode in its "
                    f"own code, and is in {'train' if module.training else 'eval'} mode while the net is in "
                    f"{'train' if training else 'eval'} mode. A graph is chosen for the net at once: name this "
                    "module in leaf_modules=[...] to give it a mode of its own."
                )
        return version

    def follow(self) -> int:
        """As :meth:`check`, without the modes."""
        if not torch.compiler.is_compiling() and not self._watch.unchanged():
            self._take_over(self._watch.changes())
            self._watch.take()
            self._flagged = [(path, self._trial.model.get_submodule(path), pair) for path, pair in self.flags.items()]
        return self._watch.version

    def take(self) -> None:
        """Regard everything as it is now as taken over: whoever changed it has changed the graphs as well."""
        self._watch.take()
        if self._engine.misfit:
            self._engine.misfit = self._misfit()

    def _take_over(self, changes: Sequence[Change]) -> None:
        refuse_sharded(changes)
        for change in changes:
            if change.owner is self._net:
                _refuse(change, f"the graphs run the modules that net.{change.name} had")
        tensors = [c for c in changes if c.kind in ("parameter", "buffer")]
        modules = [c for c in changes if c.kind == "module"]
        hooks = [c for c in changes if c.kind == "hook"]
        self._replace_heads([c for c in modules if c.path.startswith("heads.")])
        if tensors or modules:
            self._relink((*modules, *tensors)[0])
        frozen = [c for c in changes if c.kind == "attribute" and not same_plain(c.before, c.after)]
        frozen = [c for c in frozen if not self._replace_tensor(c)]
        if frozen and (read := self._first_read(frozen)) is not None and not self._same_program(frozen):
            _refuse_value(read)
        attributes = [c for c in changes if c.kind == "attribute" and isinstance(c.after, Tensor)]
        if unsure := [*modules, *(c for c in (*tensors, *attributes) if not _alike(c.before, c.after)), *hooks]:
            self._prove(unsure[0])
        if paths := list(dict.fromkeys(c.path or "net.model" for c in hooks if c.after is not MISSING)):
            others = f" (and {len(paths) - 1} other modules)" if len(paths) > 1 else ""
            warnings.warn(
                f"a hook was put on {paths[0]!r}{others} after the model was decoupled. It is not called: the code of "
                "this module is part of the graph. Put hooks on modules that the graph calls whole, or decouple the "
                "model with the hook and leaf_modules=[...].",
                stacklevel=5,
            )

    def _replace_tensor(self, change: Change) -> bool:
        """Put a tensor that is a plain attribute in the place of the old one; False if no graph has that."""
        if not (isinstance(change.before, Tensor) and isinstance(change.after, Tensor)):
            return False
        found = False
        for gm in self._graphs():
            for node in gm.graph.nodes:
                if node.op != "get_attr":
                    continue
                path, _, name = str(node.target).rpartition(".")
                owner = gm.get_submodule(path)
                if getattr(owner, name, None) is change.before or str(node.target) == change.path:
                    owner._buffers[name] = change.after
                    found = True
        return found

    def _first_read(self, changes: Sequence[Change]) -> Change | None:
        """Return the first of these attributes that the forward reads in some mode; the first one if it cannot run."""
        read: set[tuple[int, str]] = set()
        try:
            for training in (True, False):
                if self._trial.spread:
                    return changes[0]
                with self._trial.same_start(training=training), noting_reads(changes, read):
                    self._trial.run()
        except Exception:  # it cannot run with the new value, or the class cannot be watched
            return changes[0]
        return next((change for change in changes if (id(change.owner), change.name) in read), None)

    def _same_program(self, changes: Sequence[Change]) -> bool:
        """Whether the model would be recorded as the same program with the old values of attributes."""
        recorded = self._trial.recorded()
        with ExitStack() as stack:
            for change in changes:
                absent = change.before is MISSING or change.after is MISSING
                if not isinstance(change.container, dict if absent else (dict, list)):
                    return False
                stack.callback(_set_item, change.container, change.key, change.after)
                _set_item(change.container, change.key, change.before)
            return self._trial.same_program(recorded, self._trial.recorded())

    def _replace_heads(self, changes: Sequence[Change]) -> None:
        heads = self._net.get_submodule("heads")
        for change in changes:
            index = int(change.name) if change.name.isdecimal() else -1
            if change.before is MISSING or change.after is MISSING or not isinstance(change.after, nn.Module):
                _refuse(change, "the blocks have the heads that they were made with")
            head = heads.get_submodule(change.name)
            self._engine.blocks[index].head = head
            for gm in self._graphs():
                _put(gm, f"{HEADS}.{index}", head)

    def _relink(self, change: Change) -> None:
        """Let all graphs call the modules and read the tensors that the model has now."""
        model, graphs = self._trial.model, self._graphs()
        for target in self._trial.whole:
            try:
                module = model.get_submodule(target)
            except AttributeError:
                _refuse(change, f"the graph calls {target!r}, which the model does not have any more")
            for gm in graphs:
                _put(gm, target, module)
        tensors = _tensors(model)
        for name in self._named:
            if name not in tensors:
                _refuse(change, f"the graph reads the tensor {name!r}, which the model does not have any more")
        relink(graphs, model)

    def _prove(self, change: Change) -> None:
        """Check that the graphs compute what the model computes, with all parameters that it uses; look at the heads.

        Raises:
            ScheduleError: they do not.
        """
        model, trial = self._trial.model, self._trial
        if trial.spread:
            _refuse(change, "with blocks on several devices it cannot be proven that the graphs still fit")
        try:
            for training in (True, False):
                check_equal_forward(model, self._plain[training], trial.arguments(), training=training)
        except (TraceError, DataError) as error:
            _refuse(change, str(error).rstrip("."), error)
        with trial.same_start(training=True):
            used = {node.variable for node in autograd_nodes(trial.run()) if hasattr(node, "variable")}
        if unknown := used - set(self._plain[True].parameters()):
            names = [name for name, parameter in model.named_parameters() if parameter in unknown]
            _refuse(change, f"the graph does not have the parameter {names[0] if names else 'of a tensor'!r}")
        self._since = change.path
        self._engine.misfit = self._misfit()

    def _misfit(self) -> str:
        """Return why a head does not give what the model gives, or ``""``."""
        trial, graph = self._trial, self._lowered
        values = trial.arguments().kwargs
        inputs = [values[str(n.target)] for n in graph.graph.nodes if n.op == "placeholder"]
        since = f"since {self._since!r} was replaced: {_AGAIN}, so that the heads fit."
        try:
            with trial.same_start(training=False), torch.no_grad():
                *locals_, output = graph(*inputs)
        except Exception as error:  # of a head of the user's, of any kind
            return f"the heads cannot run ({first_line(error)}) {since}"
        primary = output if isinstance(output, Tensor) else pick(output, self._engine.output.key)
        for block, local in zip(self._engine.blocks[:-1], locals_, strict=True):
            if block.head is not None and block.objective is None and local.shape != primary.shape:
                shapes = f"gives {tuple(local.shape)} where the model gives {tuple(primary.shape)}"
                return f"the head of block {block.index} {shapes} {since}"
        return ""


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict(named)


def _set_item(container: Any, key: Any, value: Any) -> None:
    if value is MISSING:
        del container[key]
    else:
        container[key] = value


def _alike(before: Any, after: Any) -> bool:
    """Whether both are tensors of the same shape, dtype and device."""
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and (before.shape, before.dtype, before.device) == (after.shape, after.dtype, after.device)
    )


def _put(gm: fx.GraphModule, target: str, module: nn.Module) -> None:
    """Let a graph call `module` at a path, if it calls one there."""
    path, _, name = target.rpartition(".")
    try:
        parent = gm.get_submodule(path)
    except AttributeError:
        return
    if name in parent._modules:
        parent._modules[name] = module
        if isinstance(vars(parent).get(name), nn.Module):  # found there first
            vars(parent)[name] = module


def _refuse(change: Change, why: str, cause: Exception | None = None) -> NoReturn:
    what = "is new" if change.before is MISSING else "is gone" if change.after is MISSING else "was replaced"
    raise ScheduleError(
        f"{change.path!r} {what} since the model was decoupled, and the graphs cannot follow: {why}. Undo that, or "
        f"{_AGAIN}."
    ) from cause


def _refuse_value(change: Change) -> NoReturn:
    def text(value: Any) -> str:
        if value is MISSING:
            return "not there"
        return repr(value) if same_plain(value, value) and len(repr(value)) < 100 else f"another {type(value).__name__}"

    raise ScheduleError(
        f"{change.path!r} was {text(change.before)} when the model was decoupled and is {text(change.after)} now. Its "
        f"forward reads it, and graphs hold the value from then. Set it back, or {_AGAIN}. A number that changes in "
        "training has to be a buffer."
    )
