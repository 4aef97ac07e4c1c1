"""Images are found in a stable order wherever they lie, and what can't be read is said to be so, never lost."""

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from PIL import Image

from mvmr.data.image_bytes import LIMITS, Limits, Rejected
from mvmr.data.listing import open_source
from mvmr.data.readable import Item
from mvmr.errors import MvmrError


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (value % 256, value // 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    return root


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def paths(images: str, start: int = 0) -> list[str]:
    return [item.path for item in open_source(images).items(start)]


def contents(items: Iterator[Item]) -> list[bytes | str]:
    return [content if isinstance(content, bytes) else content.code for content in (item.read() for item in items)]


def refusal(images: str) -> str:
    with pytest.raises(MvmrError) as caught:
        list(open_source(images).items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_its_images_at_any_depth_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    tree(tmp_path, ["b/2.png", "a.png", "b/10.JPG", "b/c/x.webp", ".hidden.png", "Z.png", "notes.txt", "b.png"])
    source = open_source(str(tmp_path))
    wanted = ["Z.png", "a.png", "b.png", "b/10.JPG", "b/2.png", "b/c/x.webp"]
    assert [item.path for item in source.items()] == [str(tmp_path / name) for name in wanted]
    assert (source.total, source.unit, source.distant) == (6, "img", False)
    assert contents(source.items(3)) == [(tmp_path / name).read_bytes() for name in wanted[3:]]
    assert [item.done for item in source.items(3)] == [4, 5, 6]


def test_images_of_other_formats_are_counted_and_said(tmp_path: Path) -> None:
    tree(tmp_path, ["a.png", "b.ppm", "c/d.PSD", "notes.txt"])
    fsspec.filesystem("memory").pipe({"/formats/a.png": png(0), "/formats/b.ppm": b"", "/formats/c/d.PSD": b""})
    wider = Limits(formats=(*LIMITS.formats, "PPM"))
    for images in (str(tmp_path), f"{tmp_path}/**/*", "memory://formats"):
        assert (open_source(images).total, open_source(images).other_formats) == (1, 2)
        assert (open_source(images, wider).total, open_source(images, wider).other_formats) == (2, 1)
    hint = "images of other formats are passed over: 1; --format adds formats"
    assert refusal(str(tmp_path / "c")) == f"no images in {tmp_path}/c: {hint}"
    assert refusal(f"{tmp_path}/*.ppm") == f"no image file matches {tmp_path}/*.ppm; {hint}"
    assert refusal("memory://formats/c") == f"no images at memory://formats/c: {hint}"


def test_a_trailing_slash_or_dot_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "photos", ["a.png"])
    monkeypatch.chdir(tmp_path)
    assert paths("photos") == paths("./photos/") == ["photos/a.png"]
    assert open_source("photos").fingerprint == open_source("./photos/").fingerprint


def test_names_that_are_no_text_stay_one_line(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"a\xff\n.png")).write_bytes(png(1))
    (path,) = paths(str(tmp_path))
    assert path.endswith("a\\xff\\n.png")
    assert contents(open_source(str(tmp_path)).items()) == [png(1)]


def test_a_glob_gives_image_files_alone(tmp_path: Path) -> None:
    tree(tmp_path, ["a/1.png", "a/b/2.png", "a/b/3.jpg", "a/b/4.txt"])
    (tmp_path / "folder.png").mkdir()
    assert paths(f"{tmp_path}/**/*.png") == [f"{tmp_path}/a/1.png", f"{tmp_path}/a/b/2.png"]
    assert paths(f"{tmp_path}/a/b/*") == [f"{tmp_path}/a/b/2.png", f"{tmp_path}/a/b/3.jpg"]
    assert paths(f"{tmp_path}/a/1.png") == [f"{tmp_path}/a/1.png"]
    assert "no image file matches" in refusal(f"{tmp_path}/**/*.gif")


def test_a_list_keeps_its_order_and_is_relative_to_its_own_folder(tmp_path: Path) -> None:
    tree(tmp_path, ["in/b.png", "in/a.png", "far.png"])
    list_file = tmp_path / "in" / "some.txt"
    list_file.write_text(f"b.png\r\n\nmissing.png\na.png\n{tmp_path}/far.png\n")
    source = open_source(str(list_file))
    assert [Path(item.path).name for item in source.items()] == ["b.png", "missing.png", "a.png", "far.png"]
    assert contents(source.items()) == [png(0), "unreadable", png(1), png(2)]
    list_file.write_text("\n \n")
    assert "has no lines" in refusal(str(list_file))
    list_file.write_bytes(b"\x00\x01.png\n")
    assert "zero bytes" in refusal(str(list_file))
    list_file.write_text("a.png\ns3://bucket/b.png\n")
    assert "mixes 1 addresses with 1 paths" in refusal(str(list_file))


