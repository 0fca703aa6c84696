"""What import-linter (`.importlinter`) cannot say: the imports of the remote code, which are modules and no package."""

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import gpt2_value
from hub_tools import layout

ROOT = Path(__file__).parent.parent
REMOTE = sorted(ROOT.glob("*_gpt2_value.py"))
PACKAGES = [
    path for name in ("gpt2_value", "hub_tools", "sampler_audit") for path in sorted((ROOT / name).rglob("*.py"))
]
# Imported where they are found: an extra declares them, or what is declared needs them itself.
NOT_DECLARED = {
    "matplotlib",
    "gradio",
    "fastapi",
    "starlette",
    "uvicorn",
    "peft",
    "accelerate",
    "tensorboard",
    "numpy",
    "tqdm",
}
# Names at first use; a user's reward function; the reviewed code of a package.
BY_NAME = [
    ROOT / name
    for name in ("gpt2_value/__init__.py", "hub_tools/__init__.py", "gpt2_value/inputs.py", "hub_tools/package/load.py")
]
MODULES = {"PyYAML": "yaml"}  # of distributions with another name


def imports(path):
    """Every import in a file, wherever it stands: (dots, module, names, inside a `try`)."""
    found = []

    def visit(node, in_try):
        if isinstance(node, ast.Import):
            found.extend((0, alias.name, (), in_try) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names), in_try))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            assert path in BY_NAME, f"{path.name} imports by a computed name, which this test cannot read"
        for child in ast.iter_child_nodes(node):
            visit(child, in_try or isinstance(node, ast.Try))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def outside(path):
    """The top-level modules that a file imports absolutely, without the standard library."""
    tops = {module.split(".")[0] for dots, module, _, _ in imports(path) if dots == 0}
    return tops - set(sys.stdlib_module_names) - {"__future__"}


def siblings_of(path):
    """The remote files that one of them imports."""
    return {module for dots, module, _, _ in imports(path) if (ROOT / f"{module}.py") in REMOTE}


def test_layout_names_every_remote_file():
    assert sorted(layout.REMOTE_CODE) == [path.name for path in REMOTE]


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.stem)
def test_remote_code_imports_only_torch_transformers_and_siblings(path):
    assert outside(path) - siblings_of(path) <= {"torch", "transformers"}


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.stem)
def test_siblings_are_imported_in_the_one_way_that_transformers_follows(path):
    """`from .x import y` in a `try`, and `from x import y` in the handler: the same names both ways."""
    relative = {(module, names) for dots, module, names, _ in imports(path) if dots == 1}
    absolute = {
        (module, names) for dots, module, names, _ in imports(path) if dots == 0 and module in siblings_of(path)
    }
    assert relative == absolute
    assert all(dots in (0, 1) for dots, *_ in imports(path))
    assert all(in_try for dots, module, _, in_try in imports(path) if dots == 1 or module in siblings_of(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Try) and any(isinstance(child, ast.ImportFrom) and child.level for child in node.body):
            assert [handler.type.id for handler in node.handlers] == ["ImportError"]


def test_remote_code_has_no_circle_and_the_configuration_stands_at_its_bottom():
    graph = {path.stem: siblings_of(path) for path in REMOTE}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert graph["configuration_gpt2_value"] == set()
    assert not any("modeling_gpt2_value" in siblings for siblings in graph.values())


@pytest.mark.parametrize("name", sorted({target.split(".")[0] for target in layout.AUTO_MAP.values()}))
def test_a_file_of_auto_map_itself_imports_every_sibling_that_it_needs(name):
    """From a local folder, transformers 4.57.6 to 5.0.0 copy these into their module cache, and not what those need."""
    needed, todo = set(), [name]
    while todo:
        new = siblings_of(ROOT / f"{todo.pop()}.py") - needed
        needed |= new
        todo.extend(new)
    assert siblings_of(ROOT / f"{name}.py") == needed


def asked_for(section, option):
    """The distributions that setup.cfg asks for, and the oldest version of each that it allows."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return dict(re.findall(r"^(\w+)>=([\d.]+)", setup[section][option], re.MULTILINE))


def test_the_oldest_versions_that_are_allowed_are_those_that_the_suite_runs_on():
    constraints = (ROOT / "constraints-oldest.txt").read_text()
    tested = dict(re.findall(r"^(\w+)==([\d.]+)$", constraints, re.MULTILINE))
    allowed = asked_for("options", "install_requires")
    extras = {name: version for name, version in asked_for("options.extras_require", "test").items() if name in tested}
    for name, version in {**allowed, **extras}.items():
        assert name in tested, f"{name} is in setup.cfg and not in constraints-oldest.txt"
        if name != "torch":  # the machines that run this have one torch
            assert tested[name] in (version, f"{version}.0"), name


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_library_that_is_imported_is_declared(path):
    declared = {MODULES.get(name, name) for name in asked_for("options", "install_requires")}
    own = {"gpt2_value", "hub_tools", "sampler_audit", *(module.stem for module in REMOTE)}
    assert outside(path) <= declared | own | NOT_DECLARED


@pytest.mark.own_interpreter
def test_every_public_name_is_imported_when_it_is_first_used():
    code = (
        "import sys, time; started = time.perf_counter(); import gpt2_value; took = time.perf_counter() - started;"
        "assert not {'torch', 'transformers', 'hub_tools.cli'} & set(sys.modules); assert took < 0.3, took;"
        "assert set(dir(gpt2_value)) == set(gpt2_value.__all__);"
        "assert all(getattr(gpt2_value, name) is not None for name in gpt2_value.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'rolout'"):
        gpt2_value.rolout  # noqa: B018


def test_the_public_names_are_those_that_a_type_checker_sees():
    (block,) = [node for node in ast.parse(Path(gpt2_value.__file__).read_text()).body if isinstance(node, ast.If)]
    assert sorted(alias.name for node in block.body for alias in node.names) == sorted(gpt2_value.__all__)
    assert Path(gpt2_value.__file__).with_name("py.typed").exists()


def test_the_reader_of_imports_sees_them_all(tmp_path):
    (tmp_path / "x.py").write_text(
        "import a.b, c\nfrom .d import e\ntry:\n    from f import g\nexcept ImportError:\n    import h\n"
        "def i():\n    from . import j\n"
    )
    assert imports(tmp_path / "x.py") == [
        (0, "a.b", (), False),
        (0, "c", (), False),
        (1, "d", ("e",), False),
        (0, "f", ("g",), True),
        (0, "h", (), True),
        (1, "", ("j",), False),
    ]
