"""The environment report names what is there and survives what is not."""

import importlib.metadata
import platform
import sys

import pytest
import torch

from dfsattn_diffusers import env


def test_prints_one_row_for_every_fact(capsys):
    env.main()
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["python"].startswith(platform.python_version())
    assert rows["torch"].startswith(torch.__version__)
    assert rows["diffusers"] == importlib.metadata.version("diffusers")
    assert "reference" in rows["attention"]


def test_says_what_is_missing(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    rows = env.environment()
    assert rows["triton"] == rows["transformers"] == "not installed"
    assert "pyyaml not installed" in rows["optional"]


def test_lists_every_gpu(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "Example GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    gpu = "Example GPU, sm_90, 80 GiB"
    assert env.environment()["devices"].startswith(f"{gpu}; {gpu}")


@pytest.mark.parametrize("module", ["torch", "dfsattn_diffusers.kernels"])
def test_survives_a_module_that_cannot_be_imported(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    rows = env.environment()
    broken = "torch" if module == "torch" else "attention backends"
    assert rows[broken].startswith("failed: ModuleNotFoundError")
    assert rows["python"].startswith(platform.python_version())


def test_survives_a_broken_driver(monkeypatch):
    def device_count():
        raise RuntimeError("driver\ntoo old")

    monkeypatch.setattr(torch.cuda, "device_count", device_count)
    assert env.environment()["devices"] == "failed: RuntimeError: driver too old"
