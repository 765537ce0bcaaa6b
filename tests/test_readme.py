"""The README keeps its promises: order, snippet, links, names."""

import re
from pathlib import Path

import pytest

from dfsattn_diffusers import list_models, list_presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_sections_come_in_order():
    assert re.findall(r"^## (.*)$", README, re.M) == [
        "Try it",
        "Supported models",
        "Presets",
        "How it works",
        "Add a model",
        "Add a backend",
        "Limits",
        "Citation",
        "Licence",
    ]


def test_quick_start_is_six_lines_of_which_one_is_new():
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    lines = [line for line in snippet.splitlines() if line]
    assert len(lines) == 6
    assert [line for line in lines if "enable_dfsattn(" in line] == [
        "handle = enable_dfsattn(pipe)  # the one new line"
    ]
    compile(snippet, "README.md", "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert all((document.parent / link).exists() for link in links), links


def test_names_exist():
    assert all(f"`{name}`" in README for name in (*list_models(), *list_presets()))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", README)) <= set(targets)
