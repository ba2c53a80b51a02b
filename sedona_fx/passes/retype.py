"""TRACED -> TRACED: dictionaries and lists come back as the model's own types and not as fx's immutable ones."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import fx

from sedona_fx.capture.sites import name_sites
from sedona_fx.ir.graph import INFO, NodeInfo, output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def retype(gm: fx.GraphModule, returned: Any) -> fx.GraphModule:
    """Let the graph build its result as the model does.

    Before: TRACED; the output may be nested tuples, lists and dictionaries of values. After: the same, with a node for
    each list and dictionary.

    Args:
        gm: changed in place.
        returned: what the model returned.
    """
    result = output_node(gm.graph)

    def rebuilt(argument: Any, value: Any) -> Any:
        if isinstance(argument, fx.Node) or argument is None:
            return argument
        if isinstance(argument, Mapping) and type(value) in (dict, OrderedDict):
            return call(type(value), [(key, rebuilt(argument[key], value[key])) for key in value])
        if isinstance(argument, Mapping) and isinstance(value, Mapping) and dataclasses.is_dataclass(value):
            # Hugging Face's outputs are both; fx takes them for the dictionaries that they are as well.
            return call(type(value), **{str(key): rebuilt(argument[key], inner) for key, inner in value.items()})
        if isinstance(argument, list) and type(value) is list:
            return call(list, [rebuilt(a, v) for a, v in zip(argument, value, strict=True)])
        if type(argument) is tuple and type(value) is tuple:
            return tuple(rebuilt(a, v) for a, v in zip(argument, value, strict=True))
        return argument

    def call(kind: type, *content: Any, **named: Any) -> fx.Node:
        with gm.graph.inserting_before(result):
            made = gm.graph.call_function(kind, content, named)
        made.meta[INFO] = NodeInfo()
        return made

    before = result.args[0]
    result.args = (rebuilt(before, returned),)
    if result.args[0] is not before:
        name_sites(gm.graph)
        gm.recompile()
    return gm
