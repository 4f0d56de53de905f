"""What is in the package as it is built, and the README's first example without the checkout."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"```\w*\n.*?```", flags=re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source distribution and the wheel."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_source_distribution_holds_all_that_the_tests_need(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("constrained_growth", "tests", "theory")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*") if file.is_file()]
    files += [*ROOT.glob("*.*")]
    generated = ("__pycache__", ".ipynb_checkpoints", "constrained-growth-demo")
    needed = {str(file.relative_to(ROOT)) for file in files if file.is_file()}
    needed = {name for name in needed if not any(part in name for part in generated)}
    assert {"README.md", "pyproject.toml", "theory/README.md", "tests/test_package.py"} <= needed
    assert needed - held <= {".gitignore", ".git"}


def test_the_text_for_a_package_index_has_no_dead_links(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        text = archive.read(name).decode()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(CODE, text) == re.findall(CODE, readme)
    links = re.findall(r"\]\(([^)]*)\)", re.sub(CODE, "", text))
    assert links
    assert all(link.startswith("https://") for link in links)
    assert re.search(r"\]\((?!https)", re.sub(CODE, "", readme))  # there was something to remove


def test_the_first_example_runs_with_the_wheel_alone(built, tmp_path):
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", "--target"]
    wheel, target = str(next(built.glob("*.whl"))), tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, *install, str(target), wheel], check=True, capture_output=True)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[0]
    assert "cg.solve(" in example
    program = (
        f"{example}\n"
        "import sys\n"
        "loaded = [m for name, m in sys.modules.items() if name.startswith('constrained_growth')]\n"
        f"assert all(str(m.__file__).startswith({str(target)!r}) for m in loaded) and loaded\n"
        "print(solution.decision.chosen, len(record.insertions))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(target)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], **options)
    assert ran.returncode == 0, ran.stderr
    assert re.fullmatch(r"\('[13]',\) 1\n", ran.stdout)
    shown = subprocess.run([target / "bin" / "constrained-growth", "--version"], **options)
    (here,) = importlib.metadata.distributions(name="constrained-growth", path=[str(target)])
    assert shown.stdout.strip() == here.version, shown.stderr
    assert f"version: {here.version}" in (ROOT / "CITATION.cff").read_text()
