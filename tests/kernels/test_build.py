"""kernels.build on small kernels of the test's own: what makes it compile again, what does not, and life without a compiler."""

from __future__ import annotations

import multiprocessing

import pytest

from kernels import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """Two kernels, of which ``one`` includes a header of ``two``; a cache of their own."""
    root = tmp_path / "kernels"
    for name, files in {
        "one": {"one.cpp": '#include "two/csrc/shared.h"\nextern "C" int sextant_test_one() { return shared(); }\n'},
        "two": {
            "two.cpp": '#include "own.h"\nextern "C" int sextant_test_two() { return own(); }\n',
            "own.h": "inline int own() { return 2; }\n",
            "shared.h": '#define FILE_OF_LOOPS "one/csrc/loops.h"\n#include FILE_OF_LOOPS\n',
        },
    }.items():
        folder = root / name / "csrc"
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    (root / "one/csrc/loops.h").write_text("inline int shared() { return 1; }\n")
    monkeypatch.setattr(build, "ROOT", root)
    monkeypatch.setenv("SEXTANT_CACHE", str(tmp_path / "cache"))
    build.load.cache_clear()
    yield root
    build.load.cache_clear()


@needs_compiler
def test_only_a_change_that_a_kernel_reaches_compiles_it_again(kernels):
    first = {name: build._library(name) for name in build.names()}
    assert set(first) == {"one", "two"} and all(path.exists() for path in first.values())
    assert {name: build._library(name) for name in first} == first
    (kernels / "two/csrc/own.h").write_text("inline int own() { return 3; }\n")
    assert build._library("one") == first["one"] and build._library("two") != first["two"]
    (kernels / "one/csrc/loops.h").write_text("inline int shared() { return 4; }\n")  # included by way of a macro
    assert build._library("one") != first["one"]


@needs_compiler
def test_a_compiled_kernel_needs_no_compiler_and_an_uncompiled_one_says_so(kernels, monkeypatch, caplog):
    library = build._library("one")
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build._library("one") == library and build.load("one")
    assert not build.load("two") and not build.available()
    assert "there is no C++ compiler" in caplog.text and "python -m kernels.build" in caplog.text


@needs_compiler
def test_a_kernel_that_does_not_compile_shows_the_compilers_words_and_leaves_nothing(kernels, caplog):
    (kernels / "two/csrc/two.cpp").write_text("int f( {")
    assert not build.load("two")
    assert "two.cpp" in caplog.text and "error" in caplog.text
    assert not list(build.cache_folder().glob("two-*.so"))


def _load_when_told(start, root, results):
    build.ROOT = root
    start.wait(60)
    results.put(str(build._library("one")))


@needs_compiler
def test_processes_that_start_at_once_compile_once(kernels, tmp_path, monkeypatch):
    log, wrapper = tmp_path / "compiled", tmp_path / "counting-c++"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo once >> {log}; sleep 0.3;; esac\nexec {build.compiler()} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_load_when_told, args=(start, kernels, results)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    got = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(got) == 1 and log.read_text().split() == ["once"]
    assert not [path for path in build.cache_folder().iterdir() if path.is_dir()]


def test_the_command_ends_well_without_a_compiler(kernels, monkeypatch, capsys):
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert build.main() == 0
    out = capsys.readouterr().out
    assert out.count("there is no C++ compiler") == 1 and "slower torch code runs" in out


@needs_compiler
def test_the_command_compiles_all(kernels, capsys):
    assert build.main() == 0
    out = capsys.readouterr().out
    assert "one: ready" in out and "two: ready" in out and "slower" not in out


def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="there is no kernel 'nothing'"):
        build.load("nothing")
