"""The lobby in which engines wait for a race."""

import asyncio

from pipeline.search.engine_pool import (
    Lobby,
)


def test_engines_wait_in_the_lobby_until_they_are_called_or_let_go() -> None:
    async def scenario() -> None:
        lobby = Lobby()
        waiting = asyncio.create_task(lobby.wait(0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        for _ in range(2):  # the driver repeats itself
            await lobby.call(1, "race")
        assert await waiting == await lobby.wait(0) == (1, "race")
        late = asyncio.create_task(lobby.wait(1))
        await asyncio.sleep(0.01)
        assert not late.done()
        await lobby.close()
        assert await late is None
        assert await lobby.wait(0) is None

    asyncio.run(scenario())
