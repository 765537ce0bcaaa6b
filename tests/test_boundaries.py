"""The arrows of the architecture, and what must import without what."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dfsattn_diffusers"

# What each module may import of ours, directly. Data flows down this list only.
ARROWS = {
    "_versions": set(),
    "configs": {"configs"},
    "kernels": {"kernels"},
    "curves": set(),
    "layout": {"curves"},
    "score": {"kernels"},
    "selection": {"kernels"},
    "attention": {"kernels", "layout", "score", "selection"},
    "dense": {"configs", "kernels", "text"},
    "schedule": {"configs"},
    "report": set(),
    "memory": {"configs", "kernels", "layout"},
    "state": {
        "configs", "kernels", "layout", "memory", "report", "schedule", "selection", "text",
    },
    "processors": {"_versions", "attention", "dense", "kernels", "layout", "state"},
    "hook": {"processors", "state", "text"},
    "attachment": {"hook", "processors", "state"},
    "pipeline": {
        "attachment", "configs", "hook", "kernels", "processors", "report", "schedule", "state",
    },
    "bare": {"attachment", "configs", "hook", "pipeline", "processors"},
    # Looks on from the side: it may use all that a call goes through, and nothing uses it.
    "analysis": {"kernels", "layout", "score", "state"},
    "metrics": set(),
    "text": set(),
    "env": {"__version__", "kernels"},
}
BUDGETS = {"processors": 150, "kernels": 400}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def top(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of_ours(path):
    """First part of every module of ours that a file imports."""
    here = ("dfsattn_diffusers", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = here[: -node.level] if node.level else ()
            module = (*base, *(node.module or "").split("."))
            names = [".".join(filter(None, module))]
            if names == ["dfsattn_diffusers"]:
                names = [f"dfsattn_diffusers.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("dfsattn_diffusers.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path):
    if top(path) in ("__init__", "cli"):
        return
    assert imports_of_ours(path) <= ARROWS[top(path)] | {top(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_line_budgets(path):
    assert len(path.read_text().splitlines()) <= BUDGETS.get(top(path), 250)


def test_models_are_named_in_processors_only():
    names = re.compile(r"(?i:hunyuan|cogvideo)|(^|_)wan(_|\d|$)|Wan[A-Z0-9]")
    for path in modules():
        if top(path) in ("processors", "cli"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.Attribute):
                text = node.id if isinstance(node, ast.Name) else node.attr
                assert not names.search(text), (path, text)


@pytest.mark.parametrize(
    "blocked, statement",
    [
        ("diffusers", "import dfsattn_diffusers.kernels"),
        ("triton", "from dfsattn_diffusers import enable_dfsattn, kernels as k; k.list_backends()"),
    ],
)
def test_imports_without(blocked, statement):
    code = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
{statement}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
