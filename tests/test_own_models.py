"""Networks of the user's own: from files and modules as people have them, and what goes wrong there in one sentence."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fairline.errors import FairlineError
from fairline.models import build, files
from fairline.runs import ModelSpec, NetworkInfo, load_info, load_network, save_network

GOOD = """
from torch import nn

def net(num_classes, in_channels):
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), *pooled)
"""

#: What stands in own.py, and what is said of own.py:net.
BAD = {
    "syntax": ("def net(:\n", r"own.py:net' cannot be imported: SyntaxError: invalid syntax \(own.py, line 1\)"),
    "indentation": ("def net():\nreturn 1\n", r"IndentationError: .* \(own.py, line 2\)"),
    "missing package": ("\nimport no_such_package\n", r"No module named 'no_such_package' \(own.py, line 2\)"),
    "missing name": ("from torch import no_such\n", r"cannot import name 'no_such' .*\(own.py, line 1\)"),
    "raises": ("x = 1\nx = y\n", r"NameError: name 'y' is not defined \(own.py, line 2\)"),
    "a script": ("import sys\nsys.exit('usage')\n", r"SystemExit: usage \(own.py, line 2\)"),
    "another file's syntax": ("import broken_beside\n", r"SyntaxError: .* \(broken_beside.py, line 1\)"),
    "null bytes": ("x = 1\0\n", "cannot be imported: "),
    "nothing": ("", "own.py has no function 'net'"),
    "no function": ("net = 3\n", "own.py has no function 'net'"),
    "function raises": ("def net(num_classes):\n    return 1 / 0\n", r"ZeroDivisionError: .* \(own.py, line 2\)"),
    "function stops": ("def net(num_classes):\n    raise SystemExit\n", r"built: SystemExit \(own.py, line 2\)"),
    "fails inside torch": (
        "from torch import nn\ndef net(num_classes):\n    return nn.Linear('a', num_classes)\n",
        r"cannot be built: TypeError: .* \(own.py, line 3\)",
    ),
    "needs more": ("def net(num_classes, depth):\n    pass\n", "missing 1 required positional argument: 'depth'"),
    "returns nothing": ("def net(num_classes):\n    pass\n", "returned a NoneType, not an nn.Module"),
    "returns a class": ("from torch import nn\ndef net():\n    return nn.ReLU\n", "returned a type, not an nn.Module"),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes own.py, beside a file that cannot be imported; what it brings into Python is forgotten again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "broken_beside.py").write_text("def f(:\n")

    def write(text: str, name: str = "own.py") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield write
    for name in set(sys.modules) - before:
        if name in ("own", "beside", "broken_beside"):
            del sys.modules[name]


@pytest.mark.parametrize("case", BAD)
def test_what_goes_wrong_is_one_sentence(write, case):
    text, said = BAD[case]
    file = write(text)
    with pytest.raises(FairlineError, match=said) as error:
        build(f"{file}:net", 3)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own.py:", "is not module:function or file.py:function"),
        (":net", "is not module:function or file.py:function"),
        ("nowhere.py:net", "nowhere.py does not exist"),
        ("nowhere:net", "No module named 'nowhere'"),
        ("..relative:net", "cannot be imported"),
        ("own.py", "no model 'own.py'"),
        ("math:sqrt", "'math:sqrt' cannot be built"),
        ("builtins:dict", "'builtins:dict' cannot be built"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_names_that_lead_nowhere(name, said):
    with pytest.raises(FairlineError, match=said):
        build(name, 3)


def test_a_folder_or_a_file_that_is_no_text(tmp_path):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(FairlineError, match="IsADirectoryError"):
        build(f"{tmp_path}/folder.py:net", 3)
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FairlineError, match="cannot be imported"):
        build(f"{tmp_path}/bytes.py:net", 3)


def test_an_option_of_the_wrong_kind_for_a_network_of_this_package():
    with pytest.raises(FairlineError, match="Model 'cnn' cannot be built"):
        build("cnn", 3, width="wide")


def test_a_file_that_failed_can_be_mended(write):
    with pytest.raises(FairlineError):
        build(f"{write('x = y')}:net", 3)
    network = build(f"{write(GOOD)}:net", 3, 1)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_a_file_may_import_what_lies_beside_it(write):
    write(GOOD, "beside.py")
    file = write("from beside import net as inner\ndef net(num_classes):\n    return inner(num_classes, 1)\n")
    assert isinstance(build(f"{file}:net", 3), nn.Module)


def test_files_of_one_name_beside_two_models_do_not_meet(write, tmp_path):
    before = dict(sys.modules), list(sys.path)
    made = []
    for channels in (3, 5):
        folder = tmp_path / str(channels)
        folder.mkdir()
        (folder / "blocks.py").write_text(f"CHANNELS = {channels}\n")
        (folder / "own.py").write_text(
            "from torch import nn\nimport blocks\n"
            "def net(num_classes):\n    from parts.deep import add\n"
            "    return nn.Conv2d(1, add(blocks.CHANNELS), 1)\n"
        )
        (folder / "parts").mkdir()
        (folder / "parts" / "deep.py").write_text("from blocks import CHANNELS\ndef add(n):\n    return n + CHANNELS\n")
        made.append(build(f"{folder}/own.py:net", 3).out_channels)
    assert made == [6, 10]
    assert sys.path == before[1]
    assert not {"own", "blocks", "parts", "parts.deep"} & (set(sys.modules) - set(before[0]))


def test_a_neighbour_hides_a_module_from_elsewhere_only_while_the_file_is_imported(write, tmp_path, monkeypatch):
    elsewhere = ModuleType("blocks")
    elsewhere.__file__ = "/elsewhere/blocks.py"
    monkeypatch.setitem(sys.modules, "blocks", elsewhere)
    write("CHANNELS = 7\n", "blocks.py")
    # The standard library's names stay its own.
    write("raise ValueError\n", "json.py")
    file = write("import blocks, json\nfrom torch import nn\ndef net():\n    return nn.Conv2d(1, blocks.CHANNELS, 1)\n")
    assert build(f"{file}:net", 3).out_channels == 7
    assert sys.modules["blocks"] is elsewhere


def test_a_changed_neighbour_is_read_anew(write):
    file = write("from beside import net\n")
    for channels in (4, 5):
        write(GOOD.replace("4", str(channels)), "beside.py")
        assert build(f"{file}:net", 3, 1)[0].out_channels == channels


def test_what_decides_is_the_file_and_what_it_imports_from_beside_it(write, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from .first import x\n")
    (tmp_path / "parts" / "first.py").write_text("from ..unrelated import x\nfrom . import second\n")
    write("def late():\n    import broken_beside\n", "parts/second.py")
    write("x = 1\n", "unrelated.py")
    write("x = 1\n", "never.py")
    file = write("import torch, parts\nfrom torch import nn\ndef net(): ...\n")
    name = f"{file}:net"
    found = files(name)
    inside = ["parts/__init__.py", "parts/first.py", "parts/second.py"]
    assert set(found) == {"own.py", "broken_beside.py", "unrelated.py", *inside}
    write("x = 2\n", "never.py")
    assert files(name) == found
    for changed in found:
        text = (tmp_path / changed).read_text()
        write(f"{text}# more\n", changed)
        assert {each for each, digest in files(name).items() if digest != found[each]} == {changed}
        write(text, changed)
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=lambda folder, names: ["moved"])
    assert files(f"{tmp_path}/moved/own.py:net") == found


def test_models_of_packages_have_no_files():
    assert files("cnn") == files("torch.nn:Linear") == files("math:sqrt") == {}


def test_a_module_is_known_by_its_files_as_well():
    assert set(files("tests.architectures:any_name")) >= {"tests/architectures.py", "tests/__init__.py"}


def test_a_network_of_a_changed_file_is_refused(write, tmp_path):
    write(GOOD, "beside.py")
    name = f"{write('from beside import net')}:net"
    spec = ModelSpec(name, 3, 1, 8, {}, files(name))
    save_network(tmp_path / "run", spec.build(), NetworkInfo(spec, "base", 1, 1, 1))
    assert load_info(tmp_path / "run").model == spec
    load_network(tmp_path / "run")
    write(GOOD.replace("Flatten()", "Flatten(1)"), "beside.py")
    with pytest.raises(FairlineError, match=r"beside\.py is not what it was"):
        load_network(tmp_path / "run")
    (tmp_path / "beside.py").unlink()
    with pytest.raises(FairlineError, match=r"beside\.py is not what it was"):
        load_network(tmp_path / "run")
