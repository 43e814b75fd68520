"""The extension module: what it accepts, what it refuses and in which words, and what it leaves behind (nothing)."""

import ast
import ctypes
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvpitfalls import _core
from kvpitfalls.errors import DeviceError

B, H, G, T, D, K = 2, 3, 2, 40, 8, 5
rng = np.random.default_rng(0)


class OnlyDLPack:
    """A tensor of a library that knows nothing but __dlpack__; with old=True from before DLPack 1.0."""

    def __init__(self, array, old=False):
        self.array, self.old = array, old

    def __dlpack__(self, **keywords):
        if self.old and keywords:
            raise TypeError(f"unexpected keywords {sorted(keywords)}")
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def norm(keys, scores=None, workspace=None, n_worker=1, params=None, valid=None):
    scores = np.full(keys.shape[:3], np.nan, np.float32) if scores is None else scores
    _core.score("norm", keys, None, None, None, valid, None, scores, params, workspace, n_worker)
    return scores


def expected_norm(keys) -> np.ndarray:
    wide = keys.to(torch.float64).numpy() if isinstance(keys, torch.Tensor) else np.asarray(keys, np.float64)
    return -np.sqrt((wide**2).sum(-1))


def assert_norm(scores, keys):
    np.testing.assert_allclose(np.asarray(scores, np.float64), expected_norm(keys), rtol=2**-20)


def attention(n_token=T, n_worker=1, workspace=None):
    """Arguments of a call in which the last eight tokens judge all others."""
    make = np.random.default_rng(1)
    keys = make.standard_normal((B, H, n_token, D), np.float32)
    queries = make.standard_normal((B, H * G, 8, D), np.float32)
    votes = np.tile(
        np.array([[[0, n_token - 8, n_token - 8, n_token, 0, 0, 1, 0, n_token - 8, n_token]]], np.int32), (B, 1, 1)
    )
    scores = np.full((B, H, n_token), np.nan, np.float32)
    return ["attention", keys, None, queries, votes, None, None, scores, [D**-0.5], workspace, n_worker]


def selection():
    scores = rng.standard_normal((B, H, T), np.float32)
    segments = np.tile(np.array([0, 10, T], np.int32), (B, 1))
    quotas = np.tile(np.array([2, 3], np.int32), (B, H, 1))
    positions, counts = np.full((B, H, K), -7, np.int32), np.full((B, H), -7, np.int32)
    return [scores, segments, quotas, None, None, positions, counts, None, 1]


def gathering(dtype=np.float32):
    keys, values = (rng.standard_normal((B, H, T, d), np.float32).astype(dtype) for d in (D, D + 1))
    positions = np.sort(np.argsort(rng.random((B, H, T)))[..., :K].astype(np.int32))
    return [keys, values, positions, np.zeros((B, H, K, D), dtype), np.zeros((B, H, K, D + 1), dtype), 1]


KEYS = torch.from_numpy(rng.standard_normal((B, H, T, D), np.float32))
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "heads_inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_other": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "sliced": lambda x: torch.cat([x, x, x], -1)[..., D : 2 * D],
    "broadcast": lambda x: x[:1, :1].expand(B, H, T, D),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_way_in_reads_the_same_tensor(layout, dtype):
    keys = LAYOUTS[layout](KEYS.to(dtype))
    scores = norm(keys)
    assert_norm(scores, keys)
    assert np.array_equal(norm(keys, torch.empty(B, H, T)).numpy(), scores)
    wrapped = [OnlyDLPack(keys), OnlyDLPack(keys, old=True)]
    for way in [*wrapped, keys.numpy()] if dtype is not torch.bfloat16 else wrapped:
        assert np.array_equal(norm(way, np.empty((B, H, T), np.float32)), scores)


def test_outputs_may_be_strided_or_come_by_dlpack():
    strided = torch.zeros(T, H, B).permute(2, 1, 0)
    base = np.zeros((B, H, T), np.float32)
    assert_norm(norm(KEYS, strided), KEYS)
    norm(KEYS, OnlyDLPack(base))
    assert_norm(base, KEYS)


