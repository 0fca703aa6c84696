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
REMOTE = {path.stem: path for path in ROOT.glob("*_gpt2_value.py")}
PACKAGES = ["gpt2_value", "hub_tools", "sampler_audit"]
# Imported where they are found: an extra declares them, or what is declared needs them itself.
OPTIONAL = {"accelerate", "peft", "matplotlib", "tensorboard", "numpy", "tqdm"}
OPTIONAL |= {"gradio", "fastapi", "starlette", "uvicorn"}
MODULES = {"PyYAML": "yaml"}  # of distributions with another name


def nodes(path, *kinds):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def outside(path):
    """The top-level modules that a file imports absolutely, wherever, without the standard library."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes(path, ast.ImportFrom) if not node.level}
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"__future__"}


def siblings_of(name):
    """The remote files that one of them imports."""
    return outside(REMOTE[name]) & set(REMOTE)


def test_layout_names_every_remote_file():
    assert sorted(layout.REMOTE_CODE) == sorted(path.name for path in REMOTE.values())


@pytest.mark.parametrize("name", REMOTE)
def test_remote_code_imports_only_torch_transformers_and_siblings(name):
    assert outside(REMOTE[name]) <= {"torch", "transformers", *REMOTE}
    assert not re.search(r"import_module|__import__", REMOTE[name].read_text())


@pytest.mark.parametrize("name", REMOTE)
def test_siblings_are_imported_in_the_one_way_that_transformers_follows(name):
    """`from .x import y` in a `try`, and `from x import y` where that raises ImportError: the same names both ways."""
    allowed = set()
    for node in nodes(REMOTE[name], ast.Try):
        relative, absolute = (
            {ast.unparse(line) for line in lines if isinstance(line, ast.ImportFrom)}
            for lines in (node.body, node.handlers[0].body)
        )
        if relative:
            assert {line.replace("from .", "from ") for line in relative} == absolute
            assert [ast.unparse(handler.type) for handler in node.handlers] == ["ImportError"]
            allowed |= relative | absolute
    found = [node for node in nodes(REMOTE[name], ast.ImportFrom) if node.level or node.module in REMOTE]
    assert {ast.unparse(node) for node in found} == allowed


def test_remote_code_has_no_circle_and_the_configuration_stands_at_its_bottom():
    graph = {name: siblings_of(name) for name in REMOTE}
    TopologicalSorter(graph).prepare()  # raises CycleError
    assert graph["configuration_gpt2_value"] == set()
    assert not any("modeling_gpt2_value" in siblings for siblings in graph.values())


@pytest.mark.parametrize("name", sorted({target.split(".")[0] for target in layout.AUTO_MAP.values()}))
def test_a_file_of_auto_map_itself_imports_every_sibling_that_it_needs(name):
    """From a local folder, transformers 4.57.6 to 5.0.0 copy these into their module cache, and not what those need."""
    for sibling in siblings_of(name):
        assert siblings_of(sibling) <= siblings_of(name)


def asked_for(section, option):
    """The distributions that setup.cfg asks for, and the oldest version of each that it allows."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return dict(re.findall(r"^(\w+)>=([\d.]+)", setup[section][option], re.MULTILINE))


def test_the_oldest_versions_that_are_allowed_are_those_that_the_suite_runs_on():
    tested = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    needed = asked_for("options", "install_requires")
    allowed = {**asked_for("options.extras_require", "test"), **needed}
    assert set(needed) <= set(tested)
    for name in set(tested) & set(allowed) - {"torch"}:  # the machines that run this have one torch
        assert tested[name] in (allowed[name], f"{allowed[name]}.0"), name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_library_that_is_imported_is_declared(package):
    declared = {MODULES.get(name, name) for name in asked_for("options", "install_requires")}
    for path in (ROOT / package).rglob("*.py"):
        assert outside(path) <= {*declared, *OPTIONAL, *PACKAGES, *REMOTE}, path


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
    file = Path(gpt2_value.__file__)
    (block,) = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If)]
    assert sorted(alias.name for node in block.body for alias in node.names) == sorted(gpt2_value.__all__)
    assert file.with_name("py.typed").exists()
