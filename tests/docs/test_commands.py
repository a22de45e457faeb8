"""Commands, make targets, flags and config fields that the pages name exist."""

import functools
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import flags

from micro_dit.__main__ import COMMANDS
from micro_dit.cli import _fields, load_config
from micro_dit.errors import REMOVED_FIELDS
from tests.docs.markdown import PAGES, ROOT, code

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
TAKE_ARGS = dict(re.findall(r"^([a-z][\w-]*):.*\n\t.* -m ([\w.]+) \$\(ARGS\)", MAKEFILE, re.MULTILINE))
OWN_SCRIPTS = ("benchmarks/", "configs/", "launch/", "micro_dit/", "tests/")
OTHER_PROGRAMS = ("git", "hf", "pip", "pre-commit", "sky", "tensorboard", "xprof")
PROGRAM = re.compile(r"python[\d.]* -m (?P<module>[\w.]+)|(?<![\w=,./-])(?P<script>[\w./]+\.(?:py|sh|sbatch))(?=\s|$)")
FLAG = re.compile(r"(?<![\w-])--([a-zA-Z][\w.\[\]-]*)")
CONFIG = re.compile(r"(configs/\w+\.py)(?::([\w-]+))?")


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """Returns the flags that a command defines; those of switches also with the prefix 'no'."""
    package = importlib.util.find_spec(f"micro_dit.{command}.__main__") if command == "playground" else None
    module = importlib.import_module(f"micro_dit.{command}.__main__" if package else f"micro_dit.{command}")
    others = {name: flags.FLAGS[name] for name in flags.FLAGS if not _is_absls(name)}  # other tests may define flags
    try:
        for name in others:
            delattr(flags.FLAGS, name)
        getattr(module, "define_flags", lambda: None)()
        defined = {name for name in flags.FLAGS if not _is_absls(name)}
        return frozenset(defined) | {f"no{name}" for name in defined if flags.FLAGS[name].boolean}
    finally:
        for name in [name for name in flags.FLAGS if not _is_absls(name)]:
            delattr(flags.FLAGS, name)
        for name, flag in others.items():
            flags.FLAGS[name] = flag


def _is_absls(flag: str) -> bool:
    return str(flags.FLAGS.find_module_defining_flag(flag)).startswith("absl")


@functools.cache
def config_fields() -> frozenset[str]:
    """Returns the fields of all variants of the shipped configs, with [i] for an index."""
    return frozenset(
        re.sub(r"\[\d+\]", "[i]", field)
        for variant in ("demo", "xl") for field in _fields(load_config(f"{ROOT / 'configs' / 'mask75.py'}:{variant}"))
    )  # fmt: skip


@functools.cache
def config_exists(file: str, variant: str) -> bool:
    """Returns whether there is such a config file, with this variant if one is named."""
    try:
        load_config(f"{ROOT / file}:{variant}" if variant else str(ROOT / file))
    except (FileNotFoundError, ValueError, KeyError):
        return False
    return True


def unknown_flags(line: str, allowed: frozenset[str]) -> Iterator[str]:
    """Yields the flags and config fields of a line that are not allowed."""
    for flag in FLAG.findall(line):
        name = flag.rstrip(".")
        if name.startswith("config.") and "config" in allowed:
            field = re.sub(r"\[\w+\]", "[i]", name.removeprefix("config."))
            if field not in config_fields() and field not in REMOVED_FIELDS:
                yield f"config field {name}"
        elif name not in allowed and name != "help" and not name.startswith("xla_"):
            yield f"flag --{name}"


