"""Weight files of a net. Cuts, heads, names, shapes and dtypes are compared before anything is loaded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sedona_fx.capture.whole.late_buffers import late_buffers
from sedona_fx.errors import CheckpointError
from sedona_fx.files import is_count, load_failure, read_torch_file, replacing, torch_save
from sedona_fx.plan import Plan

_EXTRA = "_extra_state"  # the name under which PyTorch keeps what a module's get_extra_state returned


def save_weights(path: Path, parts: Mapping[str, nn.Module], steps: int, plan: Plan) -> None:
    """Write the state dicts of modules and the number of training steps to a file, replaced as a whole.

    Args:
        path: of the file.
        parts: name -> module.
        steps: training steps taken.
        plan: of the net; its cuts and heads are written beside the weights.

    Raises:
        CheckpointError: a module's extra state could not be read again; the old file is still there.
    """
    states = {name: module.state_dict() for name, module in parts.items()}
    for name, state in states.items():
        _check_extra_state(parts[name], state)
    with replacing(path) as temporary:
        torch_save({**states, "steps": steps, "plan": blocks_of(plan)}, temporary)


def load_weights(path: str | Path, parts: Mapping[str, nn.Module], plan: Plan) -> int:
    """Load what :func:`save_weights` wrote into modules of the same names.

    Args:
        path: of the file.
        parts: name -> module.
        plan: of the net.

    Returns:
        The number of training steps taken.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another net; nothing is loaded then.
    """
    state = read_torch_file(path, "weights")
    for name in parts:
        if not isinstance(state, dict) or not isinstance(state.get(name), dict) or "steps" not in state:
            raise CheckpointError(
                f"{str(path)!r} holds no {name!r}: it was not written by net.save(folder). Give the weights.pt of such "
                "a folder."
            )
    if not is_count(state["steps"]):
        raise CheckpointError(f"{str(path)!r} is damaged: its number of steps is {str(state['steps'])[:50]}.")
    if difference := other_blocks(plan, state.get("plan")):
        raise CheckpointError(f"{str(path)!r} belongs to another net: {difference}. {_SAME_PLAN}")
    for name, module in parts.items():
        if difference := mismatch(module, state[name], dtypes=True):
            raise CheckpointError(
                f"{str(path)!r} belongs to another net: {name} {difference}. Load it with a model of the same "
                "architecture and dtype (model.to(dtype)) and the plan that was saved beside it."
            )
    for name, module in parts.items():
        module.load_state_dict(state[name])
    return int(state["steps"])


_SAME_PLAN = "Make the net with the plan that was saved beside the weights, or take original_state_dict() of the other."


def mismatch(module: nn.Module, state: Mapping[str, Any], *, dtypes: bool = False) -> str:
    """Return the first difference between a module's state dict and another, in words, or ``""`` if there is none.

    Extra state (``get_extra_state``) has to be there, whatever it is: only the module itself knows what it may be.

    Args:
        module: whose state dict is compared.
        state: the other one, from a file.
        dtypes: compare dtypes as well as names and shapes.
    """

    late = _loads_any_shape(module)

    def describe(name: str, value: Any) -> tuple[str, str]:
        if name.rpartition(".")[2] == _EXTRA:
            return "extra state", ""
        if not isinstance(value, Tensor):
            return type(value).__name__, ""
        unusual = "" if value.layout == torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        unusual += " without data (meta)" if value.is_meta else ""
        shape = "of any shape" if name in late else tuple(value.shape)
        return f"{shape}{unusual}", f" {str(value.dtype).removeprefix('torch.')}" if dtypes else ""

    saved = {str(name): describe(str(name), value) for name, value in state.items()}
    present = {name: describe(name, value) for name, value in module.state_dict().items()}
    for name in sorted(saved.keys() | present.keys()):
        if saved.get(name) != present.get(name):
            (there, its_dtype), (here, our_dtype) = (d.get(name, ("missing", "")) for d in (saved, present))
            if "missing" not in (there, here) and its_dtype != our_dtype:
                there, here = there + its_dtype, here + our_dtype
            return f"{name!r} is {there} in the file and {here} here"
    return ""


def _loads_any_shape(module: nn.Module) -> set[str]:
    """Return the names of buffers that get their size in the first forward, and take it over from a state dict."""
    found = set()
    for name in late_buffers(module):
        owner = module.get_submodule(name.rpartition(".")[0])
        if type(owner)._load_from_state_dict is not nn.Module._load_from_state_dict:
            found.add(name)
    return found


# ---- which net weights belong to -----------------------------------------------------------------------------------


def blocks_of(plan: Plan) -> dict[str, list[str | None]]:
    """Return what weights of heads depend on besides their shapes: where they stand, and what they are."""
    return {"cuts": list(plan.cuts), "heads": list(plan.heads)}


def other_blocks(plan: Plan, saved: Any) -> str:
    """Return the first difference between a plan and what :func:`blocks_of` gave for another, in words, or ``""``.

    Args:
        plan: of the net here.
        saved: from a file; None in files from before it was written.
    """
    if saved is None:
        return ""
    for name, ours in blocks_of(plan).items():
        theirs = saved.get(name) if isinstance(saved, dict) else None
        if theirs != ours:
            return f"its {name} are {theirs} there and {ours} here"
    return ""


def note_blocks(plan: Plan, state: Any, prefix: str) -> None:
    """Note cuts and heads in the metadata of a state dict, where PyTorch keeps the versions of modules.

    Args:
        plan: of the net.
        state: the state dict, as ``Module._save_to_state_dict`` gets it.
        prefix: of the net's names in it.
    """
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        metadata.setdefault(prefix[:-1], {})["plan"] = blocks_of(plan)


def check_blocks(plan: Plan, heads: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Any) -> None:
    """Check that the heads of a state dict belong to this net; without heads in it, there is nothing to check.

    A state dict that was copied into a plain dict has no metadata; names and shapes of the heads are compared then.

    Args:
        plan: of the net.
        heads: its heads.
        state: the state dict, as ``Module._load_from_state_dict`` gets it.
        prefix: of the net's names in it.
        metadata: the entry of the net in the state dict's metadata.

    Raises:
        CheckpointError: they belong to other cuts, or are other heads.
    """
    start = f"{prefix}heads."
    there = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    if there:
        saved = metadata.get("plan") if isinstance(metadata, dict) else None
        difference = other_blocks(plan, saved) or mismatch(heads, there).replace("in the file", "there")
        if difference:
            raise CheckpointError(
                f"the state dict belongs to a net with other cuts or heads: {difference}. {_SAME_PLAN}"
            )


# ---- extra state ---------------------------------------------------------------------------------------------------


def _check_extra_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Check that everything in a state dict that is not a plain tensor can be read again.

    Raises:
        CheckpointError: something cannot; with the path of its module.
    """
    for name, value in state.items():
        if type(value) in (Tensor, nn.Parameter):
            continue
        try:
            file = io.BytesIO()
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:
            path = name.rpartition(".")[0]
            kind = type(module.get_submodule(path)).__name__
            raise CheckpointError(
                f"the state {name!r} of {path or kind} ({kind}) could be written but not read again: "
                f"{load_failure(error)}. What get_extra_state returns must be plain numbers, texts, containers and "
                "tensors; torch.serialization.add_safe_globals allows more."
            ) from error
