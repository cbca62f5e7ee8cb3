"""Multi-turn rollouts: a model learns to ask a calculator, and to answer with its result.

    pip install ".[train]"
    python examples/calculator.py runs/calculator

A turn of the model ends with its end token. A turn such as `3*7=` is a call: the calculator's `21;`
follows, which the model reads, but is not trained on. Any other turn is the answer. A tiny model
with random weights learns this on a CPU; for your own, replace it, the rows, the rewards, and CALL
and REPLY by what your chat template has for tools.
"""

import ast
import math
import operator
import random
import re
import sys

from accelerate.utils import set_seed

from grpo_fused import GRPOTrainer, GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer

CALL, REPLY, MAX_CALLS = re.compile("(.+)="), "{};", 1
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.USub: operator.neg, ast.UAdd: operator.pos}


def calculate(expression):
    """Returns the value of numbers, + - * / and brackets as text, and "?" of anything else.

    The expression is parsed, never run: a model may write whatever it likes.
    """

    def value(node):
        match node:
            case ast.Constant(value=number) if type(number) in (int, float):
                return number
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError("not arithmetic")

    try:
        if len(expression) > 100:
            raise ValueError("too long")
        result = value(ast.parse(expression.strip(), mode="eval").body)
        if not math.isfinite(result):
            raise ValueError("infinite")
    except (ArithmeticError, SyntaxError, ValueError):
        return "?"
    return str(result) if isinstance(result, int) else f"{result:.6g}"


def roll_out(prompts, trainer):
    """Returns completions of several turns; the mask is 0 where the calculator wrote.

    All unfinished completions are sampled together, turn by turn. A completion is truncated if a
    turn is cut off at max_completion_length, if the reply to a call leaves no room, or if there are
    more than MAX_CALLS. The model's turns become the column `turns` of reward functions.
    """
    sampler, limit = trainer.sampler, trainer.config.max_completion_length
    prompt_ids, running = sampler.encode(prompts), list(range(len(prompts)))
    ids, masks, turns, truncated = ([[] for _ in prompts] for _ in range(4))
    while running:
        with trainer.accelerator.autocast():
            sampled = sampler.generate(
                trainer.unwrapped,
                [prompt_ids[row] + ids[row] for row in running],
                temperature=trainer.config.temperature,
                max_new_tokens=limit - min(len(ids[row]) for row in running),
            )
        asking = []
        for row, new in zip(running, sampled, strict=True):
            new = new[: limit - len(ids[row])]
            ids[row] += new
            masks[row] += [1] * len(new)
            turns[row] += sampler.decode([new])
            truncated[row] = sampler.is_truncated(new)
            call = CALL.fullmatch(turns[row][-1])
            if truncated[row] or call is None:
                continue
            reply = trainer.tokenizer(REPLY.format(calculate(call[1])), add_special_tokens=False)
            reply = reply["input_ids"]
            truncated[row] = len(turns[row]) > MAX_CALLS or len(ids[row]) + len(reply) >= limit
            if not truncated[row]:
                ids[row] += reply
                masks[row] += [0] * len(reply)
                asking.append(row)
        running = asking
    found = {"prompt_ids": prompt_ids, "completion_ids": ids, "completion_mask": masks}
    return found | {"truncated": truncated, "turns": turns}


def likeness(text, wanted):
    """Returns the share of places that have the right character."""
    return sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))


def asks(turns, prompts):
    """Rewards a first turn that is like the call with the problem."""
    return [likeness(t[0], p.replace("?", "=")) for t, p in zip(turns, prompts, strict=True)]


def answers(turns, answer, log_metric):
    """Rewards an answer after a call that is like the right one; logs the share of right ones."""
    found = [t[1] if len(t) == 2 else "" for t in turns]
    log_metric("solved", sum(map(str.__eq__, found, answer)) / len(answer))
    return list(map(likeness, found, answer))


def make_trainer(folder, **options):
    """Returns the trainer of a tiny model on sums, differences and products of two digits."""
    tokenizer = make_tokenizer("0123456789+-*?=;")
    problems = [f"{a}{sign}{b}" for a in range(1, 10) for sign in "+-*" for b in range(1, 10)]
    rows = [{"prompt": f"{problem}?", "answer": calculate(problem)} for problem in problems]
    random.Random(0).shuffle(rows)
    settings = {"max_steps": 400, "prompts_per_rollout": 16, "num_generations": 16}
    settings |= {"micro_batch_size": 256, "max_completion_length": 14, "entropy_coef": 0.05}
    settings |= {"learning_rate": 1e-3, "adam_betas": [0.9, 0.99], "save_steps": None}
    config = GRPOTrainerConfig(output_dir=folder, report_to=[], **settings | options)
    set_seed(config.seed)
    model = make_model(tokenizer)
    return GRPOTrainer(
        model, [asks, answers], config, rows, tokenizer=tokenizer, rollout_fn=roll_out
    )


if __name__ == "__main__":
    trainer = make_trainer(sys.argv[1])
    trainer.train()
    solved = [line["solved"] for line in trainer.run_log.history]
    print(f"solved: {sum(solved[:20]) / 20:.2f} (first 20 steps) -> {sum(solved[-20:]) / 20:.2f}")
