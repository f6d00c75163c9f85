from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted import Gateway, MakeGateway, Script, says, write_model

from gateway.tokenizer import ServedModel


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return ServedModel.load(write_model(tmp_path_factory.mktemp("model")), ["tiny", "alias"])


@pytest.fixture
def gateway(model: ServedModel) -> Iterator[MakeGateway]:
    """Makes gateways; afterwards each must be idle: nothing in flight, no iterator open."""
    made: list[Gateway] = []

    def make(script: Script | None = None, **config: object) -> Gateway:
        made.append(Gateway(model, script or says(model.encode("hello world")), **config))
        return made[-1]

    yield make
    for one in made:
        assert one.backend.open == 0
        assert one.app.state.admission.num_in_flight == 0
        assert one.sample("slipstream:gateway_requests_in_flight") == 0
