"""`make demo`: the `dflash` command on a held-out piece of Python code, with the embedded pair.

Of the 20 held-out prompts of `make bench` it is the one whose acceptance length is nearest to that of all.
"""

import sys

from dflash_jax import cli
from serve.bench.prompts import load_prompts

USUAL = 9  # of the prompts: 5.69 tokens a round, where all have 5.88


def main() -> int:
    prompt = load_prompts(None, count=USUAL + 1)[USUAL]
    print("dflash generate --echo --compare --max-new-tokens 200 --prompt '(held-out Python code)'\n", flush=True)
    return cli.main(["generate", "--echo", "--compare", "--max-new-tokens", "200", f"--prompt={prompt}"])


if __name__ == "__main__":
    sys.exit(main())
