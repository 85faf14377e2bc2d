"""Lets a browser on this machine draw with a checkpoint.

    python -m sana_jax.demo --checkpoint=DIR_OR_HUB_ID
    python -m sana_jax.demo --checkpoint=shapes --port=0

The page at the address that is printed has a form: prompt, negative prompt, seed, steps, guidance,
size, number of pictures. What it shows is what `sample` writes for the same values, to the byte;
the page gives that command too. Steps are shown as they are taken where `sample` takes them one at
a time, which is on a CPU; elsewhere all steps of a picture are one program. Drawings take turns.
Nothing is written to disk, and nothing leaves this machine. Ctrl-C ends it.

The address is that of the loopback, which no other machine reaches. To draw from another one,
forward the port (ssh -L 7860:localhost:7860 HOST); --host=0.0.0.0 lets everybody in the network
draw.
"""

import sys

from absl import flags

from sana_jax.checkpoints import flags as checkpoint_flags
from sana_jax.runtime import cli
from sana_jax.runtime.errors import UserError

FLAGS = flags.FLAGS
NAMES = "checkpoint", "variant", "revision", "lora", "instruction_file", "no_instruction", "dtype"
NAMES += "clip_attention", "compilation_cache", "max_pixels"

checkpoint_flags.define("checkpoint")
checkpoint_flags.define("variant")
checkpoint_flags.define("revision")
checkpoint_flags.define_lora()
checkpoint_flags.define("instruction_file")
flags.DEFINE_bool("no_instruction", False, "encode the prompts without an instruction")
flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "dtype of weights and activations; default: bfloat16, or float32 on a CPU",
)
flags.DEFINE_bool("clip_attention", None, "as of `sample`; default: as the checkpoint says")
flags.DEFINE_integer(
    "max_pixels", 4096 * 4096, "the largest height x width that is accepted", lower_bound=1
)
flags.DEFINE_string(
    "compilation_cache",
    None,
    'folder for compiled programs, "" for none; default: ~/.cache/sana_jax',
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at: the loopback's, or another")
_PORT = flags.DEFINE_integer("port", 7860, "port to listen at; 0: any that is free", 0, 65535)


def main(argv):
    del argv
    if FLAGS.no_instruction and FLAGS.instruction_file:
        raise UserError("--no_instruction and --instruction_file contradict each other; give one")

    from sana_jax.batch.settings import Options  # jax: errors above need not wait for it
    from sana_jax.pages.server import Server
    from sana_jax.pages.studio import Studio
    from sana_jax.runtime import devices

    devices.enable_compilation_cache(FLAGS.compilation_cache)
    options = Options(out="", **{name: FLAGS[name].value for name in NAMES})
    with Server(None, _HOST.value, _PORT.value) as server:  # a port that is taken is told first
        with devices.memory_errors("--dtype=bfloat16"):
            server.studio = Studio(options)
        if not server.is_local:
            print(f"everybody who reaches {server.url} can draw", file=sys.stderr)
        print(server.url, flush=True)
        server.serve_forever(poll_interval=0.2)


if __name__ == "__main__":
    cli.run(main)
