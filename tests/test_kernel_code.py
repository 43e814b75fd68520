"""The faults that ``make cuda`` looks for in the kernels' code are found where they are."""

import pytest
from kernel_code import find_faults, read_kernels

PTX = """
.visible .entry kernel(
\t.param .u64 kernel_param_0
)
.maxntid 1024
{
\t.reg .b32 %r<2>;

%s
\tret;

}
"""
GOOD = (
    "\t// begin inline asm\n\tgriddepcontrol.wait;\n\t@%p1 ld.relaxed.gpu.global.b32 %r1, [%rd1];\n\tst.global.u32 "
    "[%rd2], %r1;"
)


@pytest.mark.parametrize(
    ("body", "waits", "fault"),
    [
        (GOOD, True, None),
        (GOOD.replace("\tgriddepcontrol.wait;\n", ""), False, None),
        (GOOD.replace("\tgriddepcontrol.wait;\n", ""), True, "before it waits"),
        (GOOD.replace("ld.relaxed.gpu.global", "ld.global.nc"), True, "read-only path"),
        ("\tld.global.u32 %r1, [%rd1];\n" + GOOD, True, "before it waits"),
        ("", False, "does nothing"),
    ],
)
def test_a_fault_is_found(body, waits, fault):
    kernels = read_kernels(PTX.replace("%s", body))
    assert list(kernels) == ["kernel"]
    found = list(find_faults("kernel", kernels["kernel"], waits))
    assert len(found) == (fault is not None) and (fault is None or fault in found[0])
