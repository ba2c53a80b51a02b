"""What a row of the support table was made of, as a digest: rows whose digest changed are done again.

A row depends on its entry in the catalogue, on the code that its checks can run, and on the libraries of its model. The
code is every file of this folder and of sedona_fx that ``row.py``, ``sedona_fx.decouple`` or one of the entry's
functions imports, step by step; a name that a package only passes on leads to the file that has it. So a change of a
schedule, of a picture or of another entry leaves a row as it is, and so does a change of comments, docstrings or
layout: what counts is the syntax tree without them. Any other change of the compiler does all rows again. That the four
blocks of a row come out the same would not be enough to keep it: promises 4 and 7 make nets of their own, with other
cuts.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from catalogue.entry import Entry

FOLDER = Path(__file__).resolve().parent
LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript")
"""Distributions that every row depends on."""
FAMILIES = {"torchvision": ("torchvision",), "timm": ("timm", "torchvision"), "transformers": ("transformers",)}
"""The same for families, by the first word of their names."""
MORE = {"segmentation_models_pytorch": ("timm",), "peft": ("transformers",), "open_clip": ("timm",)}
"""What packages of the catalogue stand on, besides torch."""
STARTS = ("row", "sedona_fx.decouple")


def version(entry: Entry) -> str:
    """Return the digest of what a row is made of."""
    functions = (entry.build, entry.pair, entry.loss)
    own = {module for function in functions for module in _modules(function)}
    modules = set[str]().union(*(_reached(start) for start in (*STARTS, *own) if _file(start)))
    settings = (*map(_told, functions), dict(entry.options), entry.refused)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for module in sorted(modules):
        digest.update(f"{module} {_meaning(module)}\n".encode())
    packages = {*LIBRARIES, *FAMILIES.get(entry.family.split()[0], ()), *entry.needs}
    packages.update(*(MORE.get(need, ()) for need in entry.needs))
    for package in sorted(packages):
        digest.update(f"{package} {_release(package)}\n".encode())
    return digest.hexdigest()


def _modules(value: Any) -> Iterator[str]:
    """Yield the modules of a function, and of the functions among its arguments where these are given already."""
    if isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules(part)
    elif callable(value) and hasattr(value, "__module__"):
        yield value.__module__


def _told(value: Any) -> str:
    """Return a function as text: where it stands, and the arguments that are given already."""
    if isinstance(value, functools.partial):
        given = {**{str(at): one for at, one in enumerate(value.args)}, **value.keywords}
        return f"{_told(value.func)}({', '.join(f'{name}={_told(one)}' for name, one in given.items())})"
    return f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else repr(value)


@functools.cache
def _release(package: str) -> str:
    """Return the installed version of the distribution that has a package."""
    names = _distributions().get(package, [package])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "missing"


_distributions = functools.cache(importlib.metadata.packages_distributions)


@functools.cache
def _file(module: str) -> Path | None:
    """Return the file of a module of this folder or of sedona_fx; None of any other."""
    import sedona_fx

    package, parts = Path(sedona_fx.__file__).parent, module.split(".")
    base = package.parent if parts[0] == package.name else FOLDER
    whole = base.joinpath(*parts)
    found = [path for path in (whole.with_suffix(".py"), whole / "__init__.py") if path.is_file()]
    return found[0] if found and parts[0] not in sys.stdlib_module_names else None


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _file(module)
    assert path is not None
    return ast.parse(path.read_text())


@functools.cache
def _meaning(module: str) -> str:
    """Return a digest of a module's syntax tree without docstrings."""
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [one for one in node.body if not _is_text(one)] or [ast.Pass()]
    return hashlib.blake2b(ast.unparse(tree).encode(), digest_size=8).hexdigest()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@functools.cache
def _reached(start: str) -> frozenset[str]:
    """Return all modules of ours that a module imports, itself included, step by step."""
    found, waiting = set[str](), [start]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting.extend(_imports(module))
    return frozenset(found)


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Return the modules of ours that a module imports, wherever in it."""
    found: list[str | None] = []
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [_source(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if _file(alias.name) and alias.name != "sedona_fx"]
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _source(module: str, name: str) -> str | None:
    """Return the module of ours that a name comes from, through packages that pass it on."""
    if _file(f"{module}.{name}"):
        return f"{module}.{name}"
    path = _file(module)
    if path is None:
        return None
    if path.name != "__init__.py":
        return module
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _source(node.module, alias.name)
    return module