def test_a_list_comes_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, ["a.png", "b.png"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"b.png\na.png\n")))
    assert paths("-") == ["b.png", "a.png"]


def test_the_fingerprint_changes_with_names_sizes_and_times(tmp_path: Path) -> None:
    tree(tmp_path, ["a.png", "b.png"])
    seen = {open_source(str(tmp_path)).fingerprint}
    os.utime(tmp_path / "a.png", ns=(1, 1))
    seen.add(open_source(str(tmp_path)).fingerprint)
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    seen.add(open_source(str(tmp_path)).fingerprint)
    (tmp_path / "b.png").unlink()
    seen.add(open_source(str(tmp_path)).fingerprint)
    assert len(seen) == 4
    assert open_source(str(tmp_path)).fingerprint in seen


def test_pieces_make_up_the_whole_in_order(tmp_path: Path) -> None:
    tree(tmp_path, [f"{number:02}.png" for number in range(11)])
    source = open_source(str(tmp_path))
    pieces = [list(source.share(number, 4).items()) for number in range(4)]
    assert [len(piece) for piece in pieces] == [2, 3, 3, 3]
    assert [item.path for piece in pieces for item in piece] == [item.path for item in source.items()]
    assert [item.path for item in source.share(1, 4).items(1)] == [item.path for item in pieces[1][1:]]
    with pytest.raises(MvmrError, match="has 11 images, too few for 12 pieces"):
        source.share(0, 12)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_cannot_be_listed_is_no_silent_loss(tmp_path: Path) -> None:
    tree(tmp_path, ["a.png", "shut/b.png"])
    (tmp_path / "shut").chmod(0)
    source = open_source(str(tmp_path))
    (tmp_path / "shut").chmod(0o700)
    assert contents(source.items()) == [png(0), "unreadable"]


