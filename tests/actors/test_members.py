"""Who is believed to be alive."""

from __future__ import annotations

import socket

import ray

from raytron.actors import Session, members
from raytron.actors.members import frozen_nodes, living_nodes, refuses, stands_still


def test_only_a_host_that_says_so_has_nobody_listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert not refuses(address)
    assert refuses(address)


def test_a_server_that_takes_connections_and_says_nothing_stands_still(cluster: Session, monkeypatch):
    monkeypatch.setattr(members, "GREETING_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert stands_still(address)
    assert not stands_still(address)  # nobody is there
    (node,) = ray.nodes()
    monkeypatch.undo()
    assert not stands_still((node["NodeManagerAddress"], node["NodeManagerPort"]))
    assert frozen_nodes([node["NodeID"]]) == frozenset()


def test_a_node_that_is_doubted_and_there_stays(cluster: Session):
    here = ray.get_runtime_context().get_node_id()
    assert living_nodes([here, "a node that was never there"]) == living_nodes() == {here}
