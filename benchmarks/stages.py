"""What does it bring to let finished answers go? The transformers sampler, in turn with stages of several lengths and in one go.

    python benchmarks/stages.py --model runs/smollm2 --data gsm8k-test          after benchmarks/smollm2.py

After each stage of so many tokens the answers that have ended leave the batch; in one go they are computed on, as padding, to the
end of the longest. Same seed, so the same work up to the random numbers. Medians over --rounds, in turn. Writes --out as JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import policy
import sample
import tasks

ONE_GO = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--data", default="countdown")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/stages.json"))
    args = parser.parse_args()
    model, tokenizer = policy.load_model(args.model)
    sampler = sample.HFSampler(model, tokenizer)
    prompts = sample.encode_prompts(tasks.load_problems(args.data, args.prompts), tokenizer, sample.context_length(model.config), args.max_new_tokens)
    sampler.generate(prompts, 2, 1.0, 4, seed=0)                                # warm up
    stages, speeds = (ONE_GO, 64, 16), {}
    for seed in range(args.rounds):
        for sample.STAGE_TOKENS in stages:
            begin = time.perf_counter()
            lengths = [len(r.completion_ids) for group in sampler.generate(prompts, args.n, 1.0, args.max_new_tokens, seed) for r in group]
            speeds.setdefault(sample.STAGE_TOKENS, []).append((sum(lengths) / (time.perf_counter() - begin), statistics.mean(lengths), max(lengths)))
    print("tokens a stage   tokens/s   against one go   mean length   longest")
    rows = []
    for stage in stages:
        speed, mean, longest = (statistics.median(values) for values in zip(*speeds[stage]))
        rows.append({"stage": stage, "tokens_per_s": speed, "mean": mean, "longest": longest})
        print(f"{'one go' if stage == ONE_GO else stage:>14}  {speed:9.0f} {speed / rows[0]['tokens_per_s']:16.2f} {mean:13.1f} {longest:9.0f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sample.run_script(main)
