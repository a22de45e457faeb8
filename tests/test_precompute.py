import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_command_prints_errors_on_one_line_and_its_flags_in_help(tmp_path: Path) -> None:
    def call(*flags: str) -> subprocess.CompletedProcess:
        arguments = [sys.executable, "-m", "micro_dit.precompute", *flags]
        return subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True)

    failed = call("--source=nothing", f"--out={tmp_path / 'shards'}", "--vae=nowhere", "--noclean_captions")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1
    assert "Unknown data source 'nothing'" in failed.stderr
    refused = call(f"--source=mds:{tmp_path}", f"--out={tmp_path / 'shards'}", "--vae=sdxl", "--seed=1")
    assert "--seed has no effect with --source=mds:" in refused.stderr
    shown = call("--help").stdout
    for flag in ("--source", "--out", "--vae", "--resolutions", "--text_encoder", "--posterior", "--process_index"):
        assert flag in shown
