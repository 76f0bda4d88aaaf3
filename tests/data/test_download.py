"""Downloads arrive whole or say why not; what came is kept; a file that changes is noticed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gr.data import download
from gr.data.download import Remote, fetch, first_seen
from gr.errors import UserError
from local_server import Site, closed_port, names, serve

BODY = bytes(range(256)) * 40


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with serve(BODY, monkeypatch) as site:
        yield site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "downloads"


class Waits(list):
    """Stands in for time.sleep."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def test_a_file_is_downloaded_once_and_pinned(site: Site, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert first_seen(folder, "log.bin") is None
    path = fetch(site.remote(), folder)
    assert path.read_bytes() == BODY and names(folder) == ["log.bin", "manifest.json"]
    said = capsys.readouterr().err
    assert site.address in said and "anyone may test with it" in said
    entry = json.loads((folder / "manifest.json").read_text())["log.bin"]
    assert entry["sha256"] == hashlib.sha256(BODY).hexdigest() == first_seen(folder, "log.bin")
    assert entry["bytes"] == len(BODY) and entry["url"] == site.remote().url and len(entry["first_seen"]) == 10
    assert fetch(site.remote(), folder) == path
    assert site.asked == [None] and capsys.readouterr().err == ""


def test_a_cut_connection_is_resumed_where_it_stopped(site: Site, folder: Path) -> None:
    site.cuts = [1000, 500]
    waits = Waits()
    assert fetch(site.remote(), folder, sleep=waits).read_bytes() == BODY
    assert site.asked == [None, "bytes=1000-", "bytes=1500-"] and waits == [1.0, 2.0]


def test_after_too_many_cuts_the_same_command_resumes(site: Site, folder: Path) -> None:
    site.cuts = [1000, 0]
    with pytest.raises(UserError, match=r"ended after 1000 of 10240 bytes.*the same command resumes.*--data\.path"):
        fetch(site.remote(), folder, attempts=2, sleep=Waits())
    assert names(folder) == ["log.bin.part", "log.bin.part.json"]
    assert fetch(site.remote(), folder, attempts=1).read_bytes() == BODY
    assert site.asked[-1] == "bytes=1000-" and names(folder) == ["log.bin", "manifest.json"]


def test_a_server_without_ranges_is_read_from_the_start(site: Site, folder: Path) -> None:
    site.cuts, site.ranges = [1000], False
    assert fetch(site.remote(), folder, sleep=Waits()).read_bytes() == BODY
    assert site.asked == [None, "bytes=1000-"]


def test_a_server_that_names_no_version_is_not_resumed(site: Site, folder: Path) -> None:
    site.cuts, site.etag = [1000], False
    assert fetch(site.remote(), folder, sleep=Waits()).read_bytes() == BODY
    assert site.asked == [None, None]


@pytest.mark.parametrize("new", [BODY[::-1], BODY[:700]], ids=["as_long", "shorter"])
def test_a_file_that_changes_midway_is_not_stitched_together(site: Site, folder: Path, new: bytes) -> None:
    site.cuts = [1000]

    def changed(_: float) -> None:
        site.body = new

    assert fetch(site.remote(), folder, sleep=changed).read_bytes() == new


