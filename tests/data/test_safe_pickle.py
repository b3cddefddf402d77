"""The restricted unpickler admits CIFAR-10's files and nothing else."""

from __future__ import annotations

import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backdoorbench_moe.data.safe_pickle import read_pickle
from backdoorbench_moe.errors import DataError
from backdoorbench_moe.pickles import NUMPY

ARRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)


def python2_pickle(array: np.ndarray) -> bytes:
    """{"data": array, "labels": [7]} byte for byte as Python 2 and numpy 1 wrote it."""
    raw = array.tobytes()
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + bytes((ord("K"), array.shape[0], ord("K"), array.shape[1])) + b"\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(raw)) + raw + b"tbU\x06labels](K\x07eu."
    )  # fmt: skip


def test_python_2_file_is_read() -> None:
    content = read_pickle(python2_pickle(ARRAY), "batch")
    np.testing.assert_array_equal(content["data"], ARRAY)
    assert content["labels"] == [7]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_what_this_numpy_writes_is_read(protocol: int) -> None:
    content = read_pickle(pickle.dumps({"data": ARRAY, "labels": [1, 2]}, protocol), "batch")
    np.testing.assert_array_equal(content["data"], ARRAY)
    assert content["data"].dtype == np.uint8 and content["labels"] == [1, 2]


class _Runs:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_refused_by_name_and_not_run(tmp_path, protocol: int) -> None:
    trap = tmp_path / "ran"
    data = pickle.dumps({"data": _Runs(os.mkdir, str(trap))}, protocol)
    pickle.loads(data)  # noqa: S301 - the trap works: an ordinary reader runs it.
    assert trap.is_dir()
    trap.rmdir()
    with pytest.raises(DataError, match=r"data_batch_1: refused global (posix|nt)\.mkdir"):
        read_pickle(data, "data_batch_1")
    assert not trap.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins\neval",
        "numpy\nload",
        "numpy.core.multiarray\nfromfile",
        "_codecs\nopen",
        "numpy\ndtype.type",
    ],
)
def test_neighbours_of_admitted_globals_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="refused global"):
        read_pickle(b"\x80\x04c" + name.encode() + b"\n.", "batch")


def test_a_pickle_cannot_change_the_stand_ins() -> None:
    # BUILD with (None, {name: value}) would set an attribute on the object below it.
    data = b"\x80\x02}(U\x04datacnumpy\ndtype\n(N}U\x01xK\x01stbu."
    with pytest.raises(DataError, match="batch: tries to change a global"):
        read_pickle(data, "batch")
    assert not hasattr(NUMPY["numpy", "dtype"], "x")


@pytest.mark.parametrize(
    "array", [np.zeros(3, np.float32), np.array([{}], object), np.asfortranarray(ARRAY)], ids=str
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"batch: (expected an array|refused numpy type)"):
        read_pickle(pickle.dumps({"data": array}, 2), "batch")


def test_keys_are_texts() -> None:
    deep = b"\x80\x02}K\x01" + b"\x85" * 5000 + b"K\x01s."  # {((((1,),),),): 1}, and so on
    with pytest.raises(DataError, match="batch: expected a dict with texts or numbers as keys, got tuple"):
        read_pickle(deep, "batch")
    with pytest.raises(DataError, match="batch: expected a dict with texts as keys"):
        read_pickle(pickle.dumps({3: 4}), "batch")


def test_a_shape_that_lies_is_refused() -> None:
    data = python2_pickle(ARRAY).replace(b"K\x03K\x04\x86", b"K\x03K\x05\x86")
    with pytest.raises(DataError, match="as many bytes as its shape says"):
        read_pickle(data, "batch")


def test_a_list_is_no_batch() -> None:
    with pytest.raises(DataError, match="batch: expected a dict, got list"):
        read_pickle(pickle.dumps([1]), "batch")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 170), st.binary(max_size=8))
def test_damage_ends_in_a_data_error_or_a_dict(position: int, junk: bytes) -> None:
    data = python2_pickle(ARRAY)
    try:
        assert isinstance(
            read_pickle(data[:position] + junk + data[position + len(junk) + 1 :], "batch"), dict
        )
    except DataError as error:
        assert str(error).startswith("batch: ")


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\xff", b"p4294967295\n", b"r\x00\x00\x00\x10"])
def test_a_few_bytes_do_not_make_it_allocate_gigabytes(put: bytes) -> None:
    data = b"}" + put + b"."
    with pytest.raises(DataError, match="stores an object under the number"):
        read_pickle(data, "batch")
    assert read_pickle(b"}q\x00.", "batch") == {}
