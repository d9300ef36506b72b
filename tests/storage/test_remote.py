"""Directories in scratch that stand for objects, with a real S3 server."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config.scratch import local_path, public
from raytrain2p.storage import objects, remote
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.lease import Lease, LostLeaseError
from raytrain2p.storage.locks import Lock
from raytrain2p.storage.objects import ABSENT, ChangedError, ObjectStore, Version
from raytrain2p.storage.remote import LAUNCHES, NOT_OBJECTS, WRITER, Directory, check_conditions, fetch, next_number, pull_root, push_file
from tests.storage.s3_server import BUCKET, S3Server

THIS_PROCESS = "import json; from raytrain2p.storage.lease import this_process; print(json.dumps(this_process()))"
RUN = f"{'a' * 32}_20260101_000000"


@pytest.fixture
def root(s3: S3Server, tmp_path: Path) -> str:
    """An output root of this test alone, as a path in scratch."""
    return local_path(f"s3://{BUCKET}/{tmp_path.name}")


def on_a_fresh_host(monkeypatch: pytest.MonkeyPatch, root: str, tmp_path: Path, name: str = "other") -> str:
    """The same root on a machine whose disk is empty."""
    url = public(root)
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", str(tmp_path / name))
    return local_path(url)


def run_in(root: str, **files: str) -> Path:
    folder = Path(root) / "alignment" / RUN
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder


def test_a_url_is_one_path_in_scratch_and_texts_have_the_url(root: str) -> None:
    assert Path(root).is_absolute()
    assert public(f"cannot write {root}/alignment/x") == f"cannot write s3://{BUCKET}/{Path(root).name}/alignment/x"
    assert local_path("s3://") == "s3://"
    assert local_path("s3://bucket/../../etc") == "s3://bucket/../../etc"
    assert local_path("http://bucket/x") == "http://bucket/x"


def test_of_many_that_create_one_object_one_succeeds_and_of_many_that_replace_it_too(root: str) -> None:
    store = ObjectStore(public(root), 5)
    for expected in (ABSENT, None):
        version = store.read("one")[1] if expected is None else expected  # type: ignore[index]
        won = list[int]()

        def write(number: int, expected: Version | str = version, won: list[int] = won) -> None:
            try:
                store.write("one", f"{expected} {number}".encode(), expected)
                won.append(number)
            except ChangedError:
                pass

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1


def test_a_write_whose_answer_was_lost_is_not_taken_for_that_of_another_process(root: str) -> None:
    store = ObjectStore(public(root), 5)
    first = store.write("one", b"mine", ABSENT)
    assert store.write("one", b"mine", ABSENT) == first
    with pytest.raises(ChangedError):
        store.write("one", b"another's", ABSENT)


def test_numbers_are_given_once(root: str) -> None:
    numbers = list[int]()
    threads = [threading.Thread(target=lambda: numbers.append(next_number(root, 3))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == [4, 5, 6, 7, 8, 9]


def test_a_lease_excludes_others_until_it_is_released(root: str) -> None:
    store = ObjectStore(public(root), 5)
    with Lease(store, "lease", "launch x").held(0) as holder:
        assert holder is None
        with Lease(store, "lease", "launch x").held(0) as other:
            assert other == f"pid {os.getpid()} on {os.uname().nodename}"
    with Lease(store, "lease", "launch x").held(0) as holder:
        assert holder is None


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(root: str) -> None:
    store = ObjectStore(public(root), 5)
    said = subprocess.run([sys.executable, "-c", THIS_PROCESS], capture_output=True, check=True).stdout  # it has ended
    lease = Lease(store, "lease", "launch x")
    lease.row["process"] = json.loads(said)
    lease._acquire(0, lambda holder: None)
    began = time.monotonic()
    with Lease(store, "lease", "launch x").held(0) as holder:
        assert holder is None
    assert time.monotonic() - began < 2


def test_a_lease_of_another_machine_is_taken_over_once_it_was_watched_unchanged_and_its_owner_finds_out(root: str) -> None:
    """However wrong the clocks are: none is compared."""
    store = ObjectStore(public(root), 5)
    held_up = Lease(store, "lease", "run 1234", seconds=1)
    held_up.row["process"] = ["another boot", "", "1", "1"]
    assert held_up._acquire(0, lambda holder: None) is None  # and is never renewed: as a process that is stopped
    began = time.monotonic()
    with Lease(store, "lease", "run 1234", seconds=1).held(10) as holder:
        assert holder is None
        assert 1 < time.monotonic() - began < 6
        with pytest.raises(LostLeaseError, match="run 1234 was taken over by pid"):
            held_up.check(0)
        with pytest.raises(LostLeaseError):
            held_up.check(0)


def test_a_lease_that_is_renewed_is_not_taken_over(root: str) -> None:
    store = ObjectStore(public(root), 5)
    lease = Lease(store, "lease", "launch x", seconds=0.6)
    lease.row["process"] = ["another boot", "", "1", "1"]
    with lease.held(0), Lease(store, "lease", "launch x").held(1.5) as holder:
        assert holder is not None


def test_a_directory_is_the_same_on_a_fresh_host(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = run_in(root, **{"run.json": '{"a": 1}', "plots__curve.png": "png", "lightning_checkpoints__last.ckpt": "weights"})
    os.link(folder / "lightning_checkpoints" / "last.ckpt", folder / "lightning_checkpoints" / "best-1.ckpt")
    (folder / ".lock").write_text("of this machine")
    Directory(folder).push()

    other = Path(on_a_fresh_host(monkeypatch, root, tmp_path)) / "alignment" / RUN
    Directory(other).pull()
    names = sorted(path.relative_to(other).as_posix() for path in other.rglob("*") if path.is_file() and path.name not in NOT_OBJECTS)
    assert names == ["lightning_checkpoints/best-1.ckpt", "lightning_checkpoints/last.ckpt", "plots/curve.png", "run.json"]
    assert all((other / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_only_what_changed_is_sent_or_fetched_again(root: str, s3: S3Server) -> None:
    folder = run_in(root, **{"run.json": "{}", "config.json": "{}"})
    directory = Directory(folder)
    directory.push()
    before = s3.requests()
    directory.push()
    directory.pull()
    (folder / "config.json").write_text('{"a": 1}')
    directory.push()
    after = s3.requests()
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)} == {"GET": 1, "PUT": 1}


def test_replaced_checkpoints_are_deleted_after_the_new_one_is_there(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in(root, **{"lightning_checkpoints__last.ckpt": "1", "lightning_checkpoints__best-1.ckpt": "1"})
    directory = Directory(folder)
    directory.push()
    (folder / "lightning_checkpoints" / "best-1.ckpt").unlink()
    run_in(root, **{f"lightning_checkpoints__{name}.ckpt": "22" for name in ("last", "best-2")}, **{"metrics.jsonl": '{"step": 2}\n{"st'})
    done, write = list[str](), directory.store.write

    def recorded(key: str, content: bytes | Path, expected: Version | str | None = None) -> Version:
        done.append(Path(key).name)
        return write(key, content, expected)

    monkeypatch.setattr(directory.store, "write", recorded)
    monkeypatch.setattr(directory.store, "delete", lambda keys: done.extend(f"delete {Path(key).name}" for key in keys))
    directory.push()
    assert done == ["metrics.jsonl", "last.ckpt", "best-2.ckpt", "delete best-1.ckpt"]
    assert ObjectStore(public(root)).read(f"alignment/{RUN}/metrics.jsonl")[0] == b'{"step": 2}\n'  # type: ignore[index]


def test_large_files_are_sent_in_parts_and_the_best_is_a_copy_on_the_server(
    root: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WITH_CONDITION", 1000)
    folder = run_in(root, **{"lightning_checkpoints__last.ckpt": ""})
    last = folder / "lightning_checkpoints" / "last.ckpt"
    last.write_bytes(os.urandom(20_000_000))
    os.link(last, last.with_name("best-1.ckpt"))
    before = s3.requests()
    Directory(folder).push()
    after = s3.requests()
    content = last.read_bytes()
    shutil.rmtree(folder)
    Directory(folder).pull()
    assert last.read_bytes() == last.with_name("best-1.ckpt").read_bytes() == content
    assert after["PUT"] - before.get("PUT", 0) == 3  # two parts and a copy


def test_records_are_fetched_without_large_files_which_stand_there_with_their_size(
    root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Directory(run_in(root, **{"run.json": "{}", "aligner.pt": "tensors"})).push()
    other = on_a_fresh_host(monkeypatch, root, tmp_path)
    pull_root(other, lambda name: name.endswith(".json"))
    artifact = Path(other) / "alignment" / RUN / "aligner.pt"
    assert (artifact.with_name("run.json").read_text(), artifact.stat().st_size, artifact.read_bytes()) == ("{}", 7, b"\0" * 7)
    fetch(artifact)
    assert artifact.read_text() == "tensors"
    pull_root(other, lambda name: name.endswith(".json"))
    assert artifact.read_text() == "tensors"


def test_a_listing_leaves_what_another_process_of_this_machine_is_about_to_upload(root: str) -> None:
    folder = run_in(root, **{"run.json": "{}"})
    Directory(folder).push()
    (folder / "run.json").write_text('{"newer": 1}')
    (folder / "status.json").write_text("{}")
    with Lock(folder / WRITER).held() as holder:
        assert holder is None
        pull_root(root, lambda name: True)
        assert (folder / "run.json").read_text() == '{"newer": 1}'
    assert (folder / "status.json").is_file()
    pull_root(root, lambda name: True)  # the process was killed before it uploaded that, and another host has gone on
    assert (folder / "run.json").read_text() == "{}"
    Directory(folder).pull(ours=True)  # the owner's, after its process was killed: the objects are the truth
    assert (folder / "run.json").read_text() == "{}"
    assert not (folder / "status.json").exists()


def test_a_run_that_a_process_of_this_machine_begins_to_write_is_left_to_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_in(root, **{"run.json": "{}"})
    Directory(folder).push()
    reader, began = Directory(folder), list[threading.Thread]()
    listed = reader.store.list

    def write() -> None:
        with Lock(folder / WRITER).held(10) as holder:
            assert holder is None
            (folder / "run.json").write_text('{"newer": 1}')

    def begin(prefix: str = "") -> list[objects.Object]:
        began.append(threading.Thread(target=write))
        began[0].start()
        time.sleep(0.3)
        return listed(prefix)

    monkeypatch.setattr(reader.store, "list", begin)
    reader.pull()
    began[0].join()
    assert (folder / "run.json").read_text() == '{"newer": 1}'


def test_launches_of_one_machine_record_their_runs_at_once_while_others_read_them(root: str) -> None:
    folder = Path(root) / LAUNCHES
    folder.mkdir(parents=True)
    failed, over = list[StorageError](), threading.Event()

    def record(number: int) -> None:
        path = folder / f"launch-{number}.json"
        try:
            for content in ('{"intent": 1}', f'{{"run_id": {number}}}'):
                path.write_text(content)
                push_file(path)
        except StorageError as error:
            failed.append(error)

    def read() -> None:
        while not over.is_set():
            Directory(folder).pull()

    readers = [threading.Thread(target=read) for _ in range(2)]
    launches = [threading.Thread(target=record, args=(number,)) for number in range(6)]
    for thread in (*readers, *launches):
        thread.start()
    for thread in launches:
        thread.join()
    over.set()
    for thread in readers:
        thread.join()
    assert not failed
    assert sorted(path.read_text() for path in folder.glob("launch-*.json")) == [f'{{"run_id": {number}}}' for number in range(6)]


def test_a_listing_leaves_a_run_that_a_process_of_this_machine_makes_meanwhile(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, folder = ObjectStore.list, Path(root) / "alignment" / RUN

    def and_then(self: ObjectStore, prefix: str = "") -> list[objects.Object]:
        found = listed(self, prefix)
        if not folder.exists():
            Directory(run_in(root, **{"run.json": "{}"})).push()
        return found

    monkeypatch.setattr(ObjectStore, "list", and_then)
    pull_root(root, lambda name: True)
    assert (folder / "run.json").read_text() == "{}"


def test_a_listing_leaves_what_a_process_of_this_machine_uploads_meanwhile(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listed = run_in(root, **{"run.json": "{}"}), ObjectStore.list
    Directory(folder).push()

    def and_then(self: ObjectStore, prefix: str = "") -> list[objects.Object]:
        found = listed(self, prefix)
        if not (folder / "result.json").exists():
            Directory(run_in(root, **{"result.json": "{}"})).push()
        return found

    monkeypatch.setattr(ObjectStore, "list", and_then)
    pull_root(root, lambda name: True)
    assert (folder / "result.json").read_text() == "{}"


def test_that_a_run_has_ended_is_known_after_all_else_of_it(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Directory(run_in(root, **{"metrics.jsonl": "{}\n", "status.json": "{}"})).push()
    folder = Path(on_a_fresh_host(monkeypatch, root, tmp_path)) / "alignment" / RUN
    take, ended_before = Directory._take, list[bool]()

    def slowly(self: Directory, one: objects.Object, content: Any) -> Any:
        if one.key.endswith("metrics.jsonl"):
            time.sleep(0.3)
            ended_before.append((folder / "status.json").exists())
        return take(self, one, content)

    monkeypatch.setattr(Directory, "_take", slowly)
    Directory(folder).pull()
    assert ended_before == [False]
    assert (folder / "status.json").exists()


def test_a_file_whose_object_was_deleted_is_not_used(root: str) -> None:
    path = Path(root) / "settings.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    ObjectStore(public(root)).write("settings.yaml", b"seed: 1", ABSENT)
    fetch(path)
    assert path.read_text() == "seed: 1"
    ObjectStore(public(root)).delete(["settings.yaml"])
    fetch(path)
    assert not path.exists()


def test_a_run_that_was_deleted_is_gone_from_scratch(root: str) -> None:
    folder = run_in(root, **{"run.json": "{}"})
    Directory(folder).push()
    ObjectStore(public(root)).delete([f"alignment/{RUN}/run.json"])
    pull_root(root, lambda name: True)
    assert not folder.exists()


def test_a_writer_that_was_deposed_uploads_nothing(root: str) -> None:
    folder = run_in(root, **{"run.json": "{}"})
    store = ObjectStore(public(root), 5)
    lease = Lease(store, "lease", "run 1234", seconds=0.2)
    lease.row["process"] = ["another boot", "", "1", "1"]
    lease._acquire(0, lambda holder: None)
    directory = Directory(folder, lease)
    directory.push()
    with Lease(store, "lease", "run 1234").held(10):
        (folder / "run.json").write_text('{"of": "the deposed"}')
        with pytest.raises(LostLeaseError):
            directory.push()
    assert store.read(f"alignment/{RUN}/run.json")[0] == b"{}"  # type: ignore[index]


def test_the_owner_replaces_what_a_deposed_writer_wrote_after_all(root: str) -> None:
    folder = run_in(root, **{"run.json": "{}"})
    store = ObjectStore(public(root), 5)
    lease = Lease(store, "lease", "run 1234")
    with lease.held(0):
        directory = Directory(folder, lease)
        directory.push()
        store.write(f"alignment/{RUN}/run.json", b"late")
        (folder / "run.json").write_text('{"a": 1}')
        directory.push()
    assert store.read(f"alignment/{RUN}/run.json")[0] == b'{"a": 1}'  # type: ignore[index]


def test_a_server_that_is_overloaded_or_refuses_connections_for_some_seconds_is_tried_again(root: str, s3: S3Server) -> None:
    directory = Directory(run_in(root, **{"run.json": "{}"}), patience=30)
    for fault in ({"status": 503, "seconds": 0.8}, {"refuse": 0.8}):
        s3.fault(**fault)
        time.sleep(0.2)
        (directory.path / "run.json").write_text(str(fault))
        directory.push()
        assert directory.store.read(f"{directory.prefix}/run.json")[0].decode() == str(fault)  # type: ignore[index]


def test_what_is_refused_for_good_is_reported_at_once_in_one_line(root: str, s3: S3Server) -> None:
    with pytest.raises(StorageError, match=r"^s3://nobody.* cannot be reached: its bucket does not exist$"):
        check_conditions(local_path("s3://nobody/x"))
    with pytest.raises(StorageError, match=r"its bucket does not exist$"):
        pull_root(local_path("s3://nobody/x"), lambda name: True)
    s3.fault(status=403, seconds=0.5)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"the credentials are not accepted \(403 Fault\)$"):
        check_conditions(root)
    assert time.monotonic() - began < 5
    time.sleep(0.5)
    check_conditions(root)


def test_a_server_that_is_away_is_named_in_one_line(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(remote, "AT_THE_START", 0.5)
    with pytest.raises(StorageError, match=r"^s3://runs/\S+ cannot be reached: HTTP error: error sending request$"):
        check_conditions(root)


def test_a_storage_without_conditional_writes_is_refused(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects.ObjectStore, "write", lambda self, key, content, expected=None: Version('"1"'))
    with pytest.raises(StorageError, match="does not honour conditional writes"):
        check_conditions(root)