def test_select_and_gather():
    scores, *_, positions, counts, _, _ = arguments = selection()
    _core.select(*arguments)
    best = [np.argsort(-scores[..., a:b], kind="stable")[..., :n] + a for a, b, n in ((0, 10, 2), (10, T, 3))]
    assert np.array_equal(positions, np.sort(np.concatenate(best, -1)))
    assert (counts == K).all()
    for dtype in (np.float32, np.float16):
        keys, values, positions, out_keys, out_values, _ = arguments = gathering(dtype)
        _core.gather(*arguments)
        assert np.array_equal(out_keys, np.take_along_axis(keys, positions[..., None], 2))
        assert np.array_equal(out_values, np.take_along_axis(values, positions[..., None], 2))


def sharing():
    scores, segments, quotas = selection()[:3]
    return [scores, segments, quotas, np.minimum(quotas, 1), np.full(quotas.shape, -7, np.int32), None, 1]


def test_share():
    scores, *_, counts, _, _ = arguments = sharing()
    _core.share(*arguments)
    for b, s, (low, high) in [(b, s, edges) for b in range(B) for s, edges in enumerate([(0, 10), (10, T)])]:
        part = scores[b, :, low:high].copy()
        np.put_along_axis(part, part.argmax(-1)[:, None], np.inf, axis=-1)
        best = np.argsort(-part.ravel(), kind="stable")[: H * (2, 3)[s]]
        assert counts[b, :, s].tolist() == np.bincount(best // (high - low), minlength=H).tolist()
    assert _core.share_workspace(*arguments[:5], 2) % 64 == 0
    with pytest.raises(ValueError, match=r"floors\[0,0,0\] is 3; expected 0 to the quota there, 2"):
        _core.share(*arguments[:3], arguments[3] + 2, *arguments[4:])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, torch.bool, torch.uint8], ids=str)
def test_protect_may_be_bool_or_bytes(dtype):
    arguments = selection()
    protected = np.zeros((B, T), bool)
    protected[:, [3, 20, 21]] = True
    arguments[3] = torch.from_numpy(protected).to(dtype) if isinstance(dtype, torch.dtype) else protected.astype(dtype)
    _core.select(*arguments)
    assert all({3, 20, 21} <= set(row) for row in arguments[5].reshape(-1, K))


def test_empty_arrays_are_given_though_they_have_no_address():
    with pytest.raises(ValueError, match=r"valid.shape\[0\] is 0; expected at least 1"):
        norm(KEYS, valid=torch.empty(0, 2, dtype=torch.int32))