def test_a_stop_between_a_changed_files_answer_and_its_bytes_stitches_nothing(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.cuts = [1000]
    with pytest.raises(UserError):
        fetch(site.remote(), folder, attempts=1)
    site.body = BODY[::-1]

    def full(*_: object) -> None:
        raise UserError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_need_space", full)
        with pytest.raises(UserError, match="no space"):
            fetch(site.remote(), folder, attempts=1)
    assert fetch(site.remote(), folder, sleep=Waits()).read_bytes() == BODY[::-1]


def test_a_file_of_the_same_name_from_elsewhere_is_not_taken_for_it(site: Site, folder: Path) -> None:
    fetch(site.remote(), folder)
    other = Remote(site.remote().url.replace("/log.bin", "/else/log.bin"), "terms")
    for ask in (fetch, download.pinned_sha256):
        with pytest.raises(UserError, match="has a file of the same name; set `cache` to another folder"):
            ask(other, folder)
    assert fetch(dataclasses.replace(other, md5=hashlib.md5(BODY).hexdigest()), folder).read_bytes() == BODY


def test_a_part_that_no_longer_fits_is_dropped(site: Site, folder: Path) -> None:
    site.cuts = [1000]
    with pytest.raises(UserError):
        fetch(site.remote(), folder, attempts=1)
    with (folder / "log.bin.part").open("ab") as file:
        file.write(BODY)  # longer than the file: the server answers 416
    assert fetch(site.remote(), folder, sleep=Waits()).read_bytes() == BODY


def test_a_whole_part_needs_no_further_request(site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the process is killed between the last byte and the renaming."""
    with monkeypatch.context() as patch:
        patch.setattr(download, "_check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(site.remote(), folder)
    assert fetch(site.remote(), folder).read_bytes() == BODY and len(site.asked) == 1


def test_passing_faults_are_tried_again(site: Site, folder: Path) -> None:
    site.statuses = [503, 429]
    waits = Waits()
    assert fetch(site.remote(), folder, sleep=waits).read_bytes() == BODY and len(waits) == 2


def test_the_publishers_checksum_is_checked(site: Site, folder: Path) -> None:
    right = hashlib.md5(BODY).hexdigest()
    with pytest.raises(UserError, match=f"has md5 {right}, and its publisher prints {'0' * 32}.*deleted.*--data.path"):
        fetch(site.remote(md5="0" * 32), folder)
    assert names(folder) == []
    assert fetch(site.remote(md5=right), folder).exists()


def test_content_unlike_the_first_seen_is_refused_until_the_user_agrees(site: Site, folder: Path) -> None:
    fetch(site.remote(), folder).unlink()
    site.body = BODY[::-1]
    old, new = (hashlib.sha256(body).hexdigest() for body in (BODY, BODY[::-1]))
    with pytest.raises(UserError, match=rf"has sha256 {new}, and {old} when first seen.*'log.bin' out of .*manifest"):
        fetch(site.remote(), folder)
    assert names(folder) == ["manifest.json"]
    (folder / "manifest.json").write_text("{}")
    assert fetch(site.remote(), folder).read_bytes() == site.body


def test_a_download_damaged_on_disk_is_noticed(site: Site, folder: Path) -> None:
    path = fetch(site.remote(), folder)
    path.write_bytes(BODY[:-1])
    with pytest.raises(UserError, match=f"when first seen; delete {path} and the same command downloads it again"):
        fetch(site.remote(), folder)
    path.unlink()
    assert fetch(site.remote(), folder).read_bytes() == BODY


def test_a_file_put_there_by_hand_is_used_and_pinned(site: Site, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "log.bin").write_bytes(BODY)
    fetch(site.remote(), folder)
    assert site.asked == [] and first_seen(folder, "log.bin") == hashlib.sha256(BODY).hexdigest()


def test_two_downloads_at_once_are_one(site: Site, folder: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(site.remote(), folder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and paths[0].read_bytes() == BODY and site.asked == [None]


def test_without_file_locks_each_process_writes_a_file_of_its_own(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "fcntl", None)
    seen = []
    monkeypatch.setattr(download, "_need_space", lambda *_: seen.extend(names(folder)))
    assert fetch(site.remote(), folder).read_bytes() == BODY
    assert seen == [f"log.bin.{download.os.getpid()}.part.json"] and names(folder) == ["log.bin", "manifest.json"]


def test_a_missing_file_is_one_sentence_with_a_way_out(site: Site, folder: Path) -> None:
    remote = site.remote("gone.bin")
    waits = Waits()
    with pytest.raises(UserError, match=f"{remote.url} answers with HTTP status 404.*--data.path FILE"):
        fetch(remote, folder, sleep=waits)
    assert waits == []


def test_no_network_is_one_sentence_with_a_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    remote = Remote(f"http://127.0.0.1:{closed_port()}/log.bin", "none")
    with pytest.raises(UserError, match=f"{remote.url} could not be downloaded .*refused.*--data.path FILE"):
        fetch(remote, folder, sleep=Waits())


def test_a_disk_without_space_is_said_before_the_download(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder.parent.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="log.bin needs 10240 more bytes and the disk of .* has 100 free"):
        fetch(site.remote(), folder)


def test_a_disk_that_fills_up_midway_is_one_sentence(site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_copy", full)
    with pytest.raises(UserError, match="is full; free some space, and the same command resumes log.bin"):
        fetch(site.remote(), folder)


def test_a_damaged_manifest_is_one_sentence(site: Site, folder: Path) -> None:
    fetch(site.remote(), folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        fetch(site.remote(), folder)


def test_a_bar_is_drawn_on_a_terminal_alone(site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        fetch(site.remote(), folder).unlink()
        assert ("10.2/10.2 kB" in stream.getvalue()) is drawn


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ml-1m.zip", "https://host/"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not an address of a file"):
        Remote(url, "none")
