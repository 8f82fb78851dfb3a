"""What is the user's stays: the work folder is marked, locked and made exclusively, and a rename replaces nothing."""

import json
import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from upfit import durable, provenance
from upfit.checkpoint import work_folder as room
from upfit.checkpoint.output_folder import check_output, names_below
from upfit.checkpoint.work_folder import LOCK, MARK, REPLACED, RESULT, Interrupted, OutputTaken, work_folder
from upfit.durable import as_new_file, exchange, mount_below, remove_tree, rename_new, write_whole
from upfit.errors import UpfitError

STEP: dict[str, Any] = {"verb": "convert gqa", "source": {"name": "source"}, "options": {}, "measurements": {}}


def ours(folder: Path, content: str = "ours") -> Path:
    """A folder as a verb finishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(content)
    provenance.write(folder, [STEP])
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    def content(path: Path) -> str:
        return "-> " + os.readlink(path) if path.is_symlink() else path.read_text() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def publish(out: Path, overwrite: bool = False, content: str = "new", verb: str = "convert") -> None:
    with work_folder(out, verb, overwrite) as work:
        work.publish(ours(work.folder(RESULT), content), overwrite)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "empty", "false mark", "link with a mark"])
def test_a_name_without_our_mark_is_left_alone(tmp_path: Path, kind: str) -> None:
    taken, elsewhere = tmp_path / "out.upfit-work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    if kind == "file":
        taken.write_text("mine")
    elif kind.startswith("link"):
        taken.symlink_to(elsewhere)
        if "mark" in kind:
            (elsewhere / MARK).write_text(room._mark("convert"))
    else:
        taken.mkdir()
        if kind != "empty":
            (taken / "result").write_text("mine")
        if kind == "false mark":
            (taken / MARK).write_text(json.dumps({"pancakes": 3}))
    before = snapshot(tmp_path)
    with pytest.raises(UpfitError, match="Upfit did not make it"):
        publish(tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path) == before


def test_what_is_published_is_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    publish(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    publish(tmp_path / "out", overwrite=True, content="newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "weights").read_text() == "newer"


def test_an_output_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputTaken, match="has appeared"), work_folder(out, "convert") as work:
        made = ours(work.folder(RESULT))
        out.mkdir()
        (out / "mine").write_text("mine")
        work.publish(made, overwrite=False)
    assert (out / "mine").read_text() == "mine" and (made / "weights").exists(), "neither is lost"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_is_swapped_out_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    """The user puts a file into OUT between the check and the exchange: both names are swapped back."""
    out = ours(tmp_path / "out", "old")

    def late(one: Path, other: Path) -> bool:
        monkeypatch.undo()
        if can_exchange:
            (out / "mine").write_text("mine")
        return can_exchange and exchange(one, other)

    monkeypatch.setattr(room, "exchange", late)
    if can_exchange:
        with pytest.raises(OutputTaken, match="holds mine"):
            publish(out, overwrite=True)
        assert (out / "mine").read_text() == "mine" and (out / "weights").read_text() == "old"
    else:
        publish(out, overwrite=True)
        assert (out / "weights").read_text() == "new" and not (tmp_path / "out.upfit-work").exists()


@pytest.mark.parametrize("addition", ["notes.txt", ".git/config", "deep/er/x", "tokenizer_mine.json"])
def test_a_file_of_the_users_in_our_output_keeps_it(tmp_path: Path, addition: str) -> None:
    out = ours(tmp_path / "out")
    path = out / addition
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UpfitError, match=f"holds {addition}, which Upfit did not write"):
        check_output(out, [], 0, overwrite=True)


@pytest.mark.parametrize(
    "recipe", ['{"pancakes": 3}', "[]", "not json", '{"format": 1, "steps": []}', '{"format": 1, "steps": [{"verb": "x"}]}']
)
def test_a_file_named_recipe_is_no_mark(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text(recipe)
    with pytest.raises(UpfitError, match="Upfit did not write it"):
        check_output(tmp_path / "out", [], 0, overwrite=True)


def test_a_step_more_does_not_make_foreign_files_ours(tmp_path: Path) -> None:
    out = ours(tmp_path / "out")
    (out / "mine").write_text("mine")
    provenance.append(out, STEP)
    assert provenance.files(out) == ["recipe.json", "weights"] and len(provenance.read(out)) == 2


def test_one_lock_an_output(tmp_path: Path) -> None:
    with (
        work_folder(tmp_path / "out", "convert"),
        pytest.raises(UpfitError, match="another process"),
        work_folder(tmp_path / "out", "uptrain"),
    ):
        pass
    with work_folder(tmp_path / "out", "synth", shared=True), work_folder(tmp_path / "out", "synth", shared=True):
        pass


def racer(out: Path, number: int, ready: Barrier) -> None:
    ready.wait()
    try:
        publish(out, content=str(number))
    except UpfitError:
        os._exit(1)
    os._exit(0)


def test_of_racers_one_wins(tmp_path: Path) -> None:
    """Many processes at one OUT at the same time: the output is that of one that ended well, and no work is left."""
    context = multiprocessing.get_context("fork")
    for round in range(8):
        out, ready = tmp_path / str(round) / "out", context.Barrier(4)
        processes = [context.Process(target=racer, args=(out, number, ready)) for number in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        winners = [str(number) for number, process in enumerate(processes) if process.exitcode == 0]
        assert len(winners) == 1 and (out / "weights").read_text() == winners[0]
        leftovers = {path.name for path in out.parent.iterdir()} - {"out", "out.upfit-work"}
        assert not leftovers


def test_work_is_kept_when_it_is_interrupted_and_removed_after_an_error(tmp_path: Path) -> None:
    work_path = tmp_path / "out.upfit-work"
    for error, kept in ((KeyboardInterrupt(), True), (Interrupted("x"), True), (UpfitError("x"), False), (OSError("x"), True)):
        with pytest.raises(type(error)) as raised, work_folder(tmp_path / "out", "convert") as work:
            work.folder("fit")
            raise error
        assert work_path.exists() == kept
        notes = getattr(raised.value, "__notes__", [])
        assert bool(notes) == isinstance(error, KeyboardInterrupt), "Ctrl-C tells what is kept"
        if kept:
            publish(tmp_path / "out")
            remove_tree(tmp_path / "out")


def test_another_verbs_work_is_not_thrown_away_unasked(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", "uptrain") as work:
        work.folder("step-00000004")
    with pytest.raises(UpfitError, match="unfinished work of upfit uptrain"):
        publish(tmp_path / "out")
    assert (tmp_path / "out.upfit-work" / "step-00000004").is_dir()
    publish(tmp_path / "out", overwrite=True)


def test_a_refused_command_leaves_other_work_as_it_is(tmp_path: Path) -> None:
    def begin(settings: int, restart: bool = False) -> bool:
        with work_folder(tmp_path / "out", "prepare") as work:
            known = work.claim({"tokens": settings}, restart)
            work.folder("shards")
            return known

    assert not begin(1) and begin(1)
    with pytest.raises(UpfitError, match="other settings"):
        begin(2)
    assert begin(1) and not begin(2, restart=True)


def test_a_file_that_was_being_written_when_the_process_died_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with work_folder(tmp_path / "out", "prepare") as work:
        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            killed.setattr(Path, "unlink", lambda *_, **__: None)
            write_whole(work.path / "state.json", "{}")
        assert len(work.entries()) == 1 and not work.begun()
        work.publish(ours(work.folder(RESULT)), False)
    assert not work.path.exists()


def test_the_users_files_in_a_work_folder_stay(tmp_path: Path) -> None:
    with work_folder(tmp_path / "out", "convert") as work:
        (work.path / "diary.txt").write_text("mine")
        work.publish(ours(work.folder(RESULT)), False)
    assert {path.name for path in work.path.iterdir()} == {"diary.txt", MARK, LOCK}


@pytest.mark.parametrize("stands", [True, False])
def test_killed_in_the_middle_of_replacing(tmp_path: Path, stands: bool) -> None:
    """The old output lies in the work folder: it comes back where nothing stands, and goes where the new one does."""
    out = tmp_path / "out"
    with work_folder(out, "convert") as work:
        ours(work.path / REPLACED, "old")
    if stands:
        ours(out, "new")
    with work_folder(out, "convert"):
        assert (out / "weights").read_text() == ("new" if stands else "old")
        assert not (work.path / REPLACED).exists()


def test_what_was_replaced_and_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    out = ours(tmp_path / "out", "new")
    with work_folder(out, "convert") as work:
        (work.path / REPLACED).mkdir()
        (work.path / REPLACED / "mine").write_text("mine")
    with pytest.raises(UpfitError, match="did not write"), work_folder(out, "convert"):
        pass
    assert (work.path / REPLACED / "mine").read_text() == "mine"


def test_a_rename_replaces_nothing(tmp_path: Path) -> None:
    for kind in ("file", "folder"):
        old, new = tmp_path / f"{kind}-old", tmp_path / f"{kind}-new"
        for path in (old, new):
            if kind == "folder":
                path.mkdir()
            else:
                path.write_text(path.name)
        for over_empty in (False, True) if kind == "file" else (False,):
            with pytest.raises(FileExistsError):
                rename_new(old, new, over_empty)
        if kind == "folder":
            (new / "x").write_text("mine")
        with pytest.raises(FileExistsError):
            rename_new(old, new, over_empty=True)
    assert (tmp_path / "file-new").read_text() == "file-new" and (tmp_path / "folder-new" / "x").exists()


def test_renaming_without_the_systems_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_renameat2", lambda *_: False)
    test_a_rename_replaces_nothing(tmp_path)
    (tmp_path / "a").write_text("a")
    rename_new(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a" and not (tmp_path / "a").exists()


def test_removing_follows_no_link_and_crosses_no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("mine")
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and (tmp_path / "elsewhere" / "mine").exists()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"36 35 98:0 / {str(tmp_path / 'a b' / 'in').replace(' ', chr(92) + '040')} rw - ext3 /dev/root rw\n")
    monkeypatch.setattr(durable, "MOUNTS", mounts)
    (tmp_path / "a b" / "in").mkdir(parents=True)
    assert mount_below(tmp_path / "a b") == tmp_path / "a b" / "in" and mount_below(tmp_path / "elsewhere") is None
    with pytest.raises(UpfitError, match="mount point"):
        remove_tree(tmp_path / "a b")
    assert (tmp_path / "a b" / "in").is_dir()


def test_a_file_is_written_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "settings.json"
    write_whole(path, "old")
    os.chmod(path, 0o640)

    def full(descriptor: int) -> None:
        raise OSError("full")

    with monkeypatch.context() as broken, pytest.raises(OSError, match="full"):
        broken.setattr(os, "fsync", full)
        write_whole(path, "new")
    assert path.read_text() == "old" and names_below(tmp_path) == ["settings.json"]
    write_whole(path, b"new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_gets_the_rights_of_a_new_one(tmp_path: Path, mask: int) -> None:
    """The mask that says them is the whole process's: a thread that writes meanwhile must not see another one."""
    before = os.umask(mask)
    try:
        path = tmp_path / "weights"
        path.touch()
        path.chmod(0o640)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
            as_new_file(path)
        assert path.stat().st_mode & 0o7777 == 0o666 & ~mask and names_below(tmp_path) == ["weights"]
    finally:
        os.umask(before)


