"""The house stands as drawn: links, one name for each module, the arrow of imports, sizes, homes, the wheel.

Each rule is a function ``root -> list of complaints``. It must find nothing here, and must find the fault
in a planted tree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

import pytest

from import_scan import first_circle, imports, module_name, python_files

ROOT = Path(__file__).resolve().parent.parent
EVERYWHERE = ("gr", "kernels", "launch", "tests", "benchmarks")

# A part imports only parts of an earlier row; parts of one row do not import each other.
ARROW = (
    ("errors", "kernels"),
    ("config", "files", "flops"),
    ("data",),
    ("embedding", "modules", "losses"),
    ("models",),
    ("distributed",),
    ("evaluation",),
    ("training",),
    ("inference", "report"),
    ("recipes",),
    ("train", "evaluate", "compare", "replay"),
    ("prepare",),
    ("launch",),
    ("scaling",),
)
ROW = {part: row for row, parts in enumerate(ARROW) for part in parts}

# Heavy packages and the only modules that may import them.
HOMES = {
    "torchrec": ("gr.distributed.*",),
    "fbgemm_gpu": ("gr.distributed.*",),
    "deepspeed": ("gr.distributed.*", "gr.launch.*"),
    "ray": ("gr.launch.*",),
    "triton": ("gr.kernels.*.triton_*",),
}
LINES, LINES_TRITON = 600, 900


def broken_links(root: Path) -> list[str]:
    wrong = []
    for name in ("kernels", "launch", "configs"):
        link = root / "gr" / name
        if not (link.is_symlink() and link.resolve() == (root / name).resolve() and link.is_dir()):
            wrong.append(f"gr/{name} is no link to ../{name}")
    return wrong


def regular_packages(root: Path) -> list[str]:
    """With an ``__init__.py`` the folder would hide another distribution's `kernels` or `launch`."""
    files = ("kernels/__init__.py", "launch/__init__.py")
    return [f"{name} must not exist" for name in files if (root / name).exists()]


def bare_imports(root: Path) -> list[str]:
    return [str(x) for x in imports(root, EVERYWHERE) if x.target.split(".")[0] in ("kernels", "launch")]


def part_of(module: str) -> str:
    """``gr.data.batch`` -> ``data``; the root package itself is ``""``."""
    return (module.split(".") + [""])[1]


def against_the_arrow(root: Path) -> list[str]:
    wrong = []
    for found in imports(root):
        if found.target.split(".")[0] in ("tests", "benchmarks"):
            wrong.append(f"{found}: nothing imports tests or benchmarks")
        if found.target.split(".")[0] != "gr":
            continue
        source, target = part_of(found.module), part_of(found.target)
        if target == "" or source == target:
            continue
        for part in (source, target):
            if part not in ROW:
                wrong.append(f"{found}: {part!r} has no place in the arrow")
        if source not in ROW or target not in ROW or ROW[target] >= ROW[source]:
            wrong.append(f"{found}: {source!r} does not lie to the right of {target!r}")
    return wrong


def circles(root: Path) -> list[str]:
    edges: dict[str, set[str]] = defaultdict(set)
    known = {module_name(root, path) for path in python_files(root)}
    for found in imports(root):
        if found.target in known and found.target != found.module:
            edges[found.module].add(found.target)
    circle = first_circle(dict(edges))
    return [" -> ".join(circle)] if circle else []


def long_files(root: Path) -> list[str]:
    wrong = []
    for path in python_files(root, EVERYWHERE):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = LINES_TRITON if path.name.startswith("triton_") else LINES
        if lines > limit:
            wrong.append(f"{path.relative_to(root)} has {lines} lines, more than {limit}")
    return wrong


def heavy_strays(root: Path) -> list[str]:
    wrong = []
    for found in imports(root):
        homes = HOMES.get(found.target.split(".")[0])
        if homes is not None and not any(fnmatch(found.module + ".", home + ".") for home in homes):
            wrong.append(f"{found}: its home is {' or '.join(homes)}")
    return wrong


