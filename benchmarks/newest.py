"""Run the test suite with the newest release of everything, and write down which versions that were and what failed.

make test-newest

It makes an environment of its own (.venv-newest) without constraints.txt. Not part of CI: what it finds is for people.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

from sedona_fx.files import replacing

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-newest"
RESULT = ROOT / "benchmarks" / "results" / "newest.json"
NAMED = (
    *("torch", "torchvision", "numpy", "networkx", "tqdm", "matplotlib", "onnx", "onnxruntime", "onnxscript"),
    *("transformers", "timm", "scikit-learn", "hypothesis", "pytest"),
)


def main() -> int:
    """Install, run, write; return pytest's exit status."""
    python = str(ENVIRONMENT / "bin" / "python")
    if not ENVIRONMENT.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*install, "pip"], check=True)
    subprocess.run([*install, "--editable", ".[dev]"], cwd=ROOT, check=True)
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    versions = {entry["name"].lower(): entry["version"] for entry in json.loads(listed.stdout)}
    run = [python, "-m", "pytest", "--numprocesses", "2", "--dist", "loadgroup", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stdout.write(done.stdout)
    counts = {
        what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-400:])
    }
    content = {
        "python": platform.python_version(),
        "versions": {name: versions.get(name, "") for name in NAMED},
        "counts": counts,
        "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE),
    }
    with replacing(RESULT) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
