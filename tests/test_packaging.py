"""The wheel, built from the source distribution and used from an empty directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNEL_SOURCES = [p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.cu*")]
MODELS = [config.parent for config in (ROOT / "models").glob("*/config.json")]


def run(*command: str | Path, cwd: Path) -> str:
    """The command's standard output. Its environment leads neither to this checkout nor to a model hub."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("kvturbo-*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts folder of an environment that has the wheel; all else comes from the environment that runs the tests."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False)
    scripts = home / "bin"
    purelib = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home)}))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=home,
    )
    (purelib / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return scripts


def test_wheel_holds_licence_kernels_and_models(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    model_files = [f"kvturbo/models/{m.name}/{p.relative_to(m).as_posix()}" for m in MODELS for p in m.rglob("*.*")]
    missing = {*KERNEL_SOURCES, *model_files}.difference(names)
    assert not missing
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "src/"))]


def test_import_comes_from_the_wheel_with_its_version(scripts: Path, wheel: Path, tmp_path: Path) -> None:
    program = "import json, kvturbo; print(json.dumps([kvturbo.__file__, kvturbo.__version__]))"
    file, version = json.loads(run(scripts / "python", "-c", program, cwd=tmp_path))
    assert Path(file).is_relative_to(scripts.parent)
    assert wheel.name == f"kvturbo-{version}-py3-none-any.whl"


def test_info_prints_json(scripts: Path, tmp_path: Path) -> None:
    info = run(scripts / "kvturbo", "info", "k4v4", "--json", cwd=tmp_path)
    assert "k4v4" in json.dumps(json.loads(info))


@pytest.mark.skipif(not MODELS, reason="models/ holds no model")
def test_generate_uses_the_model_in_the_wheel(scripts: Path, tmp_path: Path) -> None:
    result = run(
        *(scripts / "kvturbo", "generate", "--max-new-tokens", "4", "--prompt", "import os", "--json"), cwd=tmp_path
    )
    assert json.loads(result)
    assert list(tmp_path.iterdir()) == []
