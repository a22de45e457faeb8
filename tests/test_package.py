"""The package itself: what it exports, its version, and the list of its commands."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import micro_dit
from micro_dit.__main__ import COMMANDS, main, summary

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
IMPORTS = (
    "import sys, micro_dit.__main__; micro_dit.__version__; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
)


def test_importing_the_package_and_listing_its_commands_import_no_library() -> None:
    assert subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT).returncode == 0


def test_load_is_the_function_of_the_api() -> None:
    from micro_dit import load
    from micro_dit.api import load as api_load

    assert load is api_load
    with pytest.raises(ImportError, match="cannot import name 'save'"):
        from micro_dit import save  # noqa: F401


def test_the_version_is_that_of_the_installed_package_or_else_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"micro_dit": "9.8.7"}[name])
    assert micro_dit.__version__ == "9.8.7"

    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert micro_dit.__version__ == PYPROJECT["project"]["version"]


def test_all_commands_are_listed_with_a_line_each(capsys: pytest.CaptureFixture) -> None:
    (contract,) = [c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "protected"]
    assert {f"micro_dit.{command}" for command in COMMANDS} == set(contract["protected_modules"])
    main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[2] for line in lines] == [f"micro_dit.{command}" for command in COMMANDS]
    assert lines[0].endswith("  Trains a model")
    for command in COMMANDS:
        assert summary(command)[:1].isupper()
        assert "`" not in summary(command)


def test_type_checkers_find_the_annotations_of_the_installed_package() -> None:
    assert (ROOT / "micro_dit" / "py.typed").exists()
    assert "py.typed" in PYPROJECT["tool"]["setuptools"]["package-data"]["micro_dit"]


def test_versions_agree_across_files() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    ours = {"ruff": "ruff-pre-commit", "nbstripout": "nbstripout"}
    for line in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines():
        if re.match(r"ruff|nbstripout", line):
            requirement = Requirement(line)
            repository = ours.pop(requirement.name)
            (revision,) = [hook["rev"] for hook in hooks if hook["repo"].endswith(f"/{repository}")]
            assert requirement.specifier.contains(revision.removeprefix("v")), line
    assert not ours
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PYPROJECT["project"]["version"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    supported = SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert all(supported.contains(python) for python in workflow["strategy"]["matrix"]["python-version"])
    assert any("make test" in step.get("run", "") for step in workflow["steps"])