def problems_of(line: str) -> Iterator[str]:
    """Yields what does not exist of the things that a line of code names."""
    for target, rest in re.findall(r"(?:^|[;&|(]\s*)make (?:[A-Z]+=\S+ )*([a-z][\w-]*)([^;&|]*)", line):
        if target not in TARGETS:
            yield f"make target {target}"
        elif target in TAKE_ARGS:
            yield from script_problems(ROOT / f"{TAKE_ARGS[target].replace('.', '/')}.py", rest)
    for file, variant in CONFIG.findall(line):
        if not config_exists(file, variant):
            yield f"config {file}:{variant}".rstrip(":")
    starts = list(PROGRAM.finditer(line))
    before = line[: starts[0].start()] if starts else line
    first = before.split(maxsplit=1)[0] if before.strip() else ""
    commands = {command.rpartition(".")[2]: command for command in COMMANDS}
    if first in commands:
        yield from unknown_flags(before, flags_of(commands[first]))
    elif first not in ("make", *OTHER_PROGRAMS):
        yield from unknown_flags(before, frozenset().union(*map(flags_of, COMMANDS)))
    ends = [*(match.start() for match in starts[1:]), len(line)]
    for match, end in zip(starts, ends, strict=False):
        arguments = line[match.end() : end]
        module, script = match["module"], match["script"]
        if module and module.startswith("micro_dit."):
            if (command := module.removeprefix("micro_dit.")) not in COMMANDS:
                yield f"command {module}"
            else:
                yield from unknown_flags(arguments, flags_of(command))
        elif module and not module.startswith("benchmarks."):
            if importlib.util.find_spec(module) is None:
                yield f"module {module}"
        elif (path := script or f"{module.replace('.', '/')}.py").startswith(OWN_SCRIPTS):
            yield from script_problems(ROOT / path, arguments)


def script_problems(path: Path, arguments: str) -> Iterator[str]:
    """Yields a script that does not exist, and the flags that it does not mention."""
    if not path.exists():
        yield f"script {path.relative_to(ROOT)}"
        return
    text = path.read_text(encoding="utf-8")
    for flag in FLAG.findall(arguments):
        if not re.search(rf"[\"'-]{re.escape(flag)}\b", text):
            yield f"flag --{flag} of {path.relative_to(ROOT)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_code_of_a_page_names_exists(page: Path) -> None:
    lines = code(page.read_text(encoding="utf-8"))
    assert {line: problems for line in lines if (problems := list(problems_of(line)))} == {}


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("python -m micro_dit.main --config=configs/mask75.py:xl --workdir=x --config.phases[0].steps=3", []),
        (".venv/bin/python -m micro_dit.sample --prompt=x --nopath_drop --help", []),
        ("python launch/until_done.py python -m micro_dit.main --config=configs/frugal.py", []),
        ("evaluate --metrics=domain --guidance=3", []),
        ("hf download x --local-dir=y", []),
        ("--config.model.depth=3", []),
        ("make demo CONFIG=configs/frugal.py && make bench ARGS=--json=x", []),
        ("make bench ARGS=--xml=y", ["flag --xml of benchmarks/train_step.py"]),
        ("make demos", ["make target demos"]),
        ("python -m micro_dit.paint --size=3", ["command micro_dit.paint"]),
        ("python -m micro_dit.data.shards", ["command micro_dit.data.shards"]),
        ("python -m benchmarks.nothing", ["script benchmarks/nothing.py"]),
        ("python -m benchmarks.growth --json=x --xml=y", ["flag --xml of benchmarks/growth.py"]),
        ("python launch/none.py", ["script launch/none.py"]),
        ("python -m micro_dit.sample --workdri=x", ["flag --workdri"]),
        ("python -m micro_dit.sample --config.seed=1", ["flag --config.seed"]),
        ("fetch --dataset=cc12m --prompt=x", ["flag --prompt"]),
        ("python -m micro_dit.main --config=configs/mask75.py:xxl", ["config configs/mask75.py:xxl"]),
        ("python -m micro_dit.main --config=configs/none.py", ["config configs/none.py"]),
        ("--config.phases[0].stpes=3", ["config field config.phases[0].stpes"]),
        ("--nothing", ["flag --nothing"]),
    ],
)  # fmt: skip
def test_mistakes_are_found(line: str, problems: list[str]) -> None:
    assert list(problems_of(line)) == problems
