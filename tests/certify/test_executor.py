"""The core's executor passes the kit."""

import pytest
from quire.engine.inproc import InprocExecutor
from quire.testing.executor import ExecutorConformance


class TestInproc(ExecutorConformance):
    @pytest.fixture
    def executor_class(self):
        return InprocExecutor
