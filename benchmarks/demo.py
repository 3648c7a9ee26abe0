"""`make demo`: the `dflash` command on a held-out piece of Python code, with the embedded pair."""

import sys

from benchmarks.prompts import held_out_prompts
from dflash_jax import cli


def main() -> int:
    (prompt,) = held_out_prompts(1)
    print("dflash generate --echo --compare --max-new-tokens 200 --prompt '(held-out Python code)'\n", flush=True)
    return cli.main(["generate", "--echo", "--compare", "--max-new-tokens", "200", f"--prompt={prompt}"])


if __name__ == "__main__":
    sys.exit(main())
