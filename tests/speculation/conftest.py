"""The tiny random models of the engine's tests."""

from tests.engine.conftest import make_checkpoint, one_thread, reference

__all__ = ["make_checkpoint", "one_thread", "reference"]
