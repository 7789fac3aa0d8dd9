"""Who is believed to be alive."""

from __future__ import annotations

import socket

import ray

from raytron.actors import Session
from raytron.actors.members import living_nodes, refuses


def test_only_a_host_that_says_so_has_nobody_listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert not refuses(address)
    assert refuses(address)


def test_a_node_that_is_doubted_and_there_stays(cluster: Session):
    here = ray.get_runtime_context().get_node_id()
    assert living_nodes([here, "a node that was never there"]) == living_nodes() == {here}