RULES = [
    broken_links, regular_packages, bare_imports, against_the_arrow, circles, long_files, heavy_strays
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_keeps_the_rule(rule) -> None:
    assert rule(ROOT) == []


def tree(root: Path, files: dict[str, str]) -> Path:
    """A small checkout with links and the given files."""
    for name in ("kernels", "launch", "configs", "gr"):
        (root / name).mkdir()
    for name in ("kernels", "launch", "configs"):
        (root / "gr" / name).symlink_to(f"../{name}")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


FAULTS = [
    (regular_packages, {"kernels/__init__.py": ""}),
    (bare_imports, {"gr/a.py": "import kernels.scan\n"}),
    (bare_imports, {"tests/test_a.py": "def f():\n    from launch import cli\n"}),
    (against_the_arrow, {"gr/data/a.py": "from gr.models.b import C\n"}),
    (against_the_arrow, {"gr/data/a.py": "from ..models import b\n"}),
    (against_the_arrow, {"gr/data/__init__.py": "from ..models import b\n"}),
    (against_the_arrow, {"gr/data/a.py": "def f():\n    import gr.train\n"}),
    (against_the_arrow, {"gr/modules/a.py": "from gr import losses\n", "gr/losses.py": ""}),
    (against_the_arrow, {"gr/modules/a.py": "from gr import losses\n"}),
    (against_the_arrow, {"gr/errors.py": "from gr.kernels import scan\n"}),
    (against_the_arrow, {"kernels/scan/op.py": "from gr.errors import UserError\n"}),
    (against_the_arrow, {"gr/train.py": "from gr.launch import cli\n"}),
    (against_the_arrow, {"gr/train.py": "import importlib\nimportlib.import_module('gr.launch.cli')\n"}),
    (against_the_arrow, {"gr/attic.py": "from gr.errors import UserError\n"}),
    (against_the_arrow, {"gr/data/a.py": "from tests.helpers import x\n"}),
    (against_the_arrow, {"gr/data/a.py": "from typing import TYPE_CHECKING\n"
                         "if TYPE_CHECKING:\n    pass\nelse:\n    import gr.train\n"}),
    (circles, {"gr/data/a.py": "from gr.data import b\n", "gr/data/b.py": "from . import c\n",
               "gr/data/c.py": "def f():\n    import gr.data.a\n"}),
    (long_files, {"gr/long.py": "x = 1\n" * 601}),
    (long_files, {"kernels/op/triton_fwd.py": "x = 1\n" * 901}),
    (heavy_strays, {"gr/models/a.py": "def f():\n    import torchrec.sparse\n"}),
    (heavy_strays, {"gr/models/a.py": "import fbgemm_gpu\n"}),
    (heavy_strays, {"gr/training/a.py": "from deepspeed import zero\n"}),
    (heavy_strays, {"gr/data/a.py": "import ray\n"}),
    (heavy_strays, {"kernels/op/cpu.py": "import triton\n"}),
    (heavy_strays, {"gr/modules/triton_x.py": "import triton.language as tl\n"}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "files"), FAULTS)
def test_the_rule_finds_a_planted_fault(rule, files, tmp_path: Path) -> None:
    complaints = rule(tree(tmp_path, files))
    assert len(complaints) >= 1
    assert any(Path(name).stem in complaints[0] for name in files)


def test_links_that_became_text_files_are_found(tmp_path: Path) -> None:
    root = tree(tmp_path, {})
    assert broken_links(root) == []
    (root / "gr" / "kernels").unlink()
    (root / "gr" / "kernels").write_text("../kernels")
    assert broken_links(root) == ["gr/kernels is no link to ../kernels"]


def test_what_is_allowed_raises_no_complaint(tmp_path: Path) -> None:
    files = {
        "gr/__init__.py": '__version__ = "1"\n',
        "gr/errors.py": "import sys\n",
        "gr/data/__init__.py": "",
        "gr/data/batch.py": "from gr import __version__, errors\nfrom .other import x\n",
        "gr/data/other.py": "import typing\nif typing.TYPE_CHECKING:\n    from gr.train import cli\n",
        "gr/train.py": "from gr.data.batch import y\nimport rayon, tritonic\n",
        "gr/distributed/tables.py": "import torchrec\nimport deepspeed\n",
        "gr/launch/cli.py": "import ray\nfrom gr import train\n",
        "kernels/op/triton_fwd.py": "import triton\n" + "x = 1\n" * 800,
        "kernels/op/__init__.py": "from gr.kernels.op.triton_fwd import x\n",
    }
    root = tree(tmp_path, files)
    assert [complaint for rule in RULES for complaint in rule(root)] == []


def test_import_gr_imports_nothing_heavy() -> None:
    script = "import sys; import gr; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gr" in loaded
    assert not loaded & {"torch", "numpy", "pyarrow", "yaml", *HOMES}


def test_the_wheel_owns_gr_alone_holds_the_linked_folders_and_trains_outside_the_checkout(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("gr", "kernels", "launch", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    # One of each kind of data, in case the checkout has none yet at this depth.
    for name in ("configs/planted.yaml", "configs/deeper/planted.yaml", "gr/report/planted.html.j2"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("planted")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "-w", str(tmp_path), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(tmp_path.glob("hstu_gr-*.whl"))) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
        points = wheel.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gr"}
    modules = {str(path.relative_to(copy)) for path in python_files(copy)}
    assert {n if n.startswith("gr/") else f"gr/{n}" for n in modules} <= names
    data = [*copy.glob("configs/**/*.yaml"), *copy.glob("gr/report/**/*.html.j2"), copy / "gr/py.typed"]
    held = [str(path.relative_to(copy)) for path in data]
    assert {n if n.startswith("gr/") else f"gr/{n}" for n in held} <= names
    assert "Requires-Dist: torch<2.14,>=2.11" in metadata and "License-Expression: Apache-2.0" in metadata
    assert "gr-train = gr.train:cli" in points
    # Unpacked elsewhere, it trains: the copy under test is the wheel's, not the checkout's.
    place, outside = tmp_path / "site", tmp_path / "outside"
    with zipfile.ZipFile(next(tmp_path.glob("hstu_gr-*.whl"))) as wheel:
        wheel.extractall(place)
    outside.mkdir()
    shrunk = [
        "--data.num_users",
        "150",
        "--train.max_steps",
        "2",
        "--train.schedule.warmup_steps",
        "0",
        "--evaluation.baselines",
        "[popularity]",
    ]
    command = [sys.executable, "-c", "import gr.train, sys; print(gr.__file__); sys.exit(gr.train.cli())"]
    done = subprocess.run(
        [*command, "configs/quickstart.yaml", *shrunk],
        cwd=outside,
        env={**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(place))
    assert (outside / "runs" / "quickstart" / "report.html").stat().st_size > 10_000
