"""The rooms import one way, one file knows the engine, and nothing falls back in silence."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAMPLES

ROOT = Path(__file__).parent.parent
ROOMS = ["weights", "encoder", "decoder_bridge", "validation"]  # each may import those before it
FILES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path):
    room = path.relative_to(ROOT).parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    if path.relative_to(ROOT) == Path("encoder/run.py"):
        allowed = [*allowed, "decoder_bridge"]  # the one exception: the entry point
    used = {name.split(".")[0] for name in imports(path)} & set(ROOMS)
    assert used <= set(allowed)


def test_one_file_knows_the_engine():
    users = {
        str(p.relative_to(ROOT))
        for p in FILES
        if any(name.split(".")[:2] == ["max", "engine"] for name in imports(p))
    }
    assert users == {"encoder/engine.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_broad_except(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), node.lineno


def test_without_max_the_command_fails(tmp_path: Path):
    """No fallback exists: where `max` cannot be imported, no text is printed."""
    broken = tmp_path / "max"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('unplugged')\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from encoder.run import main; raise SystemExit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--model", "demo", str(SAMPLES / "demo.flac")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode != 0
    assert result.stdout == ""
    assert "unplugged" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("1", "1")])
def test_telemetry_is_off_unless_the_user_set_it(given: str | None, expected: str):
    import os

    environment = {k: v for k, v in os.environ.items() if k != "MODULAR_TELEMETRY_ENABLED"}
    if given is not None:
        environment["MODULAR_TELEMETRY_ENABLED"] = given
    program = "import encoder, os; print(os.environ['MODULAR_TELEMETRY_ENABLED'])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.stdout.strip() == expected
