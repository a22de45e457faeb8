"""Launchers start the same command with existing flags, and contain no private project, bucket or host."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement

from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELL = [LAUNCH / "tpu_vm.sh", LAUNCH / "slurm.sbatch", LAUNCH / "gke.sh"]
JOBSETS = {kind: LAUNCH / f"jobset_{kind}.yaml" for kind in ("tpu", "gpu")}
NAMES = dict(IMAGE="image", BUCKET="bucket", RUN_NAME="demo", CONFIG="configs/mask75.py:xl")
ENTRY = ["python", "launch/until_done.py", "python", "-m", "micro_dit.main"]


def dry_run(*command: Any, **environment: str) -> str:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={"PATH": os.environ["PATH"]} | environment, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip


def jobset(kind: str) -> dict[str, Any]:
    return yaml.safe_load(dry_run(LAUNCH / "gke.sh", "--dry_run", kind, "apply", **NAMES))


def pod(kind: str) -> dict[str, Any]:
    (job,) = jobset(kind)["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


def entry_of_the_image() -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (LAUNCH / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    return yaml.safe_load(line)


def commands_in(path: Path) -> list[list[str]]:
    """Returns the words of each command in a shell script that calls micro_dit.main, without expanding variables."""
    text = path.read_text().replace("\\\n", " ")
    text = re.sub(r"local command=\((.*?)\)\n", lambda match: match[1].replace("\n", " ") + "\n", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if "-m micro_dit.main" in line and not line.strip().startswith("#")]
    return [shlex.split(line[line.index("launch/until_done.py") :]) for line in lines]


def training_commands(launcher: str) -> list[list[str]]:
    """Returns the words of each training command that a launcher starts, from launch/until_done.py on."""
    if launcher in ("tpu_vm.sh", "slurm.sbatch"):
        return commands_in(LAUNCH / launcher)
    if launcher == "sky.yaml":
        return [shlex.split(yaml.safe_load((LAUNCH / launcher).read_text())["run"].replace("\\\n", " "))[1:]]
    if launcher == "xm_launch.py":
        arguments = ["--config=configs/mask75.py:small", "--sweep=mask_ratio", "--xm_dry_run", "--python=python"]
        lines = dry_run(sys.executable, LAUNCH / launcher, *arguments).splitlines()
        return [shlex.split(line[line.index("launch/until_done.py") :]) for line in lines]
    kind = launcher.removeprefix("jobset_").removesuffix(".yaml")
    return [entry_of_the_image()[1:] + pod(kind)["containers"][0]["args"]]


@pytest.mark.parametrize(
    "launcher", ["tpu_vm.sh", "slurm.sbatch", "sky.yaml", "xm_launch.py", *(path.name for path in JOBSETS.values())]
)
def test_launchers_start_the_same_command_with_existing_flags(launcher: str) -> None:
    commands = training_commands(launcher)
    assert len(commands) > 1 if launcher == "xm_launch.py" else len(commands) == 1
    for words in commands:
        assert words[0] == "launch/until_done.py"
        module = words.index("micro_dit.main")
        assert words[module - 1] == "-m"
        assert "python" in words[module - 2]
        flags = dict(
            word.removeprefix("--").partition("=")[::2] for word in words[module + 1 :] if word.startswith("--")
        )
        assert {"config", "workdir"} <= set(flags)
        source = "".join((ROOT / "micro_dit" / name).read_text() for name in ("main.py", "cli.py"))
        known = {"config", *re.findall(r"flags\.DEFINE_\w+\(\s*\"(\w+)\"", source)}
        config = tiny.load_config_file(ROOT / "configs" / "mask75.py", "xl")
        for name in flags:
            if name.startswith("config."):
                field: Any = config
                for part in name.removeprefix("config.").split("."):
                    assert part in field, name
                    field = field[part]
            else:
                assert name in known, name
        if "$" not in flags["config"]:
            file, _, variant = flags["config"].partition(":")
            assert tiny.load_config_file(ROOT / file, variant).phases


def test_configs_in_launchers_exist() -> None:
    for path in files():
        for file, variant in re.findall(r"(configs/\w+\.py)(?::(\w+))?", path.read_text()):
            assert tiny.load_config_file(ROOT / file, variant or "demo").phases, path.name


def files() -> list[Path]:
    return [path for path in sorted(LAUNCH.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def test_launchers_contain_no_private_names() -> None:
    """Checks for projects, buckets, hosts, addresses, keys and local paths; only public product hosts are allowed."""
    public = (
        "cloud.google.com", "docs.skypilot.co", "jobset.sigs.k8s.io", "packages.cloud.google.com", "huggingface.co",
        "download.pytorch.org",
    )  # fmt: skip
    secrets = r"AKIA[0-9A-Z]{16}|AIza[\w-]{35}|hf_\w{20,}|ghp_\w{20,}|-----BEGIN|xox[bap]-|ya29\."
    private = r"(?:gs|s3)://\w|\b[\w.]+@[\w-]+\.\w+|gcr\.io/|docker\.pkg\.dev|/home/\w|/root/|/tmp/"
    address = r"\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b"
    for path in files():
        text = path.read_text()
        if path.suffix == ".ipynb":  # encoded images could match; test_notebooks.py checks the outputs
            text = "".join(cell["source"] for cell in nbformat.read(path, 4).cells)
        for host in re.findall(r"https?://([\w.-]+)", text):
            assert host in public, (path.name, host)
        assert not re.search(secrets, text), path.name
        assert not re.search(private, text), path.name
        assert not re.search(address, text) or path.name == "constraints.txt", path.name


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_slurm_saves_before_the_time_limit_and_requeues(tmp_path: Path) -> None:
    """Runs the script with fake srun and scontrol commands that record their arguments."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in re.findall("#SBATCH .*", text))
    assert options["ntasks-per-node"] == "1"  # one process uses all GPUs of a node
    assert options["signal"] == "TERM@300"  # without "B:", the signal goes to the run and not to the script
    assert "requeue" in options
    for name, status in (("srun", 75), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/calls\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    environment = dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", CONFIG="c.py", WORKDIR="w", SLURM_CPUS_PER_TASK="8", SLURM_JOB_ID="7"
    )
    script = ["bash", LAUNCH / "slurm.sbatch", "--config.seed=1"]
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        "srun --kill-on-bad-exit=0 --cpus-per-task=8 .venv/bin/python launch/until_done.py .venv/bin/python -m "
        "micro_dit.main --config=c.py --workdir=w --config.seed=1",
        "scontrol requeue 7",
    ]
    for name in ("CONFIG", "WORKDIR"):
        done = subprocess.run(script, env=environment | {name: ""}, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"error: {name} is not set; see the top of launch/slurm.sbatch.\n")


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_jobset_restarts_preempted_pods_and_fails_on_errors(kind: str) -> None:
    found = jobset(kind)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["name"] == "demo"
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert policy["rules"] == [{"name": "errors", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0  # if one pod ends, JobSet restarts all of them together
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1]}
    assert spec["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    (container,) = pod(kind)["containers"]
    assert container["image"] == "image"
    assert pod(kind)["restartPolicy"] == "Never"  # required by podFailurePolicy
    assert pod(kind)["securityContext"]["runAsNonRoot"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod(kind)["volumes"]}
    assert pod(kind)["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bucket"


def test_tpu_jobset_uses_all_chips_of_its_slice() -> None:
    (job,) = jobset("tpu")["spec"]["replicatedJobs"]
    rows, columns = pod("tpu")["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = pod("tpu")["containers"][0]["resources"]["limits"]["google.com/tpu"]
    hosts = job["template"]["spec"]
    assert hosts["parallelism"] * chips == hosts["completions"] * chips == int(rows) * int(columns)


def test_gpu_jobset_connects_its_processes() -> None:
    """Checks that the flags are the ones with which tests/multidevice runs two processes."""
    found = jobset("gpu")
    (job,) = found["spec"]["replicatedJobs"]
    (container,) = pod("gpu")["containers"]
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    name, workers = found["metadata"]["name"], job["name"]
    assert flags["coordinator"] == f"{name}-{workers}-0-0.{name}:1234"
    assert {"containerPort": 1234} in container["ports"]
    assert flags["process_index"] == "$(JOB_COMPLETION_INDEX)"
    assert container["env"][0]["name"] == "JOB_COMPLETION_INDEX"
    assert int(flags["process_count"]) == job["template"]["spec"]["completions"]
    tested = (ROOT / "tests" / "multidevice" / "test_processes.py").read_text()
    assert all(f"--{flag}=" in tested for flag in ("coordinator", "process_index", "process_count"))


def test_gke_reports_missing_variables_in_one_line() -> None:
    for kind, missing in (("tpu", "IMAGE"), ("gpu", "BUCKET")):
        environment = {"PATH": os.environ["PATH"]} | NAMES | {missing: ""}
        done = subprocess.run([LAUNCH / "gke.sh", "--dry_run", kind, "apply"], env=environment, capture_output=True)
        assert done.returncode == 1
        assert done.stderr.decode().startswith(f"error: {missing} is not set; see the top of ")
        assert done.stderr.count(b"\n") == 1


def test_sky_recovers_from_preemptions_and_requires_its_variables() -> None:
    found = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert found["resources"]["use_spot"] is True
    assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert found["envs"] == {"CONFIG": None, "RUN_NAME": None, "BUCKET": None}  # null: required by sky
    assert found["file_mounts"]["/bucket"] == {"source": "${BUCKET}", "mode": "MOUNT_CACHED"}
    for step in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=found[step].encode(), check=True)


def test_image_is_pinned_and_runs_as_an_unprivileged_user() -> None:
    text = (LAUNCH / "docker" / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.12\.\d+-slim-\w+$", text, re.MULTILINE)
    assert text.index("USER trainer") < text.index("ENTRYPOINT")
    assert entry_of_the_image() == ENTRY
    for source in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split())
    lines = (LAUNCH / "docker" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line.partition("#")[0].strip():
            requirement = Requirement(line.partition("#")[0].strip())
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement.name


@pytest.mark.parametrize("path", [*SHELL[:2], *JOBSETS.values(), LAUNCH / "sky.yaml", LAUNCH / "docker" / "Dockerfile"])
def test_headers_document_needs_costs_watch_and_stop(path: Path) -> None:
    header = re.match(r"(?:#.*\n)+", path.read_text())
    assert header
    assert all(f"# {word}:  " in header[0] for word in ("Needs", "Costs", "Watch", "Stop"))


@pytest.mark.parametrize("page", ["README.md", "docs/running.md"])
def test_until_done_commands_in_docs_have_a_work_directory(page: str) -> None:
    commands = re.findall(r"launch/until_done\.py python [^\n`]*", (ROOT / page).read_text())
    assert commands
    assert all("--workdir=" in command for command in commands)
