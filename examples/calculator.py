"""Multi-turn rollouts: a model learns to ask a calculator, and to answer with its result.

    pip install ".[train]"
    python examples/calculator.py runs/calculator

A turn of the model ends with its end token. A turn such as `38*47=` is a call: the calculator's
`1786;` follows, which the model reads, but is not trained on. Any other turn is the answer. The
tiny model with random weights is there so that this runs on a CPU; to train your own, replace it,
the rows, and CALL and REPLY by what your chat template has for tools.
"""

import ast
import operator
import random
import re
import sys

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from grpo_fused import GRPOTrainer, GRPOTrainerConfig

CALL, REPLY, MAX_CALLS = re.compile(r"(.+)="), "{};", 1
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.USub: operator.neg, ast.UAdd: operator.pos}


def calculate(expression):
    """Returns the value of numbers, + - * / and brackets as text, "?" for anything else.

    The expression is parsed, never run: a model may write whatever it likes.
    """

    def value(node):
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return number
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
        raise ValueError("no arithmetic")

    try:
        result = value(ast.parse(expression[:100].strip(), mode="eval").body)
    except (ArithmeticError, SyntaxError, ValueError):
        return "?"
    return str(result) if isinstance(result, int) else f"{result:.6g}"


def roll_out(prompts, trainer):
    """Returns completions of several turns; the mask is 0 where the calculator wrote.

    All unfinished completions are sampled together, turn by turn. A turn that is cut off at
    max_completion_length is no call and no answer, and the completion is truncated; so is one that
    would have another call after MAX_CALLS, or no room for its reply. Reward functions get `calls`
    and `reply` (None without an answer) as columns, and the whole text as `completions`.
    """
    sampler, limit = trainer.sampler, trainer.config.max_completion_length
    prompt_ids = sampler.encode(prompts)
    size = len(prompts)
    ids, masks, texts = ([[] for _ in prompts] for _ in range(3))
    truncated, running = [False] * size, list(range(size))
    while running:
        with trainer.accelerator.autocast():
            turns = sampler.generate(
                trainer.unwrapped,
                [prompt_ids[row] + ids[row] for row in running],
                temperature=trainer.config.temperature,
                max_new_tokens=limit - min(len(ids[row]) for row in running),
            )
        asking = []
        for row, turn in zip(running, turns, strict=True):
            turn = turn[: limit - len(ids[row])]
            ids[row] += turn
            masks[row] += [1] * len(turn)
            texts[row] += sampler.decode([turn])
            truncated[row] = sampler.is_truncated(turn)
            call = CALL.fullmatch(texts[row][-1])
            if truncated[row] or call is None:
                continue
            reply = trainer.tokenizer(REPLY.format(calculate(call[1])), add_special_tokens=False)
            reply = reply["input_ids"]
            truncated[row] = len(texts[row]) > MAX_CALLS or len(ids[row]) + len(reply) >= limit
            if not truncated[row]:
                ids[row] += reply
                masks[row] += [0] * len(reply)
                asking.append(row)
        running = asking
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": ids,
        "completion_mask": masks,
        "truncated": truncated,
        "turns": texts,
    }


def likeness(text, wanted):
    """Returns the share of places with the right character."""
    return sum(a == b for a, b in zip(text, wanted, strict=False)) / max(len(text), len(wanted))


def asks(turns, prompts):
    """Rewards a first turn that is like a call with the problem."""
    wanted = [prompt.replace("?", "=") for prompt in prompts]
    return [likeness(texts[0], call) for texts, call in zip(turns, wanted, strict=True)]


def answers(turns, answer, log_metric):
    """Rewards an answer after a call that is like the right one; logs the share of right ones."""
    found = [texts[1] if len(texts) == 2 else "" for texts in turns]
    log_metric("solved", sum(map(str.__eq__, found, answer)) / len(answer))
    return list(map(likeness, found, answer))
