"""Whole runs of `dflash train`, from prompts to a drafter that generates."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import dflash_jax
from dflash_jax import cli
from tests.train import runs
from train import responses
from train.configuration import read_config
from train.data import Corpus
from train.records import JsonLines
from train.run import DrafterRun, main, respond

pytestmark = pytest.mark.usefixtures("children_share_programs")


def child(config: Path, *changes: str) -> list[str]:
    """The command of a run in a process of its own."""
    return [sys.executable, "-m", "dflash_jax", "train", "drafter", str(config), *changes]


@pytest.fixture(scope="module")
def made(tmp_path_factory, children_share_programs) -> tuple[Path, Path]:
    """(folder, out) of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    runs.target_folder(folder / "target")
    runs.prompts_file(folder / "prompts.jsonl", 40)
    config = runs.config_file(folder / "run.yaml", folder / "target", folder / "prompts.jsonl", folder / "out")
    done = subprocess.run(child(config), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, folder / "out"


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in log(out) if "loss" in line]


def test_the_exported_drafter_generates_what_plain_decoding_does(made, capsys):
    folder, out = made
    common = ["generate", "--target", str(folder / "target"), "--prompt", "red", "--max-new-tokens", "12", "--json"]
    assert cli.main([*common, "--drafter", str(out / "model")]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert cli.main(common) == 0
    assert drafted["tokens"] == json.loads(capsys.readouterr().out)["tokens"] and drafted["acceptance_lengths"]


def test_prompts_are_answered_in_the_template_s_form(made):
    folder, out = made
    lines = JsonLines([out / "responses"])
    pair = dflash_jax.load(folder / "target")
    assert len(lines) == 40
    for line in (lines[i] for i in range(4)):
        text = pair.tokenizer.core.decode(line["tokens"][: line["prompt"]], skip_special_tokens=False)
        chat = line["id"] % 2 == 0
        assert text.endswith("<|start|>assistant\n") == chat and text.startswith("<|start|>user\n") == chat


def test_the_log_has_every_figure_of_a_run(made):
    lines = log(made[1])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all({"gradient_norm", "acceptance", "accuracy", "tokens_per_second"} <= line.keys() for line in steps)
    assert all(len(line["accuracy"]) == 3 for line in steps)
    held = [line for line in lines if "held_out_nll" in line]
    assert [line["step"] for line in held] == [4, 8, 12]
    assert all(1 <= line["acceptance_length"] <= 4 and len(line["accepted"]) == 3 for line in held)
    assert held[-1]["held_out_nll"] < held[0]["held_out_nll"]


def test_the_report_is_one_page_with_plots_and_the_configuration(made):
    text = (made[1] / "report.html").read_text()
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert not re.search(r'(src|href)="(?!#)', text) and "held_out_count: 4" in text
    length = max(line.get("acceptance_length", 0) for line in log(made[1]))
    assert f"{length:.3f} tokens a round" in text


def test_a_finished_run_only_exports_again(made, tmp_path):
    folder, out = made
    before = log(out)
    model = (out / "model" / "model.safetensors").read_bytes()
    (out / "model" / "model.safetensors").unlink()
    assert main(read_config(DrafterRun, folder / "run.yaml"))
    assert (out / "model" / "model.safetensors").read_bytes() == model and log(out) == before


def test_the_target_has_the_dtype_that_is_asked_for(made, tmp_path, monkeypatch):
    """And so has the exported drafter, which works beside it."""
    folder, out = made
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "float32"
    shutil.copytree(out, tmp_path / "out")
    assert main(read_config(DrafterRun, folder / "run.yaml", [f"out={tmp_path / 'out'}", "dtype=bfloat16"]))
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    found = []
    monkeypatch.setattr(responses, "regenerate", lambda pair, *_: found.append(pair.target.embed.embedding.dtype))
    respond(read_config(DrafterRun, folder / "run.yaml", ["dtype=bfloat16"]))
    respond(read_config(DrafterRun, folder / "run.yaml"))
    assert found == [jnp.bfloat16, jnp.float32]


def test_chats_are_learned_from_as_they_are(made):
    """Replies that somebody else kept of the target: tokenised with its template."""
    folder, _ = made
    (folder / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}) + "\n"
    )
    pair = dflash_jax.load(folder / "target")
    example = Corpus(JsonLines([folder / "chats.jsonl"]), 64, pair.tokenizer, pair.target.config.eos_token_ids)[0]
    assert pair.tokenizer.core.decode(example["tokens"][example["mask"]].tolist()) == "hello"


