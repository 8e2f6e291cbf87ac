"""Other processes import what this kernel has loaded: edited and reloaded modules, and those that were edited alone.

The other process is a bare Python here (`Elsewhere`); tests/cluster/test_dask_backend.py and test_ipyparallel_backend.py do it with workers.

Used by pytest.
"""

from __future__ import annotations

import ast
import importlib
import linecache
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading

import cloudpickle
import numpy as np
import pytest
import torch

from labkit import Classifier, sources
from labkit.errors import ClusterError, traceback_of

LISTEN = """
import pickle, sys
while True:
    try:
        fn, args = pickle.load(sys.stdin.buffer)
        answer = fn(*args)
    except EOFError:
        break
    except Exception as error:
        answer = error
    sys.stdout.buffer.write(pickle.dumps(answer))
    sys.stdout.flush()
"""


class Elsewhere:
    """A process that calls what it is sent, as a worker does."""

    def __init__(self, folder):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(folder)]), "PYTHONDONTWRITEBYTECODE": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", LISTEN], env=environment, **pipes)

    def __call__(self, fn, *args, packed=True):
        call = (sources.pack_call(fn, args), ()) if packed else (fn, args)
        self.process.stdin.write(cloudpickle.dumps(call))
        self.process.stdin.flush()
        answer = cloudpickle.load(self.process.stdout)
        if isinstance(answer, Exception):
            raise answer
        return answer.value() if isinstance(answer, sources.Returned) else answer


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module of the user's own and load it, or load it again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name, text, load=True):
        file = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        if load:
            module = sys.modules.get(name)
            return importlib.reload(module) if module else importlib.import_module(name)

    write.folder = tmp_path
    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def elsewhere(tmp_path):
    there = Elsewhere(tmp_path)
    yield there
    there.process.stdin.close()
    there.process.wait(10)
    there.process.stdout.close()


def test_what_is_reloaded_is_what_is_run(write, elsewhere):
    mine = write("mine_a", "RATE = 1\ndef answer(): return RATE, 'one'")
    assert elsewhere(mine.answer) == (1, "one")
    mine = write("mine_a", "RATE = 2\ndef answer(): return RATE, 'two'")
    assert elsewhere(mine.answer, packed=False) == (1, "one")  # as it was: stale
    assert elsewhere(mine.answer) == (2, "two")
    write("mine_a", "RATE = 3\ndef answer(): return RATE, 'three'", load=False)  # the kernel does not know
    assert elsewhere(mine.answer) == (2, "two") == mine.answer()
    os.remove(mine.__file__)  # nor does the other process need the file
    assert elsewhere(mine.answer) == (2, "two")


@pytest.mark.parametrize(
    "use",
    [
        "import layers_b",
        "from layers_b import Layer",
        "from package_b import deep",
        "from .package_b import deep as d",
        "inside = 'import layers_b'",
        "by_name = __import__('importlib').import_module('layers_b')",
    ],
)
def test_modules_that_it_imports_go_with_it(write, elsewhere, use):
    """A class keeps its identity: what is made by one module is an instance for another one."""
    inside = "import layers_b" if use.startswith("inside") else "pass"
    write("layers_b", "class Layer:\n    def size(self): return 1")
    if "package_b" in use:
        write("package_b.__init__", "", load=False)
        write("package_b.deep", "from layers_b import Layer")
    mine = write(
        "mine_b",
        f"{use.replace('.package_b', 'package_b')}\nimport sys\ndef answer():\n    {inside}\n    return sys.modules['layers_b'].Layer().size()",
    )
    assert elsewhere(mine.answer) == 1
    write("layers_b", "class Layer:\n    def size(self): return 2")
    if "package_b" in use:
        importlib.reload(sys.modules["package_b.deep"])
    mine = importlib.reload(mine)
    assert elsewhere(mine.answer) == 2


