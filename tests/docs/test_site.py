"""The documentation site builds without warnings, works without a network, and draws the layers that are checked."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from tests.docs.markdown import ROOT, tokens

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}


def build(docs: Path, site: Path) -> subprocess.CompletedProcess:
    """Builds a site as `make docs` does; warnings, broken links and broken anchors among them, are errors."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", f"{site}.doctrees", docs, site]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def loaded_from_elsewhere(page: str) -> list[str]:
    """Returns the addresses on other hosts from which a page loads scripts, styles, fonts or images."""
    html = BeautifulSoup(page, "html.parser")
    addresses = [str(tag.get(LOADED[tag.name], "")) for tag in html.find_all(list(LOADED))]
    addresses += [address for style in html.find_all("style") for address in in_style(style.text)]
    return [address for address in addresses if re.match(r"(https?:)?//", address)]


def in_style(text: str) -> list[str]:
    """Returns the addresses that a style sheet loads."""
    return re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")]+)", text)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_all_pages_and_the_api(site: Path) -> None:
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not (site / page).exists()] == []
    inventory = BeautifulSoup((site / "genindex.html").read_text(encoding="utf-8"), "html.parser")
    entries = {str(link["href"]).partition("#")[2] for link in inventory.find_all("a", href=True)}
    for name in ("api.load", "api.Model", "models.dit.MicroDiT", "diffusion.edm.loss", "evaluation.fid.fid"):
        assert f"micro_dit.{name}" in entries


def test_the_site_needs_no_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert loaded_from_elsewhere(path.read_text(encoding="utf-8")) == [], path
    for path in site.rglob("*.css"):
        assert in_style(path.read_text(encoding="utf-8")) == [], path


def test_what_needs_a_network_is_found() -> None:
    page = """<link rel="stylesheet" href="https://a.org/x.css"><script src="//b.org/x.js"></script><img src="x.png">
        <style>@import "http://c.org/x.css"; p { background: url('https://d.org/x.png') }</style>
        <a href="https://e.org">a link to follow is no load</a><img src="data:image/png;base64,//x">"""
    hosts = [address.split("/")[2] for address in loaded_from_elsewhere(page)]
    assert hosts == ["a.org", "b.org", "c.org", "d.org"]


def test_broken_links_fail_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    (docs / "index.md").write_text("# A\n\n[x](missing.md) [y](#nowhere) [z](index.md#absent) {func}`a`\n")
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    for target in ("missing.md", "nowhere", "absent"):
        assert target in done.stderr


def test_the_page_on_the_layout_draws_the_layers_that_are_checked() -> None:
    page = (ROOT / "docs" / "code_layout.md").read_text(encoding="utf-8")
    drawing = next(token.content for token in tokens(page) if token.type == "fence").splitlines()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in contracts["contracts"] if contract["type"] == "layers"]
    above = -1
    for layer in layers:
        modules = re.findall(r"\w+", layer)
        if modules == ["__main__"]:
            continue
        rows = [row for name in modules for row, line in enumerate(drawing) if re.search(rf"[│·] {name}\b", line)]
        assert len(rows) == len(modules), layer
        assert min(rows) > above, layer
        above = max(rows)
