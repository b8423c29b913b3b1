"""Checks the wheel and the sdist in a folder: what is in them, what they declare, that they import.

Usage: python .ci/check_wheel.py dist
"""

from collections.abc import Iterable
from email.message import Message
from email.parser import Parser
import os
from pathlib import Path
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = {"chex", "jax", "optax"}
EXTRAS = {"dev", "docs", "experiments", "notebooks", "peers", "test", "tpu-aot"}
DIST_INFO = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
SDIST_FOLDERS = {"docs", "notebooks", "optax_mtl", "tests"}
SDIST_FILES = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}


def expect(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Exits with a message unless `found` and `wanted` hold the same names."""
    found, wanted = set(found), set(wanted)
    if found != wanted:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        sys.exit(f"{what}: missing {missing or 'nothing'}, not wanted {extra or 'nothing'}")


def sources(*folders: str) -> set[str]:
    """The files that git knows, so that what lies about in the tree is in no archive; all files, if it is no clone."""
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return set(listed.stdout.split("\0")) - {""}
    files = {p.relative_to(ROOT).as_posix() for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()}
    return {name for name in files if not re.search(r"__pycache__|\.py[cod]$|_cache/|^docs/(_build|notebooks)/", name)}


def check_metadata(metadata: Message) -> None:
    """Run-time dependencies and extras are the ones meant, and no others."""
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    runtime = [r.name for r in requirements if r.marker is None]
    expect("run-time dependencies", runtime, DEPENDENCIES)
    expect("extras", metadata.get_all("Provides-Extra", []), EXTRAS)
    expect("license", metadata.get_all("License-Expression", []), {"Apache-2.0"})
    expect("requires-python", metadata.get_all("Requires-Python", []), {">=3.11"})


def check_wheel(wheel: Path) -> None:
    """The wheel holds the package's modules, `py.typed` and metadata; it imports by itself."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        check_metadata(Parser().parsestr(archive.read(f"{info}/METADATA").decode()))
    expect(wheel.name, names, sources("optax_mtl") | {f"{info}/{name}" for name in DIST_INFO})
    if strange := [
        name for name in names if name.startswith("optax_mtl/") and not re.search(r"\.py$|/py\.typed$", name)
    ]:
        sys.exit(f"{wheel.name}: not wanted {strange}")

    # From another folder and straight from the archive, so that the source tree cannot help.
    version = wheel.name.split("-")[1]
    code = f"import optax_mtl as m; assert m.__version__ == {version!r}; print(m.__file__)"
    with tempfile.TemporaryDirectory() as elsewhere:
        imported = subprocess.run(
            [sys.executable, "-c", code],
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": str(wheel), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
    if imported.returncode or wheel.name not in imported.stdout:
        sys.exit(f"{wheel.name} does not import:\n{imported.stdout}{imported.stderr}")


def check_sdist(sdist: Path) -> None:
    """The sdist holds the package, its tests, docs and notebooks, and the files that explain them."""
    with tarfile.open(sdist) as archive:
        names = [m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()]
    expect(sdist.name, names, sources(*SDIST_FOLDERS) | SDIST_FILES)


if __name__ == "__main__":
    dist = Path(sys.argv[1]).resolve()
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(f"{wheel.name} and {sdist.name} hold what they should.")