def test_super_and_instances_and_state(write, elsewhere):
    write("base_c", "class Base:\n    def __init__(self): self.base = 'new'\nCACHE = {}\n")
    text = """
        import functools
        from base_c import CACHE, Base
        class Mine(Base):
            def __init__(self):
                super().__init__()
                self.own = 1
        @functools.lru_cache
        def cached(): return 'first'
        def answer(thing):
            CACHE[len(CACHE)] = 1
            return isinstance(thing, Mine), isinstance(thing, Base), thing.base, cached(), len(CACHE)
    """
    mine = write("mine_c", text)
    assert elsewhere(mine.answer, mine.Mine()) == (True, True, "new", "first", 1)
    assert elsewhere(mine.answer, mine.Mine())[-1] == 2  # what is not changed is not loaded again
    mine = write("mine_c", text.replace("'first'", "'second'"))
    assert elsewhere(mine.answer, mine.Mine()) == (True, True, "new", "second", 1)


def test_functions_of_a_cell_bring_their_modules(write, elsewhere):
    layers = write("layers_d", "SIZE = 1")
    cell = {"__name__": "__main__", "layers_d": layers}
    exec("def answer():\n    return layers_d.SIZE\ndef later():\n    from layers_d import SIZE\n    return SIZE", cell)
    assert elsewhere(cell["answer"]) == elsewhere(cell["later"]) == 1
    write("layers_d", "SIZE = 2")
    assert elsewhere(cell["answer"]) == elsewhere(cell["later"]) == 2


def test_tracebacks_elsewhere_show_the_lines_of_a_cell(monkeypatch):
    text = "def typo():\n    return undefined_name\n"
    monkeypatch.setitem(linecache.cache, "a-cell", (len(text), None, text.splitlines(True), "a-cell"))
    namespace = {"__name__": "__main__"}
    exec(compile(text, "a-cell", "exec"), namespace)
    sent = sources.dumped(namespace["typo"])
    del linecache.cache["a-cell"]  # as in another process
    with pytest.raises(NameError) as raised:
        pickle.loads(sent)()
    assert 'File "a-cell", line 2, in typo\n    return undefined_name' in traceback_of(raised.value)


def test_what_was_packed_stays_as_it_was(write, elsewhere):
    """A worker that comes back in mid-run trains what the others train."""
    mine = write("mine_e", "class Mine:\n    def size(self): return 1\ndef size(mine): return mine.size()")
    size = write("sizes_e", "def size(mine): return (mine[0] if isinstance(mine, list) else mine).size()").size
    packed = sources.pack(mine.Mine())
    write("mine_e", "class Mine:\n    def size(self): return 2\ndef size(mine): return mine.size()")
    assert elsewhere(size, packed) == 1 and elsewhere(size, [packed]) == 1
    assert elsewhere(sys.modules["mine_e"].size, sys.modules["mine_e"].Mine()) == 2
    assert elsewhere(size, packed) == 1


@pytest.mark.parametrize(
    ("loaded", "edited", "what"),
    [
        ("def answer(): return 1", "def answer(): return 2", "answer"),
        ("RATE = 0.5\ndef answer(): return RATE", "RATE = 0.25\ndef answer(): return RATE", "RATE"),
        ("SHAPE = (1, 2)\ndef answer(): return SHAPE", "SHAPE = (1, 3)\ndef answer(): return SHAPE", "SHAPE"),
        ("class A:\n    def f(self): return 1\ndef answer(): return A().f()", "class A:\n    pass\ndef answer(): return 1", "A.f"),
        ("def answer(): return [x + 1 for x in (1,)]", "def answer(): return [x + 2 for x in (1,)]", "answer"),
        (
            "import functools\n@functools.cache\ndef answer(): return 1",
            "import functools\n@functools.cache\ndef answer(): return 2",
            "answer",
        ),
    ],
)
def test_edited_before_it_was_seen_and_not_reloaded(write, loaded, edited, what):
    mine = write("mine_f", loaded)
    write("mine_f", edited, load=False)
    with pytest.raises(ClusterError, match=rf"mine_f.py is not what this kernel has loaded: '{what}' .*importlib.reload\(mine_f\)"):
        sources.pack(mine.answer)
    assert sources.digests(sources.needed(mine.answer)) == {"mine_f": ""}
    importlib.reload(mine)
    assert isinstance(sources.pack(mine.answer), sources.Packed)


