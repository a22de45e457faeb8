"""Lists the commands of the package: `python -m micro_dit`."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent
COMMANDS = (
    "main", "sample", "evaluate", "compare", "playground", "precompute", "data.fetch", "data.inspect", "budget",
    "rehearse", "export", "convert", "encoders.convert_weights", "train_vae",
)  # fmt: skip


def summary(command: str) -> str:
    """Returns the first line of a command's docstring, without the command line in it; imports nothing."""
    path = PACKAGE.joinpath(*command.split("."))
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].partition(": `python -m")[0].rstrip(".:")


def main() -> None:
    """Prints a line for each command."""
    width = max(map(len, COMMANDS))
    print("Commands of micro_dit; add --help for the flags of one:\n")
    for command in COMMANDS:
        print(f"  python -m micro_dit.{command:{width}}  {summary(command)}")


if __name__ == "__main__":
    main()