ODD = np.zeros(B * H * T * 9 * D, np.uint8).view(
    np.dtype({"names": ["x"], "formats": ["f4"], "offsets": [0], "itemsize": 6})
)["x"]
READ_ONLY = np.zeros((B, H, T), np.float32)
READ_ONLY.flags.writeable = False
REFUSED = {
    "float64 array": (
        TypeError,
        "keys has dtype float64; expected float32, float16 or bfloat16",
        lambda: norm(KEYS.numpy().astype("f8")),
    ),
    "float64 tensor": (
        TypeError,
        "keys has dtype float64; expected float32, float16 or bfloat16",
        lambda: norm(KEYS.double()),
    ),
    "int64": (
        TypeError,
        "valid has dtype int64; expected int32",
        lambda: norm(KEYS, valid=torch.zeros(B, 2, dtype=torch.int64)),
    ),
    "uint16": (
        TypeError,
        "scores has dtype uint16; expected float32",
        lambda: norm(KEYS, np.zeros((B, H, T), np.uint16)),
    ),
    "complex": (TypeError, "keys has dtype complex64; expected", lambda: norm(KEYS.to(torch.complex64))),
    "vectors": (
        TypeError,
        "keys has a 32-bit dtype with DLPack code 2 and 4 lanes",
        lambda: norm(exchanging(KEYS, lanes=4), READ_ONLY),
    ),
    "dtype of the core": (
        TypeError,
        "scores has dtype float16; expected float32",
        lambda: norm(KEYS, torch.zeros(B, H, T).half()),
    ),
    "byte order": (
        TypeError,
        "keys has dtype >f4; expected the byte order of this machine",
        lambda: norm(KEYS.numpy().astype(">f4")),
    ),
    "list": (
        TypeError,
        "keys is of type list; expected a NumPy array or a tensor",
        lambda: norm([1.0], np.zeros(1, np.float32)),
    ),
    "None": (TypeError, "keys is of type NoneType; expected", lambda: norm(None, np.zeros(1, np.float32))),
    "meta tensor": (
        TypeError,
        "keys is a tensor whose library does not lend out its memory",
        lambda: norm(KEYS.to("meta"), READ_ONLY),
    ),
    "rank 5": (ValueError, "keys has 5 dimensions; expected 1 to 4", lambda: norm(KEYS[None])),
    "rank 0": (ValueError, "keys has 0 dimensions; expected 1 to 4", lambda: norm(KEYS[0, 0, 0, 0], READ_ONLY)),
    "shape": (
        ValueError,
        "scores.shape[2] is 39, but T is 40 in keys",
        lambda: norm(KEYS, np.zeros((B, H, T - 1), np.float32)),
    ),
    "negative stride": (
        ValueError,
        "keys.stride[3] is -1; expected no negative stride",
        lambda: norm(KEYS.numpy()[..., ::-1]),
    ),
    "odd stride": (
        ValueError,
        "keys has a stride of 6 bytes; expected a multiple of its 4-byte",
        lambda: norm(ODD[None, None, None]),
    ),
    "read-only array": (
        ValueError,
        "scores is read-only; expected an array that can be written to",
        lambda: norm(KEYS, READ_ONLY),
    ),
    "n_worker": (ValueError, "n_worker is -1; expected 0 to 1024", lambda: norm(KEYS, n_worker=-1)),
    "params": (
        ValueError,
        'params has 2 values; expected at most 0 for the scorer "norm"',
        lambda: norm(KEYS, params=[1, 2]),
    ),
    "value": (
        ValueError,
        "valid[1] is [0, 41); expected a range inside [0, 40)",
        lambda: norm(KEYS, valid=np.int32([[0, 1], [0, T + 1]])),
    ),
    "missing": (
        ValueError,
        "queries is missing; expected a tensor",
        lambda: _core.score(*attention()[:2], *[None] * 5, *attention()[7:]),
    ),
    "scorer": (
        ValueError,
        'scorer is "nrom"; expected one of norm, position, attention',
        lambda: _core.score("nrom", *[None] * 10),
    ),
    "argument count": (TypeError, "gather takes 6 positional arguments; 1 were given", lambda: _core.gather(KEYS)),
    "isa": (ValueError, 'isa is "mmx"; expected one of ', lambda: _core.isa_set("mmx")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_was_given_and_what_was_expected(case):
    exception, sentence, call = REFUSED[case]
    with pytest.raises(exception) as caught:
        call()
    assert sentence in str(caught.value)
    assert type(caught.value) is exception


def test_the_words_of_another_library_are_kept_as_the_cause():
    with pytest.raises(TypeError) as caught:
        norm(OnlyDLPack(KEYS.clone().requires_grad_()), READ_ONLY)
    assert "keys is a tensor whose library" in str(caught.value) and "require gradient" in str(caught.value.__cause__)
    assert caught.value.__cause__.__traceback__ is not None


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="this NumPy lends out no read-only array")
def test_capsules_that_are_read_only_are_no_outputs():
    with pytest.raises(ValueError, match="scores is read-only; expected an array that can be written to"):
        norm(KEYS, OnlyDLPack(READ_ONLY))


def test_a_refused_call_has_written_nothing():
    scores = np.full((B, H, T), 7, np.float32)
    with pytest.raises(ValueError, match="expected a range inside"):
        norm(KEYS, scores, valid=np.array([[0, 1], [5, T + 1]], np.int32))
    assert (scores == 7).all()


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("device_type", "device_index", "ndim")),
        ("code_bits", ctypes.c_uint8 * 2),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


BORROW = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))
STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p))


class Table(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("unused", ctypes.c_void_p * 3),
        ("borrow", BORROW),
        ("stream", STREAM),
    ]


