"""Programs are kept on disk by default, and the second start of a program takes all of them from there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dflash_jax import compilation_cache

ROOT = Path(__file__).parent.parent
CASE = ROOT / "tests" / "goldens" / "dflash_full"
PROGRAM = f"""
import jax
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
import dflash_jax
pair = dflash_jax.load({str(CASE / "target")!r})
dflash_jax.generate(pair, [[1, 2, 3]], max_new_tokens=4)
print(jax.config.jax_compilation_cache_dir, events.count("cache_hits"), events.count("cache_misses"))
"""


def run(**environment):
    """Folder, hits and misses of a program that loads a target and generates; nothing else may be printed."""
    settings = ("XDG_CACHE_HOME", "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    folder, hits, misses = done.stdout.split()
    return Path(folder), int(hits), int(misses)


def test_the_second_start_compiles_nothing(tmp_path):
    folder, hits, misses = run(HOME=str(tmp_path))
    assert folder == tmp_path / ".cache" / "dflash-jax"
    assert misses >= 2 and len(list(folder.glob("*-cache"))) == misses
    assert run(HOME=str(tmp_path)) == (folder, hits + misses, 0)


@pytest.fixture
def unset(monkeypatch):
    """jax's configuration as it is when nobody has set it; put back afterwards."""
    names = ["cache_dir", "min_compile_time_secs", "min_entry_size_bytes"]
    names = ["jax_compilation_cache_dir", *(f"jax_persistent_cache_{name}" for name in names[1:])]
    before = {name: getattr(jax.config, name) for name in [*names, "jax_enable_compilation_cache"]}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_xdg_cache_home_decides(unset, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "dflash-jax")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


def test_what_is_configured_stays(unset, monkeypatch, tmp_path):
    """JAX_COMPILATION_CACHE_DIR is the default value of the same setting."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_no_place_for_a_cache_is_no_error(unset, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation_cache.enable()
    assert jax.config.jax_compilation_cache_dir is None
