"""Parametrizes the parity tests with the golden cases in --golden-dir."""

from pathlib import Path

import pytest

from tests.helpers.golden import read


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden-dir"))
    networks = [path for path in sorted(folder.glob("dit_*.npz")) if not path.stem.endswith("_grads")]
    if "network_case" in metafunc.fixturenames:
        cases = [(path, case) for path in networks for case in read(path)[1]["cases"]]
        metafunc.parametrize("network_case", cases, ids=[f"{path.stem}-{case}" for path, case in cases])
    if "network_file" in metafunc.fixturenames:
        metafunc.parametrize("network_file", networks, ids=[path.stem for path in networks])
    if "unit" in metafunc.fixturenames:
        units = list(read(folder / "units.npz")[1]["units"]) if (folder / "units.npz").exists() else []
        metafunc.parametrize("unit", units)
    if "full_file" in metafunc.fixturenames:
        files = sorted(folder.glob("full_*.npz"))
        metafunc.parametrize("full_file", files, ids=[path.stem for path in files])
    if "size_file" in metafunc.fixturenames:
        files = sorted(folder.glob("MicroDiT_*.json"))
        metafunc.parametrize("size_file", files, ids=[path.stem for path in files])


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden-dir"))