@BORROW
def borrow(tensor, out):
    """A compact float32 tensor that starts eight bytes into its memory and leaves its strides out, as DLPack before 1.2
    could."""
    shape = tensor.array.shape
    tensor.keep = (ctypes.c_int64 * len(shape))(*shape)
    out[0] = DLTensor(
        tensor.array.ctypes.data - 8, tensor.device, 3, len(shape), (2, 32), tensor.lanes, tensor.keep, None, 8
    )
    return 0


@STREAM
def stream(device_type, device_index, out):
    out[0] = 1234
    asked_streams.append((device_type, device_index))
    return 0


asked_streams: list[tuple[int, int]] = []
OLD_TABLE = Table(1, 0, None, (None,) * 3, borrow, stream)
NEW_TABLE = Table(2, 0, ctypes.addressof(OLD_TABLE), (None,) * 3, BORROW(), STREAM())
LONE_TABLE = Table(2, 0, None, (None,) * 3, BORROW(), STREAM())
BARE_TABLE = Table(1, 0, None, (None,) * 3, BORROW(), stream)
TABLE_NAME = b"dlpack_exchange_api"


def exchanging(array, table=OLD_TABLE, device=1, lanes=1):
    """A tensor of a made-up library with this exchange table; its __dlpack__ works too."""
    ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
    ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = ctypes.pythonapi.PyCapsule_New(ctypes.addressof(table), TABLE_NAME, None)
    tensor = type("Exchanging", (OnlyDLPack,), {"__dlpack_c_exchange_api__": capsule, "keep": None})(np.asarray(array))
    tensor.device, tensor.lanes = device, lanes
    return tensor


@pytest.mark.parametrize("table", ["OLD_TABLE", "NEW_TABLE", "LONE_TABLE", "BARE_TABLE"])
def test_exchange_tables_of_other_versions(table):
    tensor = exchanging(KEYS, globals()[table])
    assert_norm(norm(tensor, np.empty((B, H, T), np.float32)), KEYS)
    assert (tensor.keep is not None) == (table in ("OLD_TABLE", "NEW_TABLE")), "which of the two ways in was used"


def test_other_devices_are_asked_for_their_stream_and_refused():
    scores = np.zeros((B, H, T), np.float32)
    asked_streams.clear()
    with pytest.raises(DeviceError, match="the tensors are on an unknown device, for which no backend is loaded"):
        norm(exchanging(KEYS, device=8), exchanging(scores, device=8))
    assert asked_streams == []
    with pytest.raises(DeviceError, match="scores is on device 2:3, but keys is on device 1:0; expected one device"):
        norm(KEYS, exchanging(scores, device=2))
    assert asked_streams == [(2, 3)]
    with pytest.raises(DeviceError, match="workspace is on another device than the tensors"):
        norm(exchanging(KEYS, device=2), scores, np.zeros(64, np.uint8))


def test_what_a_scorer_cannot_do_is_not_implemented():
    n_token = 2**23 + 1
    keys, scores = np.broadcast_to(np.zeros(1, np.float32), (1, 1, n_token, 1)), np.empty((1, 1, n_token), np.float32)
    with pytest.raises(
        NotImplementedError, match='T is 8388609 in keys; the scorer "position" tells at most 8388608 apart'
    ):
        _core.score("position", keys, None, None, None, None, None, scores, None, None, 1)


def test_parameters_are_read_in_order_and_default():
    scores = np.empty((1, 1, T), np.float32)

    def position(params):
        _core.score("position", KEYS[:1, :1], None, None, None, None, None, scores, params, None, 1)
        return int((scores[0, 0] > T).sum())

    assert [position(params) for params in (None, [], (7,), np.array([2.0]))] == [4, 4, 7, 2]


