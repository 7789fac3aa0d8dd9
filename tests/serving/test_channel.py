"""The way of tokens from replicas to the HTTP side, over a real connection."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from raytron.inference import Output
from raytron.serving.channel import Courier, LostError, Mailbox, pack, unpack

RICH = Output(
    "r", 1, (5, 0), (-0.5, -1.25), (3, 3), "hé", ({5: -0.5, 9: -2.0}, {0: -1.25}), (-1.0,), ({4: -1.0},), 7, "stop", 0
)


@asynccontextmanager
async def connected():
    mailbox = Mailbox("here")
    courier = await Courier.connect(await mailbox.start(), "here")
    try:
        yield mailbox, courier
    finally:
        courier.hang_up()
        await mailbox.close()


@pytest.mark.parametrize("output", [RICH, Output("r"), Output("r", error="broken", finish_reason="error")])
def test_an_output_arrives_as_it_was_sent(output: Output):
    frame = pack([("name", output)])
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    assert unpack(frame[4:], lambda name: "r") == [("name", output)]
    assert unpack(frame[4:], lambda name: None) == []


def test_requests_get_their_own_outputs_in_order_under_their_own_ids():
    async def scenario():
        async with connected() as (mailbox, courier):
            boxes = {name: mailbox.open(name, f"id-{name}") for name in "ab"}
            for token in range(100):
                for name in "abc":  # nobody waits for c
                    courier.add(name, [Output("?", token_ids=(token,), text=name)])
                if token % 7 == 0:
                    await asyncio.sleep(0)
            for name, letters in boxes.items():
                got = []
                while len(got) < 100:
                    got += await letters.read()
                assert [o.token_ids for o in got] == [(token,) for token in range(100)]
                assert {(o.request_id, o.text) for o in got} == {(f"id-{name}", name)}

    asyncio.run(scenario())


def test_when_the_replica_goes_its_requests_hear_of_it_after_what_had_come():
    async def scenario():
        async with connected() as (mailbox, courier):
            letters, other = mailbox.open("a", "a"), mailbox.open("b", "b")
            courier.add("a", [Output("a", text="last")])
            assert [o.text for o in await letters.read()] == ["last"]
            courier.hang_up()
            with pytest.raises(LostError):
                await letters.read()
            other.fail(LostError("this one had nothing from it"))
            with pytest.raises(LostError):
                await other.read()

    asyncio.run(scenario())


def test_an_answer_has_one_sender():
    async def scenario():
        async with connected() as (mailbox, courier):
            letters = mailbox.open("a", "a")
            courier.add("a", [Output("a", text="one ")])
            assert [o.text for o in await letters.read()] == ["one "]
            letters.put([Output("a", text="again")], object())
            with pytest.raises(LostError):
                await letters.read()

    asyncio.run(scenario())


def test_when_the_http_side_goes_the_courier_hears_of_it():
    async def scenario():
        async with connected() as (mailbox, courier):
            letters = mailbox.open("a", "a")
            courier.add("a", [Output("a", text="x")])
            await letters.read()
            await mailbox.close()
            assert "hung up" in await courier.lost

    asyncio.run(scenario())


def test_strangers_are_not_listened_to():
    async def scenario():
        mailbox = Mailbox("here")
        address = await mailbox.start()
        letters = mailbox.open("a", "a")
        stranger = await Courier.connect(replace(address, token=bytes(32)), "here")
        stranger.add("a", [Output("a", text="forged")])
        await stranger.lost
        assert letters.received == 0
        with pytest.raises(LostError):
            await Courier.connect(address, "another node")
        await mailbox.close()
        with pytest.raises(LostError):
            await Courier.connect(address, "here")

    asyncio.run(scenario())


def test_outputs_gather_for_a_slow_reader_and_none_is_lost():
    async def scenario():
        async with connected() as (mailbox, courier):
            letters = mailbox.open("a", "a")
            text = "x" * 100_000
            for _ in range(200):
                courier.add("a", [Output("a", text=text)])
                await asyncio.sleep(0)
            got = 0
            while got < 200:
                got += len(await letters.read())
            assert got == letters.received == 200

    asyncio.run(scenario())
