"""The rules of the house, as tests: import order, what may be used where, sizes, and what leaves the shared object."""

import ast
import graphlib
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, CORE = ROOT / "kvpitfalls", ROOT / "csrc"
PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
C_FILES = sorted(path for pattern in ("*.c", "*.h", "*.cu", "*.cuh") for path in CORE.rglob(pattern))

# Lower layers first; a module may import its own layer and those before it.
PYTHON_LAYERS = [
    ["errors", "files", "letters", "numbers"],
    ["eviction.arrays"],
    ["eviction.layer_inputs"],
    ["eviction.reference"],
    ["_core", "_cuda", "eviction.ops", "eviction.forecast"],
    ["display.markup", "display.tabular", "display.progress", "display.columns"],
    ["prompts.spans", "prompts.chats", "prompts.pieces"],
    ["eviction.budget", "prompts.prompt", "eviction.fairness"],
    ["eviction.layout"],
    ["eviction.allocation"],
    ["policies"],
    ["eviction.needed"],
    ["eviction.selection"],
    ["display.plots", "display.heatmap", "display.verdicts"],
    ["hf"],
    ["audits"],
    ["experiments"],
    ["display.tables", "display.explore"],
    ["display.report_tables"],
    ["display.page"],
    ["harness"],
    ["cli.streams", "cli.values"],
    ["cli.sweeps", "cli.harnesses"],
    ["cli"],
    ["__main__"],
]
# What users may lean on.
PUBLIC = set(
    [
        "AdaKV",
        "Allocation",
        "Audit",
        "BudgetError",
        "ChunkKV",
        "CudaError",
        "DefensiveKV",
        "DeviceError",
        "ExpectedAttention",
        "Fair",
        "H2O",
        "Handle",
        "KNorm",
        "Kept",
        "KeptCache",
        "KVzip",
        "KeyDiff",
        "LagKV",
        "NotInterceptedError",
        "Policy",
        "Prompt",
        "PyramidKV",
        "RKV",
        "Report",
        "Rotary",
        "SnapKV",
        "Span",
        "StreamingLLM",
        "TOVA",
        "UnsupportedModelError",
        "__version__",
        "audit",
        "effects",
        "explore",
        "keep",
        "load_cache",
        "ops",
        "policies",
        "reference",
        "unwrap",
        "wrap",
    ]
)
C_LAYERS = [["core"], ["rows", "gpu"], ["score", "select", "evict"], ["backend"]]


def layer_of(name, layers):
    """Where a module, or the folder that it is in, stands; a package's __init__ where its first module does."""
    inside = [i for i, names in enumerate(layers) for entry in names if entry == name or name.startswith(entry + ".")]
    return (
        inside[0]
        if inside
        else next(i for i, names in enumerate(layers) if any(entry.startswith(name + ".") for entry in names))
    )


def for_types(tree):
    """The imports that only a type checker makes."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {node for block in blocks for node in ast.walk(block)}


def imports_of(path, eager_only=False):
    """The module of every import but those for types only; relative ones resolved."""
    here = ["kvpitfalls", *path.relative_to(PACKAGE).parts[:-1]]
    tree = ast.parse(path.read_text())
    skipped = for_types(tree)
    for node in (node for node in (tree.body if eager_only else ast.walk(tree)) if node not in skipped):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (
                [f"{module}.{alias.name}" for alias in node.names] if node.level and not node.module else [module]
            )


@pytest.mark.parametrize(
    "path",
    [p for p in PYTHON_FILES if p.name != "__init__.py" or p.parent != PACKAGE],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_python_imports_go_one_way(path):
    own = layer_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), PYTHON_LAYERS)
    for module in imports_of(path):
        if module.startswith("kvpitfalls.") and module != "kvpitfalls.__version__":
            assert layer_of(module.removeprefix("kvpitfalls."), PYTHON_LAYERS) <= own, (
                f"{path.name} imports {module}, which lies above it"
            )


# A method of a cache that leads to a module which is built on caches.
DOORS = {("kvpitfalls.hf.cache", f"kvpitfalls.hf.{name}") for name in ("save", "fixed", "held_fixed")}


def test_modules_have_an_order():
    """No circle of imports, those inside functions included."""
    names = {".".join(["kvpitfalls", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in PYTHON_FILES}
    needs = {
        name: {module for module in imports_of(path) if module in names and (name, module) not in DOORS}
        for name, path in names.items()
    }
    graphlib.TopologicalSorter(needs).prepare()  # a CycleError names the circle
    for name, module in DOORS:
        assert module in imports_of(names[name]), "a door that is none"


def test_each_module_has_a_name_of_its_own():
    stems = [path.stem for path in PYTHON_FILES if path.stem not in ("__init__", "__main__")]
    assert sorted(set(stems)) == sorted(stems)


def test_the_public_names_are_these():
    import kvpitfalls

    assert len(kvpitfalls.__all__) == len(set(kvpitfalls.__all__))
    assert set(kvpitfalls.__all__) == PUBLIC, "a public name was added or taken away: say so in CHANGELOG.md, and here"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_locks_are_taken_by_with(path):
    """An interrupt may strike after ``lock.acquire()``, before the next line: then nobody gives the lock back, and all
    hang."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Attribute) and call.attr == "acquire"]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_libraries_stay_where_they_belong(path):
    folder = path.relative_to(PACKAGE).parts[0]
    for module in imports_of(path):
        library = module.split(".")[0]
        if library == "transformers":
            assert folder in ("hf", "prompts", "harness") or (
                folder == "cli" and module not in list(imports_of(path, eager_only=True))
            )
        if library == "matplotlib":
            assert path.name == "plots.py"
        if library in ("lm_eval", "garak", "kvpress", "datasets"):  # other people's harnesses
            assert folder == "harness" or (path.name == "following.py" and library == "lm_eval")
        if library == "ray":
            assert path.name == "ray_engine.py" and module not in list(imports_of(path, eager_only=True))


