"""The generation scripts: one new line each, help, early errors, a real mp4."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
from tiny_pipelines import FAMILIES, pixels

SCRIPTS = Path(__file__).parents[1] / "scripts"
FAMILY_OF = {
    "generate_wan": "wan",
    "generate_hunyuan_video": "hunyuan_video",
    "generate_cogvideox": "cogvideox-5b",
}
OPTIONS = [
    *("model", "prompt", "negative-prompt", "height", "width", "frames", "steps", "guidance"),
    *("seed", "dtype", "device", "offload", "preset", "dense", "output"),
]


@pytest.fixture(params=FAMILY_OF)
def name(request):
    return request.param


def load_main(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_exactly_one_line_is_new(name):
    source = (SCRIPTS / f"{name}.py").read_text()
    tree = ast.parse(source)
    imports = [
        [alias.name for alias in node.names]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dfsattn")
    ]
    lines = [line for line in source.splitlines() if "enable_dfsattn(" in line]
    assert imports == [["enable_dfsattn"]]
    assert len(lines) == 1 and lines[0].endswith("# the one new line")
    assert len(source.splitlines()) <= 60


def test_help_names_every_option_and_writes_nothing(name, tmp_path):
    command = [sys.executable, SCRIPTS / f"{name}.py", "--help"]
    here = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    result = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [option for option in OPTIONS if f"--{option}" not in result.stdout] == []
    assert list(tmp_path.iterdir()) == []


def test_a_bad_output_fails_before_the_model_is_sought(name, tmp_path, capsys):
    main = load_main(name)
    nowhere = ["--model", str(tmp_path / "no-model")]
    with pytest.raises(SystemExit):
        main([*nowhere, "--output", str(tmp_path / "video.txt")])
    assert "must end in .mp4" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        main([*nowhere, "--output", str(tmp_path / "file" / "video.mp4")])
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError):
        main([*nowhere, "--output", str(tmp_path / "folder.mp4")])


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_writes_a_video(name, dense, tmp_path, capsys):
    pipe = FAMILIES[FAMILY_OF[name]]()
    pipe.save_pretrained(tmp_path / "model")
    size = pixels(pipe, (3, 5, 7))
    output = tmp_path / "new" / "folder" / "video.mp4"
    arguments = {
        "model": tmp_path / "model",
        "prompt": "a red circle moves right",
        "negative-prompt": "blurry",
        "height": size["height"],
        "width": size["width"],
        "frames": size["num_frames"],
        "steps": 4,
        "dtype": "float32",
        "device": "cpu",
        "preset": "paper",
        "output": output,
    }
    flags = ["--dense"] if dense else []
    load_main(name)([f"--{key}={value}" for key, value in arguments.items()] + flags)

    video = imageio.imread(output)
    assert video.shape == (size["num_frames"], size["height"], size["width"], 3)
    assert video.std() > 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {output}"
    assert (len(lines) == 1) == dense