def test_nothing_there_is_one_line_that_says_what_to_give(tmp_path: Path) -> None:
    assert "none does not exist; give a folder of images or a quoted glob" in refusal(str(tmp_path / "none"))
    assert "it is empty" in refusal(str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert "none of its 1 files ends as an image does" in refusal(str(tmp_path))
    assert "no tar file" in refusal(f"shards:{tmp_path}/x-{{00..03}}.tar")
    assert "no tar file matches" in refusal(f"{tmp_path}/*.tar")
    assert "is no range" in refusal(f"shards:{tmp_path}/x-{{3..1}}.tar")


@pytest.mark.parametrize(("ending", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_tar_files_give_their_images_in_order(tmp_path: Path, ending: str, mode: str) -> None:
    members = [{f"{shard}/{number}.png": png(10 * shard + number) for number in range(3)} for shard in range(3)]
    for shard in (2, 0, 1):
        sidecars = {f"{shard}/0.json": b"{}", f"{shard}/._0.png": b"resource fork"}
        tar(tmp_path / f"s-{shard:03}{ending}", {**sidecars, **members[shard]}, mode)
    source = open_source(f"shards:{tmp_path}/s-{{000..002}}{ending}")
    wanted = [f"{tmp_path}/s-{shard:03}{ending}/{name}" for shard in range(3) for name in members[shard]]
    assert [item.path for item in source.items()] == wanted == paths(f"{tmp_path}/s-*{ending}")
    assert contents(source.items()) == [content for files in members for content in files.values()]
    for start in range(10):
        assert [item.path for item in source.items(start)] == wanted[start:]
    assert (source.unit, source.total) == ("MB", 1)
    pieces = [[item.path for item in source.share(number, 2).items()] for number in range(2)]
    assert pieces == [wanted[:3], wanted[3:]]
    with pytest.raises(MvmrError, match="has 3 tar files, too few for 4 pieces"):
        source.share(0, 4)


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_damaged_tar_file_says_so_once_and_numbers_stay(tmp_path: Path, ending: str) -> None:
    mode = "w:gz" if ending.endswith("gz") else "w"
    noise = {f"{number}.png": os.urandom(3000) for number in range(6)}
    good = tar(tmp_path / f"b{ending}", {"z.png": png(1)}, mode)
    content = tar(tmp_path / "whole", noise, mode).read_bytes()
    cuts = range(600, len(content) - 600, 500) if mode == "w:gz" else range(512, 6 * 3584 + 512, 512)
    for cut in cuts:
        (tmp_path / f"a{ending}").write_bytes(content[:cut])
        source = open_source(f"{tmp_path}/?{ending}")
        every = list(source.items())
        assert [item.path for item in every[-2:]] == [f"{tmp_path}/a{ending}", f"{good}/z.png"]
        damage = every[-2].read()
        assert isinstance(damage, Rejected)
        assert damage.code == "damaged-tar"
        assert contents(iter(every[:-2])) == list(noise.values())[: len(every) - 2]
        for start in range(len(every) + 1):
            assert [item.path for item in source.items(start)] == [item.path for item in every[start:]]


def test_a_broken_header_in_the_middle_of_a_tar_file_is_damage(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {f"{number}.png": os.urandom(400) for number in range(3)})
    content = bytearray(path.read_bytes())
    content[1024:1030] = b"\xff" * 6
    path.write_bytes(content)
    assert contents(open_source(str(path)).items())[1:] == ["damaged-tar"]
    path.write_bytes(b"no tar file at all")
    assert contents(open_source(str(path)).items()) == ["damaged-tar"]


def test_links_inside_a_tar_file_are_no_silent_loss(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert contents(open_source(str(tmp_path / "a.tar")).items()) == ["unreadable"]


def test_any_file_system_of_fsspec_is_read(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("/one/b.png", "/one/a/c.jpg", "/one/notes.txt", "/one/a.png"):
        fs.pipe_file(name, name.encode())
    source = open_source("memory://one")
    assert [item.path for item in source.items()] == [
        "memory:///one/a.png",
        "memory:///one/a/c.jpg",
        "memory:///one/b.png",
    ]
    assert contents(source.items()) == [b"/one/a.png", b"/one/a/c.jpg", b"/one/b.png"]
    assert source.distant
    assert paths("memory://one/*.png") == ["memory:///one/a.png", "memory:///one/b.png"]
    assert paths("memory://one/a.png") == ["memory:///one/a.png"]
    list_file = tmp_path / "list.txt"
    list_file.write_text("memory://one/b.png\nmemory://one/gone.png\n")
    assert contents(open_source(str(list_file)).items()) == [b"/one/b.png", "unreadable"]
    fs.pipe_file("/tars/x-0.tar", tar(tmp_path / "x.tar", {"1.png": png(1), "2.png": png(2)}).read_bytes())
    assert paths("shards:memory://tars/x-{0..0}.tar", 1) == ["memory://tars/x-0.tar/2.png"]
    assert contents(open_source("memory://tars/*.tar").items()) == [png(1), png(2)]
    assert "no images at memory://tars" in refusal("memory://tars")
    assert "Protocol not known" in refusal("nonsense://x/y")
    fs.rm("/", recursive=True)


def test_a_connection_that_fails_stops_the_job_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/one/a.png", b"a")
    (item,) = open_source("memory://one").items()
    tries = []

    def down(path: str) -> bytes:
        tries.append(path)
        raise PermissionError("the token has expired")

    monkeypatch.setattr(type(fs), "cat_file", lambda self, path: down(path))
    with pytest.raises(MvmrError, match=r"cannot read /one/a.png: .*go on with --resume"):
        item.read()
    assert len(tries) == 3
    fs.rm("/", recursive=True)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "s3fs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    registry = sys.modules["fsspec.registry"]._registry  # type: ignore[attr-defined]
    monkeypatch.delitem(registry, "s3", raising=False)
    assert "pip install 'mvmr[s3]'" in refusal("s3://bucket/prefix")


@pytest.mark.slow
def test_images_are_read_from_a_real_s3_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        for number in range(5):
            fs.pipe_file(f"bucket/photos/{number}.png", png(number))
        fs.pipe_file("bucket/tars/a.tar", tar(tmp_path / "a.tar", {"1.png": png(1)}).read_bytes())
        source = open_source("s3://bucket/photos")
        assert [item.path for item in source.items()] == [f"s3://bucket/photos/{number}.png" for number in range(5)]
        assert contents(source.items()) == [png(number) for number in range(5)]
        assert source.fingerprint == open_source("s3://bucket/photos/").fingerprint
        assert paths("s3://bucket/photos/[01].png") == ["s3://bucket/photos/0.png", "s3://bucket/photos/1.png"]
        assert contents(open_source("shards:s3://bucket/tars/*.tar").items()) == [png(1)]
        fs.pipe_file("bucket/photos/0.png", png(9))
        fs.invalidate_cache()
        assert source.fingerprint != open_source("s3://bucket/photos").fingerprint
        assert "cannot read s3://nobody/photos" in refusal("s3://nobody/photos")
    finally:
        server.stop()


# What is no image at all, or too much of one


def test_pipes_and_devices_in_a_list_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "list.txt").write_text("pipe.png\nzero.png\na.png\n")
    items = list(open_source(str(tmp_path / "list.txt")).items())
    assert contents(iter(items)) == ["unreadable", "unreadable", png(0)]
    assert "no regular file" in str(items[0].read())


def test_files_and_members_of_too_many_bytes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk, and could not be read
    assert contents(open_source(str(tmp_path)).items()) == [png(0), "too-many-bytes"]
    tar(tmp_path / "a.tgz", {"b.png": bytes(10_000), "a.png": png(0)}, "w:gz")
    most = max(2000, len(png(0)))
    assert contents(open_source(str(tmp_path / "a.tgz"), Limits(size=most)).items()) == ["too-many-bytes", png(0)]