def test_c_includes_go_one_way():
    for path in C_FILES:
        folder = path.relative_to(CORE).parts[0]
        text = path.read_text()
        for include in re.findall(r'#include\s+[<"]([^">]+)[">]', text):
            if include in ("Python.h",) or include.startswith("numpy/"):
                assert folder == "python", f"{path} includes {include}; only csrc/python may"
            assert ("intrin.h" not in include and "arm_neon" not in include) or folder == "rows", (
                f"{path} includes {include}; only csrc/rows may"
            )
            parts = [part for part in include.split("/") if part != ".."]
            if folder == "python":
                assert len(parts) == 1 or parts[0] == "numpy" or parts[-1] in ("kvp.h", "dtypes.def"), (
                    f"{path} includes {include}; csrc/python sees kvp.h and dtypes.def only"
                )
            elif len(parts) == 2 and any(parts[0] in names for names in C_LAYERS) and folder != "kvp.h":
                assert layer_of(parts[0], C_LAYERS) <= layer_of(folder, C_LAYERS), (
                    f"{path} includes {include}, which lies above it"
                )


def test_the_core_owns_nothing():
    banned = r"\b(printf|puts|exit|abort|malloc|calloc|realloc|free|getenv|system|fopen|assert)\s*\("
    for path in C_FILES:
        if path.relative_to(CORE).parts[0] not in ("python", "examples"):
            code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
            assert not re.findall(banned, code), f"{path} uses {re.findall(banned, code)}"


def test_every_scorer_has_an_implementation_and_a_reference():
    scorers = re.findall(r"^KVP_SCORER\((\w+)", (CORE / "scorers.def").read_text(), flags=re.M)
    reference = (PACKAGE / "eviction/reference.py").read_text()
    assert scorers
    for name in scorers:
        for ending in (".c", ".cu"):
            assert any((CORE / "score" / folder / f"{name}{ending}").exists() for folder in (".", name)), name + ending
        assert f'scorer == "{name}"' in reference


def test_sizes():
    for path in [
        *PYTHON_FILES,
        *C_FILES,
        *sorted((ROOT / "tests").rglob("*.[ch]")),
        *sorted((ROOT / "tests").rglob("*.py")),
    ]:
        assert len(path.read_text().splitlines()) <= 500, f"{path} is over 500 lines"
    for path in PYTHON_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                code = node.body[ast.get_docstring(node) is not None :] or node.body
                body = node.end_lineno - code[0].lineno + 1
                assert body <= 100, f"{path}: {node.name} has {body} lines"
    for path in C_FILES:
        for body in re.findall(r"^[^\s#/}][^;\n]*\)\s*\{\n(.*?)^\}", path.read_text(), flags=re.M | re.S):
            assert body.count("\n") <= 100, f"{path} has a function of {body.count(chr(10))} lines"


def test_lines_fit_120_columns():
    """In C and CUDA all of them; in Python but those in texts, which pyproject.toml names file by file."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert config["line-length"] == 120 and "E" in config["lint"]["select"] and "E501" not in config["lint"]["ignore"]
    for path in [*C_FILES, *sorted(CORE.glob("*.def")), *sorted((ROOT / "tests").rglob("*.[ch]"))]:
        wide = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
        assert not wide, f"{path} has lines over 120 columns: {wide}"


def test_names():
    for path in [*PYTHON_FILES, *C_FILES, *sorted((ROOT / "tests").rglob("*"))]:
        assert not re.fullmatch(r"(utils?|helpers?|common|misc)", path.stem), f"{path}: say what the file is about"


def test_import_is_light():
    heavy = {"torch", "transformers", "numpy", "matplotlib", "tqdm", "kvpitfalls._core"}
    code = f"import sys, kvpitfalls; print(sorted(set(sys.modules) & {heavy}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_every_public_name_resolves():
    import kvpitfalls

    for name in kvpitfalls.__all__:
        assert getattr(kvpitfalls, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvpitfalls.nothing  # noqa: B018
    assert callable(kvpitfalls.audit) and callable(kvpitfalls.keep) and callable(kvpitfalls.wrap), (
        "a module must not shadow a function"
    )


@pytest.mark.skipif(
    sysconfig.get_config_var("EXT_SUFFIX") is None or sys.platform != "linux", reason="reads an ELF symbol table"
)
def test_only_the_init_function_is_exported():
    import kvpitfalls._core as core

    out = subprocess.run(
        ["nm", "-D", "--defined-only", core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in out.splitlines()] == ["PyInit__core"]


def test_nothing_reads_outside_the_project():
    for path in [
        p
        for p in ROOT.rglob("*")
        if p.suffix in (".py", ".c", ".h", ".toml", ".md", ".txt", ".ipynb", "") and p.is_file()
    ]:
        relative = path.relative_to(ROOT)
        if relative.parts[0] in (
            ".git",
            ".venv",
            "build",
            ".hypothesis",
            ".pytest_cache",
            ".ruff_cache",
        ) or "egg-info" in str(relative):
            continue
        assert "../" + "shared" not in path.read_text(errors="ignore"), path
