"""The order of the house: who may import whom, how long a file may be, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "sedona_fx"
ORDER = (
    *("errors", "files", "args", "plan", "graph", "flow", "outputs", "cost", "memory", "pooled_relu"),
    *("pointwise_pool", "head_layers", "head_fit", "heads", "local_loss", "batched_heads", "split"),
    *("overlap", "data", "models", "passes", "train", "search"),
    *("distributed", "export", "report", "signature", "placing", "variants", "exits", "net", "analysis", "compile"),
    *("decisions", "transfer", "released", "decouple", "pareto", "__init__", "cli", "__main__"),
)
FILES = sorted(ROOT.rglob("*.py"))
# Methods of low parts that hand on to what is built on these parts; imported when they are called.
HANDED_ON = {"plan.py": {"transfer", "released"}}
SAME_LEVEL = {frozenset({"export", "report"})}


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the parts of sedona_fx that a file imports, wherever in it, but not for type checkers alone."""
    found: set[str] = set()

    def name(module: str) -> None:
        words = module.split(".")
        if words[0] == "sedona_fx":
            found.add(words[1] if len(words) > 1 else "__init__")

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                name(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "sedona_fx":
                for alias in node.names:
                    name(f"sedona_fx.{alias.name}")
            else:
                name(node.module or "")
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path):
    own = part(path)
    assert own in ORDER, f"{own} has no place in the order of this test"
    for other in imports(path) - {own} - HANDED_ON.get(str(path.relative_to(ROOT)), set()):
        assert ORDER.index(other) < ORDER.index(own), f"{path.name} ({own}) imports {other}"
        assert frozenset({own, other}) not in SAME_LEVEL


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_say_what_they_are_and_fit_on_a_few_screens(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < 320


def test_every_pass_has_its_test():
    helpers = {"__init__", "convert", "inplace", "sites", "symbolic", "tracer", "watch"}
    names = {p.stem for p in (ROOT / "passes").glob("*.py")} - helpers
    assert {p.stem.removeprefix("test_") for p in (ROOT.parent / "tests" / "passes").glob("test_*.py")} == names


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
heavy = roots & {"torchvision", "matplotlib", "sklearn", "onnx", "onnxruntime", "onnxscript", "networkx", "pandas"}
assert not heavy, heavy
print(seconds)
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 2.0  # a few hundred milliseconds on a quiet machine
