"""The launch scripts: valid, and their dry runs are the exact commands."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import train
from dflash_jax.errors import InputError
from train.processes import Share, join_arguments

FOLDER = Path(train.__file__).parent / "launch"
PLACE = {"CLUSTER": "c", "ZONE": "z", "PROJECT": "p", "IMAGE": "i", "WORKLOAD": "w"}


def dry(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    given = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(["bash", FOLDER / script, *arguments], env=given, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["xpk.sh", "tpu_vm.sh", "gpu.slurm"])
def test_scripts_are_valid_shell_and_say_how_they_are_used(script):
    subprocess.run(["bash", "-n", FOLDER / script], check=True)
    assert dry(script, **PLACE).returncode == 2
    assert "dflash" in dry(script, **PLACE).stderr or script in dry(script, **PLACE).stderr


def test_xpk_makes_one_workload():
    made = dry("xpk.sh", "--dry-run", "v5p-128", "/gcs/a b.yaml", "training.batch=64", **PLACE)
    words = shlex.split(made.stdout)
    assert words[:3] == ["xpk", "workload", "create"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--tpu-type"] == "v5p-128" and options["--num-slices"] == "1"
    assert options["--env"] == "DFLASH_DISTRIBUTED=1"
    assert shlex.split(options["--command"]) == ["dflash", "train", "drafter", "/gcs/a b.yaml", "training.batch=64"]
    missing = dry("xpk.sh", "--dry-run", "v5p-128", "a.yaml", **{k: v for k, v in PLACE.items() if k != "IMAGE"})
    assert missing.returncode != 0 and "container image" in missing.stderr


def test_tpu_vms_are_asked_for_installed_on_and_started():
    made = dry("tpu_vm.sh", "--dry-run", "pod", "v6e-8", "/mnt/run.yaml", "out=/mnt/out", **PLACE)
    assert made.returncode == 0, made.stderr
    lines = [shlex.split(line) for line in made.stdout.splitlines()]
    assert lines[0][:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert lines[0][lines[0].index("--runtime-version") + 1] == "v2-alpha-tpuv6e"
    assert [line[4] for line in lines if line[0] == "gcloud"] == ["create", "scp", "ssh", "ssh"]
    assert all("--worker=all" in line for line in lines[2:])
    assert lines[-1][-1].startswith("DFLASH_DISTRIBUTED=1 ")
    assert lines[-1][-1].split()[-4:] == ["train", "drafter", "/mnt/run.yaml", "out=/mnt/out"]
    wrong = dry("tpu_vm.sh", "--dry-run", "pod", "v2-8", "a.yaml", **PLACE)
    assert wrong.returncode == 2 and "give v5p-N, v5litepod-N or v6e-N" in wrong.stderr


def test_slurm_starts_one_process_a_node():
    made = dry("gpu.slurm", "run.yaml", "mesh.fsdp=32", DRY_RUN="1")
    assert shlex.split(made.stdout) == [
        *("srun", "--kill-on-bad-exit=1", "dflash", "train", "drafter", "run.yaml", "mesh.fsdp=32"),
    ]
    text = (FOLDER / "gpu.slurm").read_text()
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in text.splitlines()
                   if line.startswith("#SBATCH --") and "=" in line)  # fmt: skip
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:USR1@")


def test_the_jobset_has_a_pod_for_every_host_of_its_slice():
    job = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert (job["kind"], job["apiVersion"]) == ("JobSet", "jobset.x-k8s.io/v1alpha2")
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert spec["parallelism"] == spec["completions"] == x * y * z // chips
    assert {"name": "DFLASH_DISTRIBUTED", "value": "1"} in pod["containers"][0]["env"]


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, {}),
        ({"DFLASH_DISTRIBUTED": "1"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
    ],
)
def test_what_jax_distributed_is_called_with(environment, arguments):
    assert join_arguments(environment) == arguments


def test_half_named_processes_are_refused():
    with pytest.raises(InputError, match=r"JAX_NUM_PROCESSES is set, so the processes are joined by .*; set all three"):
        join_arguments({"JAX_NUM_PROCESSES": "2"})
    with pytest.raises(InputError, match="as host:port and whole numbers"):
        join_arguments({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"})


def test_pieces_of_all_shares_are_the_whole():
    assert sorted(k for i in range(3) for k in Share(i, 3).pieces(10)) == list(range(10))
