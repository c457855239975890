"""Run mypy --strict over the package as it is imported.

The folders beside `sessiond/` are mapped into it by setuptools, which mypy does not read. So a tree of links
is made that looks as the installed package does, and the paths in mypy's report are turned back.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / ".cache" / "types"


def make_tree(mapping: dict[str, str]) -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "sessiond"
    package.mkdir(parents=True)
    for entry in (ROOT / mapping["sessiond"]).iterdir():
        (package / entry.name).symlink_to(entry)
    for name, folder in mapping.items():
        if name.count(".") == 1:  # deeper ones lie inside
            (package / name.partition(".")[2]).symlink_to(ROOT / folder)


def turn_back(line: str, mapping: dict[str, str]) -> str:
    for name, folder in mapping.items():
        if name != "sessiond":
            line = line.replace(f"{name.replace('.', '/')}/", f"{folder}/")
    return line


def main() -> int:
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    make_tree(mapping)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), "-p", "sessiond", *sys.argv[1:]]
    environment = {**os.environ, "MYPYPATH": str(TREE)}
    result = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)
    for line in (result.stdout + result.stderr).splitlines():
        sys.stdout.write(turn_back(line, mapping) + "\n")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