@pytest.mark.parametrize("how", ["same", "inside", "around", "by a link", "in the work folder"])
def test_source_and_output_are_compared_as_files(tmp_path: Path, how: str) -> None:
    source, out = tmp_path / "a" / "source", tmp_path / "out"
    if how == "in the work folder":
        source = tmp_path / "out.upfit-work" / "stage-1-layerwise"
    source.mkdir(parents=True)
    if how == "same":
        out = source
    elif how == "inside":
        out = source / "x" / "out"
    elif how == "around":
        out = tmp_path / "a"
    elif how == "by a link":
        (tmp_path / "b").symlink_to(tmp_path / "a")
        out = tmp_path / "b" / "source" / "out"
    with pytest.raises(UpfitError, match="overlaps the source|lies where the work"):
        check_output(out, [source], 0, overwrite=True)
    check_output(tmp_path / "elsewhere", [source], 0, overwrite=True)


def test_a_name_that_is_too_long_and_a_link_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(UpfitError, match="too long"):
        check_output(tmp_path / ("x" * 250), [], 0, False)
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(UpfitError, match="a link to nothing"):
        check_output(tmp_path / "out", [], 0, False)


def test_every_file_and_folder_of_a_tree_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that only the folder's pages in memory know of is gone after a power cut."""
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "file").touch()
    synced: set[Path] = set()
    monkeypatch.setattr(durable, "sync_path", synced.add)
    durable.sync_tree(tmp_path / "tree")
    assert synced == {tmp_path / "tree", tmp_path / "tree" / "inner", tmp_path / "tree" / "inner" / "file"}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_locks_are_files_that_the_mask_allows_and_no_programs(tmp_path: Path, mask: int) -> None:
    """Who shares the folder can open them, as all that this user makes."""
    before = os.umask(mask)
    try:
        with work_folder(tmp_path / "out", "convert") as work, room.locked(work.path / "part.lock", "the part"):
            modes = {name: (work.path / name).stat().st_mode & 0o7777 for name in (LOCK, "part.lock")}
        write_whole(tmp_path / "whole", "x")
    finally:
        os.umask(before)
    modes["whole"] = (tmp_path / "whole").stat().st_mode & 0o7777
    assert set(modes.values()) == {0o666 & ~mask}, modes
