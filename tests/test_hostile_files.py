"""Files that somebody has broken on purpose: each reader says which one it was, and goes on without it."""

import ast
import base64
import gzip
import io
import json
import os
import pickle
import random
import resource
import signal
import tarfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from configs_at_hand import CONFIGS, entry, problem, write

from bench import commands, records
from bench.evidence import packed, record
from triton_conv import cli, files, plan, stored
from triton_conv.config import BoxConfig
from triton_conv.devices import H200
from triton_conv.tuning import commands_configs, sweep
from triton_conv.tuning.store import Store

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CONV_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(stored, "shipped_directory", lambda: tmp_path / "shipped")
    stored.forget()
    yield tmp_path
    stored.forget()


@contextmanager
def bounded(seconds=5, memory=400 * 2**20):
    """Ends a test that takes longer, or more memory at its worst than before."""

    def late(*_):
        raise TimeoutError(f"it took more than {seconds} s")

    before, old = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < memory


def config_text():
    return stored.dumps("NVIDIA H200", "box", [entry([(c, 1e-3) for c in CONFIGS[:2]], baseline={"cudnn": 1e-3})])


def run_text(folder):
    row = records.Row("s", "l", "fprop", "call", "bfloat16", True, 1, 10, 10, 1e-6, "", 1e-6, "box", "", 0, "")
    run = records.Run("NVIDIA H200", "predicted", "2026-01-01T00:00:00", "c0ffee", "bench", rows=(row,))
    records.write(run, folder / "valid.json")
    return (folder / "valid.json").read_text()


def evidence_text(folder):
    found = record.begin("c0ffee", simulated=True)
    found.stages["a"] = {"one": {"ok": True, "words": "well", "seconds": 1.0}}
    record.write(found, folder)
    return (folder / record.FILE).read_text()


def packed_bytes(folder):
    store = Store(folder / "to pack")
    store.add("NVIDIA H200", "box", entry([(CONFIGS[0], 1e-3)]))
    packed.pack(folder / "to pack", folder / "valid.tgz")
    return (folder / "valid.tgz").read_bytes()


# Each reader: a valid file, where it lies, and what reads it: it raises ValueError naming the file.
READERS = {
    "configs": (lambda folder: config_text().encode(), "box.json", stored.load),
    "a run": (lambda folder: run_text(folder).encode(), "bench.json", records.read),
    "an evidence run": (lambda folder: evidence_text(folder).encode(), record.FILE, lambda p: record.read(p.parent)),
    "a packed store": (packed_bytes, "store.tgz", lambda p: packed.unpack(p, p.parent / "new")),
}

HOSTILE = {
    "empty": b"",
    "nothing but zeros": bytes(100_000),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"format": 1}'.encode("utf-16"),
    "no UTF-8": b'{"format": 1, "device": "\xff\xfe"}',
    "nested deep": b"[" * 1_000_000,
    "objects nested deep": b'{"a":' * 500_000,
    "NaN": b'{"format": NaN}',
    "infinite": b'{"format": Infinity, "schema": -Infinity}',
    "a number of many digits": b'{"format": ' + b"9" * 100_000 + b"}",
    "a large exponent": b'{"format": 1e999999999, "schema": 1e999999999}',
    "half a character": b'{"format": "\\ud800", "schema": "\\ud800"}',
    "code": b"__import__('os').system('true')",
    "a pickle": pickle.dumps({"format": 1}),
    "YAML": b"!!python/object/apply:os.system ['true']",
    "a list": b"[1]",
    "a word": b'"format"',
    "names twice": b'{"format": 1, "format": 1, "schema": 1, "schema": 1}',
    "a terminal's commands": b'{"schema": 1, "format": 1, "\\u001b[2J\\u0007": 1, "kernel": "\\u001b[2J"}',
    "lists without end": b"[" + b"[]," * 3_000_000 + b"[]]",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_such_file_is_named(reader, name, tmp_path):
    _, file, read = READERS[reader]
    path = tmp_path / file
    path.write_bytes(HOSTILE[name])
    with bounded(), pytest.raises(ValueError, match=file) as caught:
        read(path)
    told(caught.value, path)


def told(error, path):
    """The message names the file, is short, and commands no terminal."""
    words = str(error)
    assert str(path) in words
    assert len(words) < 2 * len(str(path)) + 400
    assert words.isprintable(), words
    words.encode()


def odd_file(kind, path, most):
    if kind == "a directory":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a loop":
        path.symlink_to(path)
    else:
        with open(path, "wb") as file:
            file.truncate(most + 1)  # of which the disk holds nothing


