"""The code of CONTRIBUTING.md works: a data source, a config and a metric."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from micro_dit.data import sources
from micro_dit.errors import UserError
from micro_dit.evaluation import registry
from micro_dit.evaluation.image_sets import InMemory
from micro_dit.training.phases import make_phases
from micro_dit.training.recipe import make_recipe
from micro_dit.training.workdir import same_config
from tests.docs.markdown import ROOT, python_code
from tests.helpers import tiny
from tests.helpers.source_files import captions_of, image_file, read_source, rejects_of

SOURCE, CONFIG, METRIC = python_code((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def defined_by(code: str) -> Any:
    """Runs a block of code as a module."""
    module = types.ModuleType("recipe")
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module


def test_the_data_source_is_opened_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "micro_dit.data.sources.jsonl", defined_by(SOURCE))
    monkeypatch.setitem(sources.SOURCES, "jsonl", sources._opener("jsonl", "JsonLines"))
    (tmp_path / "a.png").write_bytes(image_file("red", "PNG"))
    lines = [{"file": "a.png", "caption": "a red card"}, {"file": "b.png", "caption": "missing"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    items = read_source(f"jsonl:{tmp_path / 'list.jsonl'},split=test", "test")
    assert captions_of(items) == {"a.png": ("a red card",)}
    assert rejects_of(items) == {"b.png": sources.MISSING_FILE}
    with pytest.raises(UserError, match=r"unknown option 'spilt'\. Valid options: split"):
        sources.open_source(f"jsonl:{tmp_path / 'list.jsonl'},spilt=test", px=64)


def test_the_config_is_complete(tmp_path: Path) -> None:
    shutil.copy(tiny.CONFIGS / "mask75.py", tmp_path)
    (tmp_path / "deep75.py").write_text(CONFIG)
    config, demo = (tiny.load_config_file(tmp_path / name) for name in ("deep75.py", "mask75.py"))
    assert (config.name, config.model.depth) == ("deep75", 12)
    assert make_phases(config.phases) == make_phases(demo.phases)
    assert make_recipe(config) == make_recipe(demo)
    assert not same_config(config.to_dict(), demo.to_dict())


def test_the_metric_is_measured_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METRICS, "contrast", defined_by(METRIC).Contrast)
    measure = registry.load_metrics(["contrast"], registry.MetricInputs(side=2))
    checkered = np.zeros((100, 2, 2, 3), np.uint8)
    checkered[::2, 0] = 255
    (result,) = measure(InMemory(checkered))
    assert (result.name, result.value, result.pipeline["images"]) == ("contrast", pytest.approx(127.5 / 2), 100)