def test_what_a_cell_has_changed_in_a_module(write):
    mine = write(
        "mine_g",
        "RATE, CALLS, CACHE = 0.5, 0, {}\nWIDTH = 3\ndef answer(): return RATE\nclass Net:\n    def forward(self): return 1",
    )
    assert isinstance(sources.pack(mine.answer), sources.Packed)
    mine.CACHE["a"], mine.CALLS = 1, 2  # not constants of its own
    sources.pack(mine.answer)
    mine.WIDTH = 4
    with pytest.raises(ClusterError, match=r"mine_g.py .*'WIDTH'"):
        sources.pack(mine.answer)
    mine.WIDTH = 3
    exec("def forward(self): return 2", cell := {"__name__": "__main__"})
    mine.Net.forward = cell["forward"]
    with pytest.raises(ClusterError, match=r"mine_g.py .*'forward'"):
        sources.pack(mine.answer)


def test_a_class_of_before_that_another_module_still_has(write):
    write("layers_h", "class Layer:\n    def size(self): return 1")
    mine = write("mine_h", "from layers_h import Layer\ndef answer(): return Layer().size()")
    write("layers_h", "class Layer:\n    def size(self): return 2")
    assert mine.answer() == 1
    with pytest.raises(ClusterError, match=r"mine_h.py is not what .*: 'Layer.size'.*reload\(mine_h\)"):
        sources.pack(mine.answer)
    importlib.reload(mine)
    sources.pack(mine.answer)


def test_lines_and_comments_may_move(write):
    mine = write("mine_i", "def answer(): return 1")
    write("mine_i", "# a comment\n\n\ndef answer():\n    # another one\n    return 1", load=False)
    assert isinstance(sources.pack(mine.answer), sources.Packed)


def test_whose_modules():
    problem = Classifier(data=(np.eye(20, dtype="f4"), np.arange(20) % 2))
    assert not sources.needed(np.zeros(3), torch.nn.Linear(1, 1), problem, {"module": "json:loads"}, textwrap.dedent)
    assert sources.pack(len) is len and sources.pack_call(len, ([1],))().value() == sources.pack_call(len, ([1],), here=True)() == 1
    assert sources.needed(write, threading.Lock()) == {}  # it cannot be pickled: whoever sends it says so