def aligned(n_byte, offset=0):
    memory = np.zeros(n_byte + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    return memory[start : start + n_byte]


def test_workspaces():
    n_byte, of_two = (_core.score_workspace(*attention()[:9], n_worker) for n_worker in (1, 2))
    assert 0 < n_byte < of_two and n_byte % 64 == of_two % 64 == 0
    expected = attention()
    _core.score(*expected)
    for n_worker, workspace in ((1, aligned(n_byte)), (2, aligned(of_two)), (2, torch.from_numpy(aligned(of_two)))):
        given = attention(n_worker=n_worker, workspace=workspace)
        _core.score(*given)
        assert np.array_equal(given[7], expected[7])
    read_only = aligned(n_byte)
    read_only.flags.writeable = False
    for exception, sentence, n_worker, workspace in (
        (
            ValueError,
            f"workspace has {n_byte - 1} bytes; expected at least {n_byte} (for 1 worker)",
            1,
            aligned(n_byte - 1),
        ),
        (ValueError, f"workspace has {n_byte} bytes; expected at least {of_two} (for 2 workers)", 2, aligned(n_byte)),
        (
            ValueError,
            "workspace begins 1 bytes behind a multiple of 64; expected it to be aligned to 64 bytes",
            1,
            aligned(n_byte, 1),
        ),
        (ValueError, "workspace is not a row of bytes", 1, aligned(2 * n_byte)[::2]),
        (ValueError, "workspace is not a row of bytes", 1, aligned(n_byte)[None]),
        (TypeError, "workspace does not hold bytes; expected dtype uint8", 1, aligned(n_byte).view(np.float32)),
        (ValueError, "workspace is read-only", 1, read_only),
        (TypeError, "workspace has dtype int16; expected uint8", 1, aligned(n_byte).view(np.int16)),
        (TypeError, "workspace is of type int", 1, n_byte),
    ):
        with pytest.raises(exception) as caught:
            _core.score(*attention(n_worker=n_worker, workspace=workspace))
        assert sentence in str(caught.value)


def test_workspace_sizes_are_refused_in_the_words_of_the_verb():
    arguments = selection()
    assert _core.select_workspace(*arguments[:7], 1) % 64 == 0
    arguments[5] = arguments[5][:, :, :2].astype(np.float32)
    with pytest.raises(TypeError, match="positions has dtype float32; expected int32"):
        _core.select_workspace(*arguments[:7], 1)
    with pytest.raises(ValueError, match="scores has 1 dimension;"):
        _core.score_workspace("norm", KEYS, None, None, None, None, None, np.zeros(3, np.float32), None, 1)


def test_what_the_core_says_about_itself():
    assert _core.scorers()[:2] == (("norm", 0, ()), ("position", 0, (("n_sink", 4.0),)))
    assert _core.scorers()[2][:2] == ("attention", 3) and _core.scorers()[3] == ("keydiff", 2, ())
    assert _core.scorers()[4] == ("lagkv", 4, (("n_sink", 4.0), ("lag_size", 128.0)))
    assert _core.scorers()[5] == ("random", 0, (("seed", 0.0), ("seed_high", 0.0)))
    cases = [
        (s, d, t) for s in ("norm", "nrom") for d in ("cpu", "mps") for t in ("float32", "bfloat16", "float64", "int32")
    ]
    assert {case for case in cases if _core.supports(*case)} == {
        ("norm", "cpu", "float32"),
        ("norm", "cpu", "bfloat16"),
    }
    with pytest.raises(TypeError, match="dtype is 1; expected a str"):
        _core.supports("norm", "cpu", 1)
    assert _core.build_info().keys() == {"compiler", "openmp", "abi_version"}


def test_instruction_sets_can_be_chosen(request):
    before, chosen = _core.isa(), set()
    request.addfinalizer(lambda: _core.isa_set(before))
    for name in _core.isas():
        try:
            _core.isa_set(name)
        except ValueError as refusal:
            assert str(refusal) == f'isa is "{name}", which this CPU lacks'
        else:
            assert _core.isa() == name
            chosen.add(name)
    assert {before, "scalar"} <= chosen <= set(_core.isas())


def test_the_stub_names_every_function_with_its_arguments():
    stub = ast.parse(Path(_core.__file__).with_name("_core.pyi").read_text())
    described = {
        node.name: [a.arg for a in node.args.posonlyargs] for node in stub.body if isinstance(node, ast.FunctionDef)
    }
    real = {name: list(inspect.signature(f).parameters) for name, f in vars(_core).items() if inspect.isbuiltin(f)}
    assert described == real


@pytest.mark.skipif(not shutil.which("nm") or sys.platform != "linux", reason="reads the symbols with GNU nm")
def test_only_the_entry_point_is_exported():
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["PyInit__core"]
