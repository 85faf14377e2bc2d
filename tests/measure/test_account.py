"""The memory of a program, and the lines that say so."""

import jax
import jax.numpy as jnp

from sana_jax.measure.account import Memory, heading, memory_line, misfit, short

FOUND = Memory(argument_bytes=3 * 2**30, output_bytes=2**30, temp_bytes=2**29, alias_bytes=2**30)
RESULT = dict(what="train", config=None, preset="tiny", batch=2, size=64, topology="h100:2")
RESULT |= dict(mesh=dict(replica=1, fsdp=2), hbm_bytes=20 * 2**30, hbm_available=15 * 2**30)


def test_donated_arguments_count_once():
    assert FOUND.hbm_bytes == int(3.5 * 2**30)
    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    found = Memory.of(add.lower(jnp.ones(1024), jnp.ones(1024)).compile())
    assert (found.argument_bytes, found.output_bytes) == (8192, 4096)


def test_lines():
    assert heading(RESULT, "card", "compiler 1") == (
        "train of tiny, 2 pictures of 64 px a card, on h100:2 (fsdp 2), compiler 1"
    )
    assert "arguments 3.00, temporaries 0.50, outputs 1.00, aliased -1.00; in all 3.50 of 4.00" in (
        memory_line(FOUND, "card", 2**32)
    )
    assert misfit(RESULT, "card") == "DOES NOT FIT: 20.00 GiB a card of 15.00, 5.00 too many"
    assert "at least 20.00" in misfit(RESULT, "chip", known=False)
    assert short("jit(f)/jit(g)/add") == "add" and len(short("x" * 99)) == 80
