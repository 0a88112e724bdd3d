"""Tokens a second of a running server's /v1/chat/completions: one request after the other, and parallel clients.

python benchmarks/chat.py http://127.0.0.1:8000/v1 --model base --clients 16 --tokens 64

The first request loads the model and is not counted. Answers are greedy and end at `--tokens` or by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from typing import Any

import openai

THINGS = "kettle lamp bicycle radio camera drill printer kite tent guitar clock toaster scooter pump fan saw".split()


async def answer(client: Any, args: argparse.Namespace, number: int) -> tuple[int, str]:
    question = f"Write a long story about a {THINGS[number % len(THINGS)]}, number {number}."
    result = await client.chat.completions.create(
        model=args.model, max_tokens=args.tokens, temperature=0, messages=[{"role": "user", "content": question}]
    )
    return result.usage.completion_tokens, result.choices[0].message.content


async def main(args: argparse.Namespace) -> dict[str, Any]:
    async with openai.AsyncOpenAI(base_url=args.address, api_key=args.token, timeout=600, max_retries=0) as client:
        await answer(client, args, 0)
        start = time.perf_counter()
        alone = [await answer(client, args, number) for number in range(args.one_by_one)]
        seconds = time.perf_counter() - start
        rates = {"one by one": sum(tokens for tokens, _ in alone) / seconds}
        start = time.perf_counter()
        together = await asyncio.gather(*(answer(client, args, number) for number in range(args.clients)))
        seconds = time.perf_counter() - start
        rates[f"{args.clients} clients"] = sum(tokens for tokens, _ in together) / seconds
        same = sum(one == other for (_, one), (_, other) in zip(alone, together, strict=False))
    ratio = rates[f"{args.clients} clients"] / rates["one by one"]
    return {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(ratio, 2),
        "same_text": f"{same} of {min(len(alone), len(together))}",
    }


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("address", help="of the server's /v1")
    flags.add_argument("--model", default="base")
    flags.add_argument("--token", default="none", help="the server's, if it has one")
    flags.add_argument("--clients", type=int, default=16)
    flags.add_argument("--one-by-one", type=int, default=4, help="requests one after the other")
    flags.add_argument("--tokens", type=int, default=64)
    print(json.dumps(asyncio.run(main(flags.parse_args())), indent=1))
