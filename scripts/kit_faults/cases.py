"""What pytest collects: the kit on each fault, as one class."""

from __future__ import annotations

from kit_faults.table import FAULTS

for number, fault in enumerate(FAULTS):
    case = fault.case()
    case.__name__ = f"TestFault{number:03}"
    globals()[case.__name__] = case
del case
