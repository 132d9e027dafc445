"""cpu_native's operations and attention pass the kits."""

import pytest
from quire.testing.attention import AttentionConformance
from quire.testing.op import OpConformance
from quire_cpu_native.attention import NativeAttention
from quire_cpu_native.build import missing
from quire_cpu_native.ops import NativeA8Ops, NativeOps

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class TestNativeOps(OpConformance):
    @pytest.fixture
    def op_set(self):
        return NativeOps(self.init())


class TestNativeA8Ops(OpConformance):
    @pytest.fixture
    def op_set(self):
        return NativeA8Ops(self.init())


class TestNativeAttention(AttentionConformance):
    @pytest.fixture
    def backend_class(self):
        return NativeAttention
