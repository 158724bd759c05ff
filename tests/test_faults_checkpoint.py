"""Checkpoints that were cut, altered or made to do harm: a ValueError that says so, nothing run, nothing changed."""

import copy
import functools
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import memory_limit
from small_engine import flat, private, small_model, train

from adaclip import checkpoint
from adaclip.checkpoint_archive import check_archive

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def saved():
    """(path's bytes, what they hold): a run of four steps."""
    import tempfile

    engine, model, optimizer, loader = private(optimizer=None)
    train(model, optimizer, loader)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/run.pt"
        engine.save_checkpoint(path, module=model, optimizer=optimizer, extra={"note": [1, "two", None]})
        with open(path, "rb") as file:
            return file.read(), checkpoint.load(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "run.pt"


@pytest.fixture(scope="module")
def run():
    return private()


def refused(run, path, match=None):
    """Loading raises ValueError with the file or the fault in it, in one paragraph, and changes nothing."""
    engine, model, optimizer, loader = run
    before = flat(model), loader.state_dict(), optimizer.releases, engine.accountant.ledger.events
    with pytest.raises(ValueError, match=match) as caught:
        engine.load_checkpoint(path, module=model, optimizer=optimizer)
    assert "checkpoint" in str(caught.value)
    assert torch.equal(flat(model), before[0])
    assert (loader.state_dict(), optimizer.releases, engine.accountant.ledger.events) == before[1:]
    return str(caught.value)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@settings(max_examples=60)
@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere_is_refused(run, place, share):
    data, _ = saved()
    place.write_bytes(data[: int(share * len(data))])
    refused(run, place)


@settings(max_examples=150)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_of_no_effect(place, share, bit):
    """torch.load alone takes most of them for weights."""
    data, state = saved()
    altered = bytearray(data)
    altered[int(share * len(data))] ^= 1 << bit
    place.write_bytes(altered)
    try:
        loaded = checkpoint.load(place)
    except ValueError:
        return
    assert equal(loaded, state)


@settings(max_examples=60)
@given(st.binary(max_size=400))
def test_rubbish_is_refused(run, place, data):
    place.write_bytes(data)
    refused(run, place)


def rewritten(place, change=None, *, pickled=None, **how):
    """The checkpoint as a zip archive made anew, with its state changed, or with another pickle."""
    data, _ = saved()
    if change is not None:
        place.write_bytes(data)
        state = torch.load(place, weights_only=True)
        change(state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(place, "w", **how) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if pickled is not None and entry.filename.endswith("/data.pkl"):
                content = pickled
            new.writestr(entry.filename, content)


def test_an_archive_made_anew_is_read_as_long_as_it_is_one_of_ours(place):
    rewritten(place)
    assert equal(checkpoint.load(place), saved()[1])


def test_files_of_another_kind_or_version(run, place):
    torch.save({"w": torch.zeros(3)}, place)
    refused(run, place, "is not an adaclip checkpoint")
    torch.save([1, 2], place)
    refused(run, place, "is not an adaclip checkpoint")
    rewritten(place, lambda state: state.update(version=checkpoint.VERSION + 1))
    refused(run, place, f"has version {checkpoint.VERSION + 1}; this adaclip reads {checkpoint.VERSION}")
    rewritten(place, lambda state: state.pop("version"))
    refused(run, place, "has version None")
    for name in ("module", "accountant", "budget", "run"):
        rewritten(place, lambda state, name=name: state.pop(name))
        refused(run, place, f"lacks {name}")
    place.unlink()
    refused(run, place, "does not exist")
    place.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        checkpoint.load(place)
    place.rmdir()


# --- harm ---------------------------------------------------------------------------------------------------


class Harm:
    """Unpickled by a careless reader, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_loading_executes_nothing(run, place, tmp_path, protocol):
    harm = pickle.dumps({"format": "adaclip-checkpoint", "x": Harm(tmp_path / "harmed")}, protocol)
    pickle.loads(harm)
    assert (tmp_path / "harmed").is_dir()  # it works
    (tmp_path / "harmed").rmdir()
    for data in ("archive", "bare"):
        if data == "archive":
            rewritten(place, pickled=harm)
        else:
            place.write_bytes(harm)
        refused(run, place)
        assert not (tmp_path / "harmed").exists()


def test_the_old_formats_of_torch_are_not_read(run, place, tmp_path):
    """A pickle without an archive, and a tar file: ways around the look at the archive."""
    torch.save({"x": Harm(tmp_path / "harmed")}, place, _use_new_zipfile_serialization=False)
    refused(run, place, "it is damaged")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"cbuiltins\nbytearray\n(I1000000000000\ntR.", "builtins bytearray"),
        (b"cos\nsystem\n(S'true'\ntR.", "os system"),
        (b"(S'true'\nios\nsystem\n.", "os system"),
        (b"ctorch\nload\n(S'x'\ntR.", "torch load"),
        (b"ctorch.storage\nUntypedStorage\n(I1000000000\ntR.", "torch.storage UntypedStorage"),
        (b"ctorch\nzeros\n(I1000000000000\ntR.", "torch zeros"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n(tR.", "_rebuild_sparse_tensor"),
    ],
)
def test_a_pickle_may_name_tensors_and_plain_values_alone(run, place, pickled, name):
    rewritten(place, pickled=pickled)
    assert name in refused(run, place, "neither a tensor nor a plain value")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # BYTEARRAY8 of 2^40 bytes
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.",  # BINUNICODE8
        b"\x80\x02T" + struct.pack("<I", (1 << 31) - 1) + b"x.",  # BINSTRING
        b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b".",  # a memo of 2^32 places
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02",
        b"",
    ],
)
def test_pickles_that_ask_for_memory_by_a_number_get_none(run, place, pickled):
    rewritten(place, pickled=pickled)
    with memory_limit(1 << 30):
        refused(run, place)


def test_compressed_archives_are_not_inflated(run, place):
    """A zip bomb: a few kilobytes that would become a gigabyte."""
    data, _ = saved()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        with new.open("run/data/99", "w") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
    assert place.stat().st_size < 1 << 20
    refused(run, place, "holds compressed data")


def test_entries_may_not_share_bytes(place):
    """A bomb without compression: a directory that lists the same bytes a thousand times."""
    data, _ = saved()
    place.write_bytes(data)
    with zipfile.ZipFile(place, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        for i in range(1000):
            again = zipfile.ZipInfo(f"{largest.filename}{i}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(again, name, getattr(largest, name))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    with pytest.raises(ValueError, match=r"its entries have .* bytes together"):
        check_archive(place)


def test_a_tensor_larger_than_its_bytes_is_refused(run, place):
    """The pickle says how large a storage is; the archive has 64 bytes of it."""
    torch.save({"format": "adaclip-checkpoint", "x": torch.zeros(16)}, place)
    with zipfile.ZipFile(place) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    large = b"J" + struct.pack("<I", 10**8)
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in entries.items():
            archive.writestr(
                name, content.replace(b"K\x10t", large + b"t").replace(b"K\x10\x85", large + b"\x85")
            )
    refused(run, place, "cannot be read")


# --- well-formed, but not what this run can go on from ------------------------------------------------------


def _set(*path, value):
    def change(state):
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("module", value=5),
        _set("module", value={}),
        _set("module", "0.weight", value="text"),
        _set("module", "0.weight", value=torch.zeros(4, 1, 5, 5)),
        _set("optimizer", value={}),
        _set("optimizer", "param_groups", value=[]),
        _set("optimizer", "param_groups", 0, "params", value=[0, 0, 0, 0, 0, 0]),
        _set("optimizer", "param_groups", 0, value={"params": [0, 1, 2, 3, 4, 5]}),
        _set("optimizer", "state", value={0: {"momentum_buffer": torch.zeros(7)}}),
        _set("optimizer", "state", value={0: {"momentum_buffer": torch.zeros(1).expand(10**12)}}),
        _set("optimizer", "state", value=[1]),
        _set("accountant", value=None),
        _set("accountant", "events", value=[{"release": "poisson_gaussian"}]),
        _set("accountant", "events", 0, "count", value=-3),
        _set("accountant", "events", 0, "count", value=2.5),
        _set("kinds", value={}),
        _set("kinds", value=[]),
        _set("parts", value={}),
        _set("parts", "clipping", value=None),
        _set("parts", "clipping", "state", value={"thresholds": torch.tensor([float("nan")])}),
        _set("releases", value=-1),
        _set("releases", value="many"),
        _set("releases", value=True),
        _set("releases", value=1 << 70),
        _set("loader", value={}),
        _set("loader", "step", value=None),
        _set("loader", "epoch", value=-2),
        _set("budget", value={"epsilon": 1.0}),
        _set("budget", value=3),
    ],
)  # fmt: skip
def test_a_state_of_another_form_is_refused_whole(run, place, change):
    rewritten(place, change)
    refused(run, place)


def test_extras_that_could_not_be_loaded_again_are_refused_when_they_are_saved(run, place):
    engine, model, optimizer, _ = run
    place.write_bytes(b"the old one")
    for extra, where in (
        (
            {"best": {"at": [1, print]}},
            r"extra\['best'\]\['at'\]\[1\] must be a plain value .* got builtin_function",
        ),
        ({"a": bytearray(3)}, "bytearray"),
        ({(1, 2): {3}}, r"extra\[\(1, 2\)\] must be a plain value .* got set"),
        ({"x": torch.zeros(2).numpy()}, "ndarray"),
    ):
        with pytest.raises(TypeError, match=where):
            engine.save_checkpoint(place, module=model, optimizer=optimizer, extra=extra)
        assert place.read_bytes() == b"the old one"
    extra = {
        "a": [1, 2.5, None, True, "s", b"bytes", (1, (2,))],
        3: {
            "t": torch.arange(3),
            "p": torch.nn.Parameter(torch.ones(2)),
            "d": torch.float16,
            "s": torch.Size([2, 3]),
        },
        "dev": torch.device("cpu"),
        "nan": float("inf"),
    }
    engine.save_checkpoint(place, module=model, optimizer=optimizer, extra=extra)
    assert equal(checkpoint.load(place)["extra"], extra)


class Counting(torch.nn.Linear):
    """A layer with a state of its own that is no tensor."""

    def get_extra_state(self):
        return {"calls": [1, "two"], "at": getattr(self, "at", None)}

    def set_extra_state(self, state):
        self.restored = state


def test_extra_state_of_modules_comes_back_or_is_refused_when_it_is_saved(place):
    model = torch.nn.Sequential(torch.nn.Flatten(), Counting(36, 3))
    engine, model, optimizer, _ = private(model)
    engine.save_checkpoint(place, module=model, optimizer=optimizer)
    engine.load_checkpoint(place, module=model, optimizer=optimizer)
    assert model[1].restored == {"calls": [1, "two"], "at": None}
    model[1].at = print
    with pytest.raises(TypeError, match=r"module\['1._extra_state'\]\['at'\] must be a plain value"):
        engine.save_checkpoint(place, module=model, optimizer=optimizer)


def test_an_option_that_could_not_be_loaded_again_is_refused_when_it_is_saved(place):
    engine, model, optimizer, _ = private()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).numpy()[()]
    with pytest.raises(TypeError, match=r"optimizer\['param_groups'\]\[0\]\['lr'\] must be .* got float32"):
        engine.save_checkpoint(place, module=model, optimizer=optimizer)


@pytest.mark.parametrize("name", ["Adafactor", "ASGD", "RMSprop", "Rprop"])
def test_what_other_optimizers_keep_comes_back(place, name):
    model = small_model()
    kind = getattr(torch.optim, name)
    engine, model, optimizer, loader = private(model, optimizer=kind(model.parameters(), lr=0.01))
    train(model, optimizer, loader)
    kept = copy.deepcopy(optimizer.state_dict())
    engine.save_checkpoint(place, module=model, optimizer=optimizer)
    train(model, optimizer, loader)
    engine.load_checkpoint(place, module=model, optimizer=optimizer)
    assert equal(optimizer.state_dict(), kept)


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(3, dtype=torch.uint16), torch.zeros(3, dtype=torch.float8_e4m3fn), torch.eye(3).to_sparse()],
    ids=str,
)
def test_a_buffer_that_could_not_be_loaded_again_is_refused_when_it_is_saved(place, buffer):
    model = small_model()
    model.register_buffer("table", buffer)
    engine, model, optimizer, _ = private(model)
    with pytest.raises(TypeError, match=r"module\['table'\] must be a dense tensor of a common dtype"):
        engine.save_checkpoint(place, module=model, optimizer=optimizer)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.uint8, torch.bool]
)
def test_tensors_of_every_kind_come_back(place, dtype):
    state = dict.fromkeys(checkpoint._ENTRIES)
    checkpoint.save(place, {**state, "module": {"w": torch.ones(3, 2, dtype=dtype).t()}})
    assert equal(checkpoint.load(place)["module"]["w"], torch.ones(2, 3, dtype=dtype))
