"""The order of the house: who may import whom, how long a file may be, how calls read, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[2] / "sedona_fx"
ORDER = (
    *("errors", "extras", "files", "rng", "measure", "models", "plan_values", "plan", "data", "heads", "fake", "ir"),
    *("report", "export", "capture", "runtime", "passes", "net", "search", "compile", "train", "decouple"),
    *("distributed", "recipes", "integrations", "__init__", "cli", "__main__"),
)
"""Packages and root files from bottom to top: none imports from one to its right."""
APART = [{"report", "export"}, {"net", "search"}, {"search", "train"}]
"""Neighbours that stand beside each other."""
INSIDE = {
    "search": (
        "problem",
        "session",
        "relaxed",
        "rules",
        "trials",
        "sedona",
        "trial_settings",
        "rollout",
        "guided_settings",
        "guided_run",
        "guided",
        "best_of",
        "__init__",
    ),
    "train": ("buffers", "losses", "evaluate", "schedules", "checkpoint", "history", "fit", "__init__"),
}
"""The same order within the two packages that have packages of their own."""
FILES = sorted(ROOT.rglob("*.py"))
NAMES = {
    path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES
}
PATHS = {name: path for path, name in NAMES.items()}
LISTS = ("nn.Sequential", "log.info", "log.warning", ".apply", ".save_for_backward")
"""Calls whose positional values are a list of any length, or that take no keywords (an autograd function)."""
OPTIONAL = {"matplotlib", "onnx", "onnxruntime", "onnxscript", "torchvision", "torch"}
"""What a function may import when it is called: optional packages, and parts of torch that are slow to import."""


def imports(path: Path) -> set[str]:
    """Return the modules of sedona_fx that a file imports, wherever in it, for type checkers alone included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            whole = (f"{module}.{alias.name}" for alias in node.names)
            names.update(name if name in PATHS else module for name in whole)
    return {name for name in names if name in PATHS and name != NAMES[path]}


def part(name: str, depth: int = 1) -> str:
    words = name.split(".")
    return words[depth] if len(words) > depth else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path):
    own = part(NAMES[path])
    assert own in ORDER, f"{own} has no place in the order of this test"
    for name in imports(path):
        other = part(name)
        if other != own:
            assert ORDER.index(other) < ORDER.index(own), f"{NAMES[path]} imports {name}"
            assert {own, other} not in APART, f"{NAMES[path]} imports {name}, which stands beside it"
        elif own in INSIDE:
            order = INSIDE[own]
            here, there = part(NAMES[path], 2), part(name, 2)
            assert here == there or order.index(there) < order.index(here), f"{NAMES[path]} imports {name}"


def test_no_file_imports_itself_on_the_way_round():
    graph = nx.DiGraph((NAMES[path], name) for path in FILES for name in imports(path))
    assert [sorted(ring) for ring in nx.strongly_connected_components(graph) if len(ring) > 1] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_import_optional_packages_only(path):
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        for node in ast.walk(function):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= OPTIONAL, f"{path}: {function.name} imports {names}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_calls_can_be_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
            text = ast.unparse(node.func)
            if text.endswith(LISTS):
                continue
            assert len(plain) <= 5, f"{path}:{node.lineno}: {text} gets {len(plain)} positional values: name them"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_say_what_they_are_and_fit_on_a_few_screens(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < 320


def test_a_folder_can_be_overlooked():
    folders = {ROOT, *(path.parent for path in FILES)}
    assert len(list(ROOT.glob("*.py"))) <= 10
    assert {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > 18} == {}


def test_every_package_says_what_is_public():
    for path in FILES:
        if path.name == "__init__.py":
            names = [t.id for n in ast.parse(path.read_text()).body for t in _targets(n) if isinstance(t, ast.Name)]
            assert "__all__" in names, path


def _targets(node):
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


def test_every_pass_has_its_test():
    names = {p.stem for p in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert {p.stem.removeprefix("test_") for p in (ROOT.parent / "tests" / "passes").glob("test_*.py")} == names


def test_tests_mirror_the_package():
    """A folder of tests is a folder of the package, or says in this list what it is."""
    others = {"benchmarks", "examples", "helpers", "oracles", "project", "promises"}
    tests = ROOT.parent / "tests"
    folders = {str(p.parent.relative_to(tests)) for p in tests.rglob("test_*.py")} - others - {"."}
    assert {folder for folder in folders if not (ROOT / folder).is_dir()} == set()


def test_importing_does_no_work():
    code = """
import random, sys, time
import numpy, torch, tqdm
torch.manual_seed(1); random.seed(1); numpy.random.seed(1)
states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
threads, level = torch.get_num_threads(), torch.is_grad_enabled()
before, start = set(sys.modules), time.process_time()
import sedona_fx
seconds = time.process_time() - start
assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
assert (states[2] == numpy.random.get_state()[1]).all()
assert threads == torch.get_num_threads() and level == torch.is_grad_enabled()
assert not torch.cuda.is_initialized()
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = roots & {"torchvision", "matplotlib", "sklearn", "onnx", "onnxruntime", "onnxscript", "pandas", "scipy"}
assert not heavy, heavy
print(seconds)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2.0  # a few hundred milliseconds on a quiet machine
