# SPDX-License-Identifier: MIT
"""The mirrored structures against the headers, by a program compiled against them."""

import ctypes
import os
import re
import shutil
import subprocess

import pytest

from entrepot import _abi
from entrepot._lib import lib

INCLUDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..", "include")
HEADERS = (
    "status.h",
    "tensor.h",
    "codec.h",
    "group.h",
    "event.h",
    "ep.h",
    "low_latency.h",
    "device.h",
)
compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
needs_headers = pytest.mark.skipif(
    compiler is None or not os.path.isdir(INCLUDE), reason="needs a C compiler and the headers"
)


def _headers():
    """Text of the mirrored headers, without comments."""
    text = ""
    for header in HEADERS:
        with open(os.path.join(INCLUDE, "entrepot", header)) as file:
            text += file.read()
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S)


def _compile_and_run(tmp_path, body):
    includes = "".join(f'#include "entrepot/{h}"\n' for h in HEADERS)
    source = tmp_path / "probe.c"
    source.write_text(
        f"#include <stdio.h>\n#include <string.h>\n{includes}"
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )
    program = tmp_path / "probe"
    subprocess.run([compiler, "-I", INCLUDE, str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


@needs_headers
def test_sizes_and_offsets(tmp_path):
    """A structure that begins with its size may have more fields in the header, at its end: the
    library takes smaller ones."""
    lines, expected, text = [], [], _headers()
    for name, mirror in _abi.STRUCTS.items():
        (body,) = re.findall(r"typedef struct %s \{(.*?)\} %s;" % (name, name), text, re.S)
        if not issubclass(mirror, _abi._Sized):
            lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
            expected.append(f"{name} {ctypes.sizeof(mirror)}")
        for field, _ in mirror._fields_:
            lines.append(
                f'printf("{name}.{field} %zu %zu\\n", __builtin_offsetof({name}, {field}),'
                f" sizeof((({name} *)0)->{field}));"
            )
            described = getattr(mirror, field)
            expected.append(f"{name}.{field} {described.offset} {described.size}")
    assert _compile_and_run(tmp_path, "\n".join(lines)).splitlines() == expected


@needs_headers
def test_initialisers(tmp_path):
    sized = {n: m for n, m in _abi.STRUCTS.items() if issubclass(m, _abi._Sized)}
    macros = set(re.findall(r"#define (EP_\w+_INIT)\b", _headers()))
    names = [n for n in sized if n.upper() + "_INIT" in macros]
    assert len(names) >= 9
    body = "".join(
        f"{{ {n} v, w = {n.upper()}_INIT; memset(&v, 0, sizeof v); v = w;"
        f' for (size_t i = 0; i < sizeof v; i++) printf("%02x", ((unsigned char *)&v)[i]);'
        f' printf("\\n"); }}\n'
        for n in names
    )
    lines = _compile_and_run(tmp_path, body).splitlines()
    for name, line in zip(names, lines):
        theirs, ours = bytes.fromhex(line), sized[name]()
        for field, _ in ours._fields_:  # and not the padding between them
            if field == "size":
                continue
            at = getattr(type(ours), field)
            span = slice(at.offset, at.offset + at.size)
            assert bytes(ours)[span] == theirs[span], f"{name}.{field}"


@needs_headers
def test_enumerators(tmp_path):
    mirrored = {f"EP_{e.name}": int(e) for enum in _abi.ENUMS for e in enum}
    body = "\n".join(f'printf("%d\\n", (int){name});' for name in mirrored)
    assert [int(v) for v in _compile_and_run(tmp_path, body).split()] == list(mirrored.values())
    declared = re.findall(r"typedef enum (\w+) \{(.*?)\}", _headers(), re.S)
    mirrors = {e.__doc__.rstrip(".") for e in _abi.ENUMS}
    assert mirrors <= {name for name, _ in declared}
    for name, names in declared:  # an enumerator more must be mirrored too
        assert name not in mirrors or set(re.findall(r"\bEP_\w+", names)) <= set(mirrored)


@needs_headers
def test_functions_are_bound_as_declared():
    declared = dict(re.findall(r"EP_API[^;]*?\b(ep_\w+)\(([^;]*)\);", _headers()))
    for name, (_, bound) in _abi.FUNCTIONS.items():
        arguments = declared[name]
        count = 0 if arguments.strip() == "void" else arguments.count(",") + 1
        assert len(bound) == count, name


def test_tensor_packing():
    tensor = _abi.Tensor()
    assert _abi.TENSOR_PACK.size == ctypes.sizeof(tensor)
    _abi.TENSOR_PACK.pack_into(tensor, 0, 16, 1, 2, 3, 4, 0, 0, 4, 1, 0, 0, 1, 7)
    assert (tensor.data, tensor.dtype, tensor.ndim) == (16, 1, 2)
    assert list(tensor.shape) == [3, 4, 0, 0] and list(tensor.stride) == [4, 1, 0, 0]
    assert (tensor.device, tensor.device_index) == (1, 7)


def test_names_and_sizes_of_the_library():
    from entrepot._tensor import TO_NUMPY

    for status in _abi.Status:
        assert lib.ep_status_string(status).decode() == f"EP_{status.name}"
    for code, dtype in TO_NUMPY.items():
        assert lib.ep_dtype_size(code) == dtype.itemsize
