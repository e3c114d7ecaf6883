"""The layout of the repository: folders, package contents, and allowed imports."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = "cpp"
"""The folder that C++ kernels share."""
KERNELS = sorted(
    path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name not in ("__pycache__", SHARED)
)
SOURCES = sorted(
    path
    for folder in ("explore", "kernels", "sweeps", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if (ROOT / "explore" / "kernels") not in path.parents
)


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """The output of `code` in a new interpreter in `cwd`, with `path` before the installed packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_explore_kernels_is_a_relative_link_to_the_kernels_folder() -> None:
    link = ROOT / "explore" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert link.resolve() == ROOT / "kernels"


def test_the_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "README.md").is_file()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.name)
def test_a_kernel_folder_has_its_derivation_and_its_bench(kernel: Path) -> None:
    assert {"__init__.py", "README.md", "bench.py"} <= {path.name for path in kernel.iterdir()}


def imports_outside_own_folder(kernel: Path) -> set[str]:
    """Modules of explore that a kernel imports, besides its own and the shared ones; relative imports are resolved."""
    own, shared = f"explore.kernels.{kernel.name}", f"explore.kernels.{SHARED}"
    found = set()
    for source in kernel.rglob("*.py"):
        package = [*own.split("."), *source.relative_to(kernel).parent.parts]
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                stem = ".".join([*base, *([node.module] if node.module else [])])
                found.update(f"{stem}.{alias.name}" for alias in node.names)
    others = {name for name in found if not f"{name}.".startswith((f"{own}.", f"{shared}."))}
    return {name for name in others if name.split(".")[0] == "explore"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.name)
def test_a_kernel_imports_only_its_own_and_the_shared_folder_of_explore(kernel: Path) -> None:
    assert imports_outside_own_folder(kernel) == set()


def test_the_import_check_of_kernels_sees_every_way_to_write_an_import(tmp_path: Path) -> None:
    kernel = tmp_path / "scan"
    (kernel / "inner").mkdir(parents=True)
    (kernel / "__init__.py").write_text("import torch\nimport explore.ops\nfrom . import bench\nfrom .. import gemm\n")
    (kernel / "bench.py").write_text(
        "def f():\n    from explore.config import Config\n    from explore.kernels.scan import inner\n"
    )
    (kernel / "inner" / "__init__.py").write_text(
        "from ... import other\nfrom .. import bench\nfrom ....ops import ssd\n"
    )
    assert imports_outside_own_folder(kernel) == {
        "explore.ops",
        "explore.kernels.gemm",
        "explore.config.Config",
        "explore.kernels.other",
        "explore.ops.ssd",
    }


@pytest.mark.parametrize("name", ["kernels", "sweeps", "tests", "notebooks"])
def test_no_folder_of_the_repository_is_a_top_level_package_once_installed(name: str, tmp_path: Path) -> None:
    found = f"import importlib.util as u; spec = u.find_spec({name!r})"
    code = f"{found}; print(list(spec.submodule_search_locations or []) if spec else [])"
    places = ast.literal_eval(run_python(code, cwd=tmp_path))
    assert not [place for place in places if Path(place).is_relative_to(ROOT)]


def test_the_command_is_the_main_of_the_cli() -> None:
    (command,) = importlib.metadata.distribution("hybrid-frontier").entry_points
    assert (command.group, command.name, command.value) == ("console_scripts", "explore", "explore.cli:main")


@pytest.mark.parametrize(
    "code",
    [
        "import explore",
        "import explore.config, explore.cost",
        "import sys\nfrom explore.cli import main\nsys.argv[1:] = ['--help']\ntry: main()\nexcept SystemExit: pass",
    ],
    ids=["explore", "config and cost", "explore --help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, tmp_path: Path) -> None:
    heavy = "{'torch', 'lightning', 'optuna', 'wandb', 'pandas', 'seaborn', 'matplotlib', 'datasets'}"
    printed = run_python(f"{code}\nimport sys; print(sorted({heavy} & set(sys.modules)))", cwd=tmp_path)
    assert printed.splitlines()[-1] == "[]"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_over_500_lines(source: Path) -> None:
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 500


def test_every_direct_dependency_is_pinned_to_the_installed_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = (*project["dependencies"], *extras["dev"], *extras["docs"])
    required = {line.split(">=")[0].partition("[")[0] for line in lines}
    named = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    assert required <= named.keys()
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in required}
    assert installed == {name: named[name] for name in required}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packaged files with one kernel. Builds leave folders behind, and stale ones would be packaged."""
    tree = tmp_path_factory.mktemp("tree") / "source"
    tree.mkdir()
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("explore", "kernels", "sweeps", "tests", "notebooks"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    kernel = tree / "kernels" / "layout_probe"
    kernel.mkdir()
    (kernel / "__init__.py").write_text("ANSWER = 42\n")
    (kernel / "bench.py").write_text("")
    (kernel / "README.md").write_text("# probe\n")
    return tree


def build(kind: str, tree: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    run_python(f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})", cwd=tree)
    (archive,) = out.iterdir()
    return archive


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("archives") / "sdist")


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, tree: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "checkout":
        return build("wheel", tree, folder / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return build("wheel", unpacked, folder / "wheel")


def packaged_files(tree: Path) -> set[str]:
    """The files of a bare checkout below explore/, following the link."""
    return {
        Path(folder, name).relative_to(tree).as_posix()
        for folder, _, names in os.walk(tree / "explore", followlinks=True)
        for name in names
        if not name.endswith(".pyc")
    }


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package_and_no_other_folder(wheel: Path, tree: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert shipped == packaged_files(tree)
    assert "explore/py.typed" in shipped
    assert "explore/kernels/layout_probe/__init__.py" in shipped
    assert any(name.startswith("explore/data/assets/") for name in shipped)
    (licence,) = (name for name in names if name.endswith("LICENSE"))
    assert ".dist-info/" in licence


@pytest.mark.slow
def test_a_source_archive_holds_the_package_and_no_tests(sdist: Path, tree: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    assert packaged_files(tree) <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"explore", "hybrid_frontier.egg-info"}


@pytest.mark.slow
def test_a_kernel_imports_from_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from explore.kernels import layout_probe as k; print(k.__file__, k.ANSWER)"
    place = tmp_path / "site" / "explore" / "kernels" / "layout_probe" / "__init__.py"
    assert run_python(code, cwd=tmp_path, path=tmp_path / "site") == f"{place} 42"


@pytest.mark.slow
def test_a_kernel_imports_from_a_bare_checkout(tree: Path) -> None:
    code = "from explore.kernels import layout_probe as k; print(k.__file__, k.ANSWER)"
    place = tree / "explore" / "kernels" / "layout_probe" / "__init__.py"
    assert run_python(code, cwd=tree, path=tree) == f"{place} 42"
