"""`make demo`: the `dflash` command on a held-out piece of Python code, with the embedded pair."""

import sys

from dflash_jax import cli
from serve.bench.prompts import load_prompts


def main() -> int:
    (prompt,) = load_prompts(None, count=1)
    print("dflash generate --echo --compare --max-new-tokens 200 --prompt '(held-out Python code)'\n", flush=True)
    return cli.main(["generate", "--echo", "--compare", "--max-new-tokens", "200", f"--prompt={prompt}"])


if __name__ == "__main__":
    sys.exit(main())