@pytest.mark.slow
def test_over_a_mesh_the_losses_are_the_same(made):
    folder, out = made
    changes = [f"out={folder / 'mesh'}", "mesh={data: 2, fsdp: 2}", f"data.responses=[{out / 'responses'}]"]
    flags = f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"
    command = child(folder / "run.yaml", *changes)
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (_, one), (_, spread) = (zip(*losses(x), strict=True) for x in (out, folder / "mesh"))
    np.testing.assert_allclose(spread, one, rtol=1e-4)
    assert (folder / "mesh" / "model" / "model.safetensors").exists()


def together(config: Path, *changes: str) -> list[subprocess.Popen]:
    """Two processes with two devices each, joined by jax.distributed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
    command = child(config, *changes)
    join = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
    return [
        subprocess.Popen(
            command, env={**os.environ, **join, "JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_one_drafter_and_stop_together(made, tmp_path):
    """SIGTERM to one of them ends both at the same step; then they go on, to the losses of one process."""
    folder, out = made
    changes = [f"out={tmp_path}", f"data.responses=[{out / 'responses'}]", "mesh={data: 2, fsdp: 2}"]
    first = together(folder / "run.yaml", *changes)
    while first[0].poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.05)
    first[1].send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=300)[0] for process in first]
    assert [process.returncode for process in first] == [0, 0], texts
    assert "the same command goes on" in texts[0]
    second = together(folder / "run.yaml", *changes)
    texts = [process.communicate(timeout=300)[0] for process in second]
    assert [process.returncode for process in second] == [0, 0], texts
    assert (tmp_path / "model" / "model.safetensors").exists()
    (steps, one), (again, two) = (zip(*losses(x), strict=True) for x in (out, tmp_path))
    assert steps == again
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.slow
def test_a_process_that_is_stopped_and_killed_goes_on_to_identical_losses(made, tmp_path):
    """SIGTERM saves and exits 0; then SIGKILL."""
    folder, out = made
    command = child(folder / "run.yaml", f"out={tmp_path}", f"data.responses=[{out / 'responses'}]")
    for sign, after in ((signal.SIGTERM, 3), (signal.SIGKILL, 7)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and logged(tmp_path) < after:
            time.sleep(0.02)
        process.send_signal(sign)
        text, error = process.communicate(timeout=200)
        assert process.returncode == (0 if sign == signal.SIGTERM else -sign), error[-2000:]
        assert ("the same command goes on" in text) == (sign == signal.SIGTERM)
        assert list((tmp_path / "checkpoints").iterdir())
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path) == losses(out)
    one, two = (path / "model" / "model.safetensors" for path in (tmp_path, out))
    assert one.read_bytes() == two.read_bytes()


def logged(out: Path) -> int:
    """How many its log has by now."""
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


def test_responses_can_be_had_alone(made, tmp_path, capsys):
    folder, out = made
    command = ["train", "responses", str(folder / "run.yaml"), f"out={tmp_path}"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.endswith(f"done: {tmp_path / 'responses'}\n")
    assert sorted(path.read_text() for path in (tmp_path / "responses").glob("*.jsonl")) == sorted(
        path.read_text() for path in (out / "responses").glob("*.jsonl")
    )


def test_check_prints_the_whole_configuration_and_does_nothing(made, capsys):
    folder, _ = made
    assert cli.main(["train", "drafter", str(folder / "run.yaml"), "--check", "training.batch=6"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["training"]["batch"] == 6 and printed["training"]["optimizer"]["b1"] == 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.lop.steps=3"], "training.lop is not understood; did you mean training.loop? the keys of training"),
        (["mask_token=400"], "the drafter's mask token is 400"),
        (["target=nowhere"], "target nowhere is not a folder"),
        (["data.prompts=[]", "data.responses=[nowhere]"], "nowhere does not exist"),
        (["mesh.data=4"], f"there are {jax.device_count()}"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(made, tmp_path, capsys, changes, message):
    folder, out = made
    fixed = [f"out={tmp_path}", f"data.responses=[{out / 'responses'}]", "training.loop.steps=2"]
    status = cli.main(["train", "drafter", str(folder / "run.yaml"), *fixed, *changes])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and message in error and len(error) < 400
