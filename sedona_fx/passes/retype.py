"""TRACED -> TRACED: the graph returns dictionaries and lists of the model's own types, not fx's immutable ones.

fx turns containers in the arguments of a node, the output node's included, into immutable ones. So that the graph
returns what the model returns, nodes of the graph build the containers of the output.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import fx

from sedona_fx.capture.graph_module import with_record
from sedona_fx.capture.sites import name_sites
from sedona_fx.ir.graph import output_node
from sedona_fx.ir.graph_pass import graph_pass
from sedona_fx.ir.spec import Phase


@graph_pass(Phase.TRACED)
def retype(gm: fx.GraphModule, returned: Any) -> fx.GraphModule:
    """Make the graph build its result as the model does.

    Before: TRACED; the output may be nested tuples, lists and dictionaries of values. After: the same, with a node that
    builds each list and dictionary.

    Args:
        gm: changed in place.
        returned: what the model returned.
    """
    result = output_node(gm.graph)

    def rebuilt(argument: Any, value: Any) -> Any:
        """Return what takes the place of `argument`, of the type of `value`."""
        if isinstance(argument, fx.Node) or argument is None:
            return argument
        if isinstance(argument, Mapping) and type(value) in (dict, OrderedDict):
            return call(type(value), [(key, rebuilt(argument[key], value[key])) for key in value])
        if isinstance(argument, Mapping) and isinstance(value, Mapping) and dataclasses.is_dataclass(value):
            # Hugging Face's outputs are dataclasses and mappings; fx treats them as dictionaries.
            return call(type(value), **{str(key): rebuilt(argument[key], inner) for key, inner in value.items()})
        if isinstance(argument, list) and type(value) is list:
            return call(list, [rebuilt(a, v) for a, v in zip(argument, value, strict=True)])
        if type(argument) is tuple and type(value) is tuple:
            return tuple(rebuilt(a, v) for a, v in zip(argument, value, strict=True))
        return argument

    def call(constructor: type, *args: Any, **kwargs: Any) -> fx.Node:
        with gm.graph.inserting_before(result):
            return with_record(gm.graph.call_function(constructor, args, kwargs))

    original = result.args[0]
    result.args = (rebuilt(original, returned),)
    if result.args[0] is not original:
        name_sites(gm.graph)
        gm.recompile()
    return gm
