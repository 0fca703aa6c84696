"""All imports point one way: who may import whom is written here, and read from the source."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from hub_tools import layout

ROOT = Path(__file__).parent.parent
REMOTE = sorted(ROOT.glob("*_gpt2_value.py"))
ROOMS = sorted((ROOT / "hub_tools").glob("*.py"))

# hub_tools from the bottom up: a room may import only from rooms above it in this list.
ORDER = [
    "errors",
    "layout",
    "releases",
    "reading",
    "fields",
    "record",
    "probe",
    "patience",
    "download",
    "inspection",
    "card",
    "locked_folders",
    "staging",
    "save",
    "verify",
    "load",
    "state_files",
    "foreign",
    "adapters",
    "convert",
    "export",
    "hub",
    "contents",
    "push",
    "snapshot",
    "checkpoint_worker",
    "checkpoint_process",
    "checkpoint_pusher",
    "trainer_callback",
    "console",
    "cli_loading",
    "cli_audit",
    "cli",
    "__init__",
    "__main__",
]
# What the order alone would allow, and the design does not: `save -> card -> layout`, and `verify -> inspection ->
# layout`, are two roads that meet only in the command line and in push.
APART = {
    "card": {"inspection", "record", "probe"},
    "staging": {"inspection", "card"},
    "save": {"inspection"},
    "verify": {"save", "card", "staging", "probe"},
}
# What a room may import from outside the project, at any place in its source; None: anything that is installed.
OUTSIDE = {
    "errors": set(),
    "layout": set(),
    "reading": set(),
    "record": set(),
    "releases": set(),
    "fields": set(),
    "inspection": set(),
    "verify": set(),
    "probe": {"torch", "transformers"},
    "locked_folders": {"filelock"},
    "staging": set(),
    "download": {"huggingface_hub"},
    "load": {
        "torch",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "configuration_gpt2_value",
        "modeling_gpt2_value",
    },
    "card": {"huggingface_hub"},
    "snapshot": {"torch"},
    "checkpoint_worker": {"huggingface_hub", "yaml", "configuration_gpt2_value", "modeling_gpt2_value"},
    "checkpoint_process": set(),
    "checkpoint_pusher": {"huggingface_hub", "torch"},
    "trainer_callback": {"transformers"},
    "console": {"rich", "sampler_audit"},  # the latter for its type only
    "cli_loading": {"typer", "transformers", "huggingface_hub", "safetensors", "modeling_gpt2_value"},
    "cli_audit": {"typer", "torch", "generation_gpt2_value", "sampler_audit"},
    "cli": {"typer", "torch", "transformers"},
}


def imports(path):
    """Every import in a file, wherever it stands: (dots, module, names, inside a `try`)."""
    found = []

    def visit(node, in_try):
        if isinstance(node, ast.Import):
            found.extend((0, alias.name, (), in_try) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names), in_try))
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            assert path.stem == "__init__", f"{path.name} imports by a computed name, which this test cannot read"
        for child in ast.iter_child_nodes(node):
            visit(child, in_try or isinstance(node, ast.Try))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def outside(path):
    """The top-level modules that a file imports absolutely, without the standard library."""
    tops = {module.split(".")[0] for dots, module, _, _ in imports(path) if dots == 0}
    return tops - set(sys.stdlib_module_names) - {"__future__"}


def rooms_that(path):
    """The rooms of hub_tools that one of them imports."""
    found = set()
    for dots, module, names, _ in imports(path):
        if dots == 1:
            found |= {module} if module else set(names)
        elif module.split(".")[0] == "hub_tools":
            found |= {module.split(".")[1]} if "." in module else set(names)
    return {name for name in found if (ROOT / "hub_tools" / f"{name}.py").exists()}


def siblings_of(path):
    """The remote files that one of them imports."""
    return {module for dots, module, _, _ in imports(path) if (ROOT / f"{module}.py") in REMOTE}


def test_layout_names_every_remote_file():
    assert sorted(layout.REMOTE_CODE) == [path.name for path in REMOTE]


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.stem)
def test_remote_code_imports_only_torch_transformers_and_siblings(path):
    assert outside(path) - siblings_of(path) <= {"torch", "transformers"}


@pytest.mark.parametrize("path", REMOTE, ids=lambda path: path.stem)
def test_siblings_are_imported_by_the_one_road_that_transformers_follows(path):
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


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.stem)
def test_a_room_imports_only_from_below(path):
    assert path.stem in ORDER, f"give {path.name} a place in ORDER"
    below = set(ORDER[: ORDER.index(path.stem)])
    assert rooms_that(path) <= below - APART.get(path.stem, set())


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_a_room_imports_only_what_its_first_lines_say(name):
    assert outside(ROOT / "hub_tools" / f"{name}.py") <= OUTSIDE[name]


@pytest.mark.parametrize("path", [*REMOTE, *sorted(ROOT.glob("sampler_*.py"))], ids=lambda path: path.stem)
def test_nothing_below_imports_hub_tools(path):
    assert "hub_tools" not in outside(path)
    if path in REMOTE:
        assert not {"sampler_audit", "sampler_claim"} & outside(path)


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
