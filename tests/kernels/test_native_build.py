"""The compiler of native forms: what it keeps, and what it does without."""

from __future__ import annotations

import shutil

import pytest

from gr.kernels import native

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
SOURCE = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("GR_NATIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GR_NATIVE", raising=False)
    native._load.cache_clear()
    path = tmp_path / "part" / "native.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE)
    yield path
    native._load.cache_clear()


@needs_compiler
def test_a_file_is_built_once_and_again_when_it_changes(source, tmp_path):
    assert native.load(source).answer() == 42
    (first,) = (tmp_path / "cache").iterdir()
    changed = first.stat().st_mtime_ns
    native._load.cache_clear()
    assert native.load(source).answer() == 42 and first.stat().st_mtime_ns == changed
    source.write_text(SOURCE.replace("42", "43"))
    native._load.cache_clear()
    assert native.load(source).answer() == 43
    assert len(list((tmp_path / "cache").iterdir())) == 2, "nothing half built is left"


@needs_compiler
def test_what_does_not_compile_is_a_warning_and_plain_torch(source):
    source.write_text("int answer( {")
    with pytest.warns(UserWarning, match="native.cpp could not be built, so plain torch is used"):
        assert native.load(source) is None


def test_without_a_compiler_or_when_told_so_there_is_no_library(source, monkeypatch):
    monkeypatch.setenv("GR_NATIVE", "0")
    assert native.load(source) is None
    monkeypatch.setenv("GR_NATIVE", "1")
    monkeypatch.setenv("PATH", "")
    assert native.load(source) is None


@needs_compiler
def test_half_a_library_is_built_again_and_a_relative_cache_is_found(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GR_NATIVE_CACHE", "here")
    monkeypatch.setenv("CXX", "g++ -O1")
    assert native.load(source).answer() == 42
    (built,) = (tmp_path / "here").iterdir()
    changed = tmp_path / "other" / "native.cpp"
    changed.parent.mkdir()
    changed.write_text(SOURCE.replace("42", "44"))
    target = native._build(["g++"], changed)
    target.write_bytes(b"half")
    monkeypatch.delenv("CXX")
    assert native.load(changed).answer() == 44


def test_no_home_folder_means_plain_torch(source, monkeypatch):
    monkeypatch.delenv("GR_NATIVE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(native.Path, "home", homeless)
    if native._compiler():
        with pytest.warns(UserWarning, match="plain torch is used"):
            assert native.load(source) is None
