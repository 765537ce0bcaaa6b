import builtins
import dataclasses

import pytest

from dfsattn_diffusers import DFSAttnConfig, list_presets
from dfsattn_diffusers.configs import resolve_config


def test_paper_preset_is_the_paper():
    paper = resolve_config("paper")
    assert paper == DFSAttnConfig(
        dense_fraction=0.25,
        keep_ratios=(0.3, 0.2, 0.1),
        refresh_interval=0.25,
        order="hilbert3d",
        tile_size=16,
        query_block=128,
        key_block=128,
        tail=None,
        budget="row",
        selection="mass",
        dense_layers=(),
        min_tokens=0,
    )


@pytest.mark.parametrize("name", list_presets())
@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_presets_survive_files(name, ending, tmp_path):
    config = resolve_config(name)
    path = tmp_path / f"config.{ending}"
    config.save(path)
    assert DFSAttnConfig.load(path) == config == resolve_config(str(path)) == resolve_config(path)
    assert DFSAttnConfig.from_dict(config.to_dict()) == config
    assert resolve_config(config.to_dict()) == config


def test_overrides_and_immutability():
    config = resolve_config("paper", keep_ratios=[0.5], dense_layers=[0, 3])
    assert config.keep_ratios == (0.5,) and config.dense_layers == (0, 3)
    fast = resolve_config("fast", keep_ratios=[0.5])
    # Five times as much is kept in short runs, too.
    stock = resolve_config("fast")
    assert fast.keep_ratios == (0.5,) == (5 * stock.keep_ratios[0],)
    assert fast.few_step_ratios == tuple(min(1, 5 * r) for r in stock.few_step_ratios)
    assert resolve_config("fast", keep_ratios=stock.keep_ratios) == stock
    with pytest.raises(TypeError, match="keep_ratios must be a number"):
        resolve_config("fast", keep_ratios=("much",))
    assert resolve_config("fast", keep_ratios=[0.5], few_step_ratios=None).few_step_ratios is None
    assert resolve_config("fast", dense_fraction=0.5).few_step_ratios is None
    for preset in list_presets():
        assert resolve_config(preset, residual_pool=None).residual_rank is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.order = "raster"
    assert hash(config) == hash(config.replace(order="hilbert3d"))


@pytest.mark.parametrize(
    "fields, error, message",
    [
        (dict(keep_ratios=(0.3, 1.2)), ValueError, r"keep_ratios must lie in \(0, 1\]; got 1.2"),
        (dict(keep_ratios=(0,)), ValueError, r"keep_ratios must lie in \(0, 1\]; got 0"),
        (dict(keep_ratios=(float("nan"),)), ValueError, r"got nan"),
        (dict(keep_ratios=()), ValueError, "at least one value"),
        (dict(keep_ratios=(0.1, 0.2)), ValueError, "must not rise along the run"),
        (dict(few_step_ratios=(0.1, 0.2)), ValueError, "few_step_ratios must not rise along"),
        (dict(few_step_ratios=()), ValueError, "few_step_ratios must hold at least one value"),
        (dict(few_step_ratios=0.3), TypeError, "few_step_ratios must be a sequence of numbers"),
        (dict(keep_ratios=0.3), TypeError, "keep_ratios must be a sequence of numbers; got 0.3"),
        (dict(keep_ratios=None), TypeError, "keep_ratios must be a sequence of numbers; got None"),
        (dict(dense_layers=None), TypeError, "dense_layers must be a sequence"),
        (dict(keep_ratios="0.3"), TypeError, "keep_ratios must be a sequence"),
        (dict(dense_fraction=-0.1), ValueError, r"dense_fraction must lie in \[0, 1\]"),
        (dict(dense_fraction="some"), TypeError, "dense_fraction must be a number"),
        (dict(refresh_interval=0), ValueError, r"refresh_interval must lie in \(0, 1\]"),
        (dict(refresh_growth=0.9), ValueError, "refresh_growth must be at least 1, and finite; g"),
        (dict(refresh_growth=float("inf")), ValueError, "refresh_growth must be at least 1, and"),
        (dict(refresh_growth=10**400), ValueError, "refresh_growth must be at least 1, and finite"),
        (dict(refresh_growth="fast"), TypeError, "refresh_growth must be a number; got 'fast'"),
        (dict(refreshes=2), ValueError, "refreshes must be at least 3; got 2"),
        (dict(order="peano"), ValueError, "order must be one of hilbert3d"),
        (dict(budget="all"), ValueError, "budget must be one of row"),
        (dict(selection="luck"), ValueError, "selection must be one of mass"),
        (dict(tile_size=24), ValueError, "tile_size must divide query_block"),
        (dict(key_block=96), ValueError, "must divide the other; got 128 and 96"),
        (dict(query_block=0), ValueError, "query_block must be at least 1"),
        (dict(tail="median"), ValueError, "tail must be one of None, mean, moment; got 'median'"),
        (dict(tail="mean", tail_pool=48), ValueError, "tail_pool must divide key_block; got tail_"),
        (dict(correction_precision="fp4"), ValueError, "one of None, full, fp8, int8; got 'fp4'"),
        (dict(tail_pool=0), ValueError, "tail_pool must be at least 1"),
        (dict(precision="int4"), ValueError, "must be one of full, fp8, int8; got 'int4'"),
        (dict(selection="error"), ValueError, "ranks blocks by what the tail gets wrong; got tail"),
        (dict(dense_layers=(-1,)), ValueError, "dense_layers must be at least 0"),
        (dict(dense_layers=("12",)), TypeError, "dense_layers must be a whole number"),
        (dict(min_tokens=1.5), TypeError, "min_tokens must be a whole number"),
        (dict(share_maps_across_branches="False"), TypeError, "must be True or False"),
        (dict(last_step_dense=1), TypeError, "last_step_dense must be True or False; got 1"),
        (dict(backend=None), TypeError, "backend must be"),
    ],
    ids=str,
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        DFSAttnConfig(**fields)


def test_unknown_names():
    with pytest.raises(ValueError, match="Unknown preset 'turbo!'; known presets are paper"):
        resolve_config("turbo!")
    with pytest.raises(ValueError, match="Unknown config field 'sparsity'; known fields are"):
        resolve_config({"sparsity": 0.3})
    with pytest.raises(ValueError, match="Unknown config field 'keep_ratio'"):
        resolve_config("paper", keep_ratio=0.3)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        resolve_config("nowhere.json")
    with pytest.raises(ValueError, match="ends in .json, .yaml or .yml"):
        DFSAttnConfig().save(tmp_path / "config.toml")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold one mapping of config fields; got list"):
        DFSAttnConfig.load(tmp_path / "list.json")


def test_yaml_without_its_extra(monkeypatch, tmp_path):
    real_import = builtins.__import__

    def no_yaml(name, *args, **kwargs):
        if name == "yaml":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_yaml)
    with pytest.raises(ImportError, match=r"pip install 'dfsattn_diffusers\[yaml\]', or use .json"):
        DFSAttnConfig().save(tmp_path / "config.yaml")