def test_modules_are_parsed_by_one_thread_at_a_time(write, monkeypatch):
    """Two at once make a SystemError of CPython 3.11 now and then."""
    parse, both, met = ast.parse, threading.Barrier(2), []

    def meet(text):
        try:
            met.append(both.wait(0.3))
        except threading.BrokenBarrierError:
            both.reset()
        return parse(text)

    monkeypatch.setattr(sources.ast, "parse", meet)
    modules = [write(f"parsed_{n}", f"import json\ndef answer(): return {n}") for n in range(2)]
    threads = [threading.Thread(target=sources.pack, args=(module.answer,)) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met


def test_a_c_extension_is_not_loaded_twice(write, elsewhere, monkeypatch):
    mine = write("mine_k", "def answer(): return 1")
    monkeypatch.setattr(sources, "_has_extension", lambda name: name == "mine_k")
    assert elsewhere(mine.answer) == 1
    mine = write("mine_k", "def answer(): return 2")
    with pytest.raises(ClusterError, match=r"mine_k.py has changed, .*connect\(\) again"):
        elsewhere(mine.answer)


def test_the_record_names_what_has_changed(write):
    mine = write(
        "mine_l", "from layers_l import size\ndef answer(): return size()" if write("layers_l", "def size(): return 1") else ""
    )
    recorded = sources.digests(sources.needed(mine.answer))
    assert list(recorded) == ["layers_l", "mine_l"] and sources.changed(recorded) == []
    write("layers_l", "def size(): return 2")
    assert sources.changed(recorded) == [str(write.folder / "layers_l.py")]
    os.remove(write.folder / "layers_l.py")
    del sys.modules["layers_l"]
    importlib.invalidate_caches()
    assert sources.changed(recorded) == ["layers_l"]


CELL = """
import functools
RATE = {rate}
def around(width):
    def model(shape, n, p={p}):
        return [width, p, RATE, {{"a", "b"}} and {sum}]
    return model
model = around({width})
class Loss:
    def __init__(self):
        self.gamma = {gamma}
    def __call__(self, outputs, targets):
        return outputs - targets
loss = Loss()
"""


def cell(**settings):
    """What a cell of a notebook defines."""
    namespace = {"__name__": "__main__"}
    exec(CELL.format(**{"rate": 1, "p": 0.5, "width": 3, "gamma": 2.0, "sum": "1 + n"} | settings), namespace)
    return [namespace["model"], namespace["loss"]]


def test_the_record_knows_what_was_written_in_a_notebook():
    recorded = sources.digests({}, problem=cell(), update=3)
    assert list(recorded) == ["<problem>"]
    assert sources.changed(recorded, problem=cell()) == [] == sources.changed(recorded) == sources.changed({}, problem=cell())
    for other in ({"rate": 2}, {"p": 0.25}, {"width": 4}, {"gamma": 1.0}, {"sum": "n + 1"}):
        assert sources.changed(recorded, problem=cell(**other)) == ["what was written in a notebook for its problem"]
    assert sources.changed({"<problem>": "2.7:0"}, problem=cell()) == []  # compiled by another Python


def test_its_digest_is_the_same_in_each_process():
    text = CELL.format(rate=1, p=0.5, width=3, gamma=2.0, sum="1 + n")
    code = f"from labkit import sources\nn = {{'__name__': '__main__'}}\nexec({text!r}, n)\n"
    code += "print(sources.digests({}, problem=[n['model'], n['loss']])['<problem>'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.stdout.split() == [sources.digests({}, problem=cell())["<problem>"]]


ONE = """
    import dataclasses, functools
    FACTORS, DOUBLE = [1, 2], 2 * 0.5
    def scaled(by):
        def wrap(fn):
            @functools.wraps(fn)
            def inner(*args): return fn(*args) * by
            return inner
        return wrap
    class Layer:
        FACTOR = 1.0
        def size(self): return self.FACTOR
    @dataclasses.dataclass
    class Settings:
        factor: float = 1.0
    SETTINGS = Settings()
    @scaled(1.0)
    def decorated(): return 1
    def by_default(factor=1.0): return factor
"""
EDITS = {
    "FACTORS[0]": ("FACTORS, DOUBLE = [1, 2]", "FACTORS, DOUBLE = [7, 2]"),
    "DOUBLE": ("2 * 0.5", "2 * 3.5"),
    "Layer().size()": ("FACTOR = 1.0", "FACTOR = 7.0"),
    "Settings().factor": ("factor: float = 1.0", "factor: float = 7.0"),
    "SETTINGS.factor": ("factor: float = 1.0", "factor: float = 7.0"),
    "decorated()": ("@scaled(1.0)", "@scaled(7.0)"),
    "by_default()": ("(factor=1.0)", "(factor=7.0)"),
}


@pytest.mark.parametrize("what", EDITS)
def test_values_that_are_no_code_of_a_function_are_noticed_too(write, monkeypatch, what):
    """Edited and not loaded again, by the bytecode that Python has written; and in a module that still has what it took before."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before, after = EDITS[what]
    values = write("values_m", ONE)
    user = write("user_m", f"from values_m import *\nimport values_m\ndef answer(): return values_m.{what}")
    taken = write("taken_m", f"from values_m import {re.split('[^A-Za-z_]', what)[0]}\ndef answer(): return {what}")
    child = write("child_m", "import values_m\nclass Child(values_m.Layer): pass\ndef answer(): return Child().size()")
    write("values_m", ONE.replace(before, after), load=False)
    os.utime(values.__file__, (1e9, 1e9))
    with pytest.raises(ClusterError, match=r"values_m.py is not what this kernel has loaded: 'code outside of its functions'"):
        sources.pack(user.answer)
    importlib.reload(values)
    assert isinstance(sources.pack(user.answer), sources.Packed) and user.answer() == 7
    for module in (taken, child) if "Layer" in what else (taken,):
        assert module.answer() == 1
        with pytest.raises(ClusterError, match=rf"{module.__name__}.py is not what this kernel has loaded"):
            sources.pack(module.answer)
        importlib.reload(module)
        assert isinstance(sources.pack(module.answer), sources.Packed) and module.answer() == 7