@pytest.mark.parametrize("kind", ["a directory", "a pipe", "a device", "a loop", "huge"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_not_waited_for(reader, kind, tmp_path):
    _, file, read = READERS[reader]
    odd_file(kind, tmp_path / file, 2**35)
    with bounded(), pytest.raises((ValueError, OSError)) as caught:
        read(tmp_path / file)
    assert file in str(caught.value) or file in str(caught.value.filename)


def mutated(content, rng):
    """A file with some of it cut, flipped, doubled or of another type."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(max(len(content), 1))
        how = rng.randrange(5)
        if how == 0:
            del content[at:]
        elif how == 1 and content:
            content[min(at, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif how == 2:
            del content[at : at + rng.randrange(40)]
        elif how == 3:
            content[at:at] = content[max(at - rng.randrange(60), 0) : at]
        else:
            tokens = [b"null", b"true", b"-1", b"1e400", b"[]", b"{}", b'"\\u0000"', b"9" * 5000, b"0.5", b'"../x"']
            content[at : at + rng.randrange(6)] = rng.choice(tokens)
    return bytes(content)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_with_a_few_other_bytes_is_right_or_named(reader, tmp_path):
    make, file, read = READERS[reader]
    content, path, rng, refused = make(tmp_path), tmp_path / file, random.Random(9), 0
    path.write_bytes(content)
    read(path)
    with bounded(20):
        for _ in range(400):
            path.write_bytes(mutated(content, rng))
            try:
                read(path)
            except ValueError as error:
                told(error, path)
                refused += 1
    assert refused > 200


def leaves(value, path=()):
    """The places in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in pairs:
        yield from leaves(item, (*path, name))


STRANGE = (None, True, -1, 0.5, 10**400, "", "\x1b[2J", "a" * 100_000, [], [[]], {}, {"a": 1}, "../../etc/passwd")


@pytest.mark.parametrize("reader", ["configs", "a run", "an evidence run"])
def test_a_value_of_any_other_type_anywhere_is_right_or_named(reader, tmp_path):
    make, file, read = READERS[reader]
    valid, path = json.loads(make(tmp_path)), tmp_path / file
    with bounded(20):
        for where in leaves(valid):
            for strange in STRANGE:
                content = {"": json.loads(json.dumps(valid))}
                of = content
                for name in ("", *where)[:-1]:
                    of = of[name]
                of[("", *where)[-1]] = strange
                path.write_text(json.dumps(content[""]))
                try:
                    read(path)
                except ValueError as error:
                    told(error, path)


@pytest.mark.parametrize("name", HOSTILE)
def test_calls_go_on_with_one_warning(name, places):
    with stored.hidden():
        rule = plan.make(problem()).config
    path = write(places / "user", "")
    path.write_bytes(HOSTILE[name])
    stored.forget()
    with warnings.catch_warnings(record=True) as caught, bounded():
        warnings.simplefilter("always")
        assert [plan.make(problem(n)).config for n in (32, 32)] == [rule, rule]
    (message,) = [str(w.message) for w in caught]
    assert message.startswith(f"configs are ignored: {path}: ")


# ---------------------------------------------------------------------------------------------------------------------
# Configs that are written as they should be, and absurd

ABSURD = {
    "huge blocks": BoxConfig((1, 1, 256, 256), 16, 16),
    "no room": BoxConfig((1, 1, 16, 16), 256, 256, num_stages=16),
    "a thread for everything": BoxConfig((1, 1, 16, 16), 256, 64, num_warps=1, num_stages=2),
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_config_is_not_tried(name, places):
    with stored.hidden():
        rule = plan.make(problem()).config
    write(places / "user", [entry([(ABSURD[name], 1e-9)])])
    p = plan.make(problem())
    assert p.config == rule
    assert "beyond what can run" in p.reason


def test_a_workspace_of_terabytes_is_not_tried(places):
    weights = problem(title="weight gradient")
    with stored.hidden():
        rule = plan.make(weights)
    key, extents = stored.keys.of(rule.layout.geometry, rule.role, "bfloat16", "bfloat16", "ieee", True)
    many = BoxConfig((1, 1, 1, 16), 64, 64, splits=2**16)
    stamp = {"kernel": stored.keys.source_hash(rule.kernel)}
    write(
        places / "user",
        [stored.Entry(key, extents, "measured", stamp, (stored.Candidate(many, 1e-9),), {})],
        kernel=rule.kernel,
    )
    assert plan.make(weights).config == rule.config


@pytest.mark.parametrize(
    ("kernel", "config"),
    [
        ("gather", {"BLOCK_M": 65536, "BLOCK_N": 65536, "BLOCK_K": 16}),
        ("gather", {"BLOCK_M": 1024, "BLOCK_N": 1024, "BLOCK_K": 1024, "dot": False}),
        ("box", {"box": [256, 256, 256, 256], "BLOCK_N": 16, "BLOCK_K": 16}),
        ("banded", {"blocks": [65536, 65536, 1], "height": 1, "columns": 16, "chunk": 16}),
        (
            "depthwise",
            {"rows": 1, "columns": 65536, "lanes": 65536, "channels": 1, "vector": 1, "unroll": [1, 1]},
        ),
    ],
)
def test_tiles_that_triton_cannot_have_are_malformed(kernel, config):
    content = json.loads(config_text()) | {"kernel": kernel}
    content["entries"][0]["candidates"] = [{"config": config, "seconds": 1.0}]
    with pytest.raises(stored.MalformedError, match=f"a config of {kernel} is beyond what compiles"):
        stored.loads(json.dumps(content), "a file")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def linked(places, name):
    """The path of a file of configs, and what a link of that name beside it points to."""
    victim = places / "victim"
    victim.write_text("precious")
    path = stored.path_of(places / "user", H200.name, "box")
    path.parent.mkdir(parents=True)
    path.with_name(name).symlink_to(victim)
    return path, victim


def test_nothing_is_written_through_a_link(places):
    """Of a directory that others may write to: what lies under the names that are written next is never opened."""
    path, victim = linked(places, "box.json.new")
    Store(places / "user").add(H200.name, "box", entry([(CONFIGS[0], 1e-3)]))
    assert victim.read_text() == "precious"
    assert not path.is_symlink()
    assert len(stored.load(path)[2]) == 1


def test_a_lock_that_is_a_link_is_not_followed(places):
    _, victim = linked(places, "box.json.lock")
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        Store(places / "user").add(H200.name, "box", entry([(CONFIGS[0], 1e-3)]))
    assert victim.read_text() == "precious"


def test_a_name_that_looks_like_another_device_takes_nothing_from_it(places, capsys):
    """What is merged from a stranger's file is filed beside what the user has measured, or not at all."""
    Store(places / "user").add("NVIDIA H200", "box", entry([(CONFIGS[0], 1e-3)]))
    path = stored.path_of(places / "user", "NVIDIA H200", "box")
    before = path.read_bytes()
    given = places / "given.json"
    given.write_text(stored.dumps("NVIDIA/../H200", "box", [entry([(CONFIGS[1], 1e-3)])]).replace("/../", "_"))
    with pytest.warns(UserWarning, match=r"is of 'NVIDIA H200', not 'NVIDIA_H200'"):
        assert commands_configs.merge(SimpleNamespace(paths=[given])) == 1
    try:
        assert path.read_bytes() == before
        assert sorted(p.name for p in path.parent.iterdir()) == ["box.json", "box.json.lock"]
    finally:
        stored.hold(places / "user", "NVIDIA_H200", "box", [])


def test_a_store_does_not_grow_past_what_is_read(places, monkeypatch):
    store = Store(places / "user")
    store.add(H200.name, "box", entry([(CONFIGS[0], 1e-3)]))
    path = stored.path_of(places / "user", H200.name, "box")
    before = path.read_bytes()
    monkeypatch.setattr(stored, "MOST_BYTES", len(before) + 10)
    with pytest.warns(UserWarning, match="configs stay in memory, for this process only: .* would have more than"):
        store.add(H200.name, "box", entry([(CONFIGS[1], 1e-3)]))
    assert path.read_bytes() == before
    assert store.unsaved(H200.name, "box") == 1
    stored.hold(places / "user", H200.name, "box", [])


# ---------------------------------------------------------------------------------------------------------------------
# Archives


def archive(*members):
    """A packed file of (name, kind, content)."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as file:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            file.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("name", ["../../evil.json", "/tmp/evil.json", "NVIDIA_H200/box.json", "a\nb", "x" * 5000])
def test_an_archive_chooses_no_path(name, tmp_path):
    path, place = tmp_path / "store.tgz", tmp_path / "in" / "place"
    place.mkdir(parents=True)
    path.write_bytes(archive((name, tarfile.REGTYPE, config_text().encode())))
    assert packed.unpack(path, place) == 1
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.json"))] == ["in/place/NVIDIA_H200/box.json"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_an_archive_of_other_than_files_is_refused_whole(kind, tmp_path):
    path = tmp_path / "store.tgz"
    path.write_bytes(archive(("a", tarfile.REGTYPE, config_text().encode()), ("b", kind, b"")))
    with pytest.raises(ValueError, match=r"store\.tgz: is no packed store"):
        packed.unpack(path, tmp_path / "place")
    assert not (tmp_path / "place").exists()


def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MOST_UNPACKED", 2**20)
    path = tmp_path / "store.tgz"
    path.write_bytes(gzip.compress(bytes(2**25)))
    with bounded(), pytest.raises(ValueError, match="has more than 1048576 bytes"):
        packed.unpack(path, tmp_path / "place")


# ---------------------------------------------------------------------------------------------------------------------
# Terminals, and ranks


def test_no_name_of_a_file_commands_a_terminal(places, capsys):
    evil = "\x1b]0;evil\x07\x1b[2J"
    stranger = entry([(CONFIGS[0], 1e-3)])
    stranger = stored.Entry(
        stranger.key._replace(dtype=evil, out_dtype=evil, precision=evil),
        stranger.extents,
        stranger.source,
        {**stranger.stamp, evil: evil},
        stranger.candidates,
        {evil: 1.0},
    )
    one, other = places / "one.json", places / "other.json"
    one.write_text(stored.dumps(evil, "box", [stranger]))
    other.write_text(stored.dumps("NVIDIA H200", "box", [entry([(CONFIGS[1], 1e-3)])]))
    for words in (["diff", str(one), str(other)], ["merge", str(one)], ["show"]):
        cli.main(["configs", *words])
    run = json.loads(run_text(places))
    for number, source in enumerate(("predicted", "simulated", "measured", evil)):
        run["source"], run["device"], run["versions"] = source, evil, {evil: evil}
        run["rows"][0] |= {"suite": evil, "layer": evil, "measured": {evil: {"seconds": 1.0}}}
        (places / f"{number}.json").write_text(json.dumps(run))
        for against in (places / "valid.json", places / f"{number}.json"):
            cli.main(["bench", "--compare", str(against), str(places / f"{number}.json")])
    printed = "".join(capsys.readouterr())
    assert "evil" in printed
    assert not [c for c in printed if not c.isprintable() and c != "\n"]
    assert commands.NOTHING


@pytest.mark.parametrize(
    "call", [os.system, eval, tarfile.open, Path, base64.b64decode], ids=lambda call: call.__name__
)
def test_a_ranks_result_calls_nothing(call):
    class Evil:
        def __reduce__(self):
            return call, ("true",)

    with pytest.raises(pickle.UnpicklingError, match="a rank's result has"):
        sweep._read(base64.b64encode(pickle.dumps(Evil())).decode())


# ---------------------------------------------------------------------------------------------------------------------
# What no module does

NETWORK = {"socket", "urllib", "http", "requests", "ftplib", "smtplib", "ssl", "asyncio", "socketserver", "xmlrpc"}
EVALUATED = {"eval", "exec", "compile", "__import__"}
# The name of this machine tells ranks which of them share a directory; results go between ranks by torch.distributed.
EXCEPTIONS = {("triton_conv/tuning/sweep.py", "socket"), ("triton_conv/tuning/sweep.py", "pickle")}


def uses(path):
    """(what, line) of imports that reach a network or evaluate, of calls that evaluate, of shells."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.split(".")[0] in NETWORK | {"pickle", "marshal", "shelve", "yaml", "dill", "cloudpickle"}:
                yield name.split(".")[0], node.lineno
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in EVALUATED:
                yield function.id, node.lineno
            if isinstance(function, ast.Attribute):
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                if (owner, function.attr) in {
                    ("os", "system"),
                    ("os", "popen"),
                    ("torch", "load"),
                    ("tempfile", "mktemp"),
                }:
                    yield f"{owner}.{function.attr}", node.lineno
            if any(k.arg == "shell" for k in node.keywords):
                yield "shell", node.lineno


def test_no_module_reaches_a_network_evaluates_or_starts_a_shell():
    found = set()
    for path in sorted([*(ROOT / "triton_conv").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]):
        found |= {(path.relative_to(ROOT).as_posix(), what) for what, _ in uses(path)}
    assert found == EXCEPTIONS


def test_the_parser_sees_what_it_looks_for(tmp_path):
    source = "import urllib.request\nfrom pickle import loads\neval('1')\nos.system('')\nrun('', shell=True)\n"
    (tmp_path / "a.py").write_text(source + "torch.load('x')\n")
    assert [what for what, _ in uses(tmp_path / "a.py")] == [
        "urllib",
        "pickle",
        "eval",
        "os.system",
        "shell",
        "torch.load",
    ]


@pytest.mark.parametrize("size", [0, 5, 6])
def test_a_file_of_as_many_bytes_as_it_may_have(size, tmp_path):
    (tmp_path / "a").write_bytes(bytes(size))
    if size <= 5:
        assert files.read_bytes(tmp_path / "a", 5) == bytes(size)
    else:
        with pytest.raises(files.TooLongError, match="has more than 5 bytes"):
            files.read_bytes(tmp_path / "a", 5)
