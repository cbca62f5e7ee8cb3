"""Rewards: signatures, None, weights, async, steps, and errors that name the cause."""

import asyncio
import inspect
import json
import math
import os
import signal
import threading

import numpy
import pytest
import torch

from grpo_fused.trainer.rewards import Rewards, math_process
from grpo_fused.trainer.rewards.builtin import (
    BUILTIN,
    PACKAGES,
    exact_match,
    math_verify,
    reasoning_gym,
)
from grpo_fused.trainer.run.errors import TrainingError

PROMPTS = ["1?2=", "3?4=", "5?6="]
COMPLETIONS = ["2", "3", "66"]
IDS = [[4, 1], [5, 1], [8, 8]]
COLUMNS = {"answer": ["2", "4", "6"]}


def score(functions, weights=None, completions=COMPLETIONS, columns=COLUMNS):
    return Rewards(functions, weights)(PROMPTS, completions, IDS, columns)


def length(completions, **kwargs):
    return [len(text) for text in completions]


def test_functions_get_what_their_signature_names():
    seen = {}

    def everything(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, ids=completion_ids)
        return [0.0] * 3

    def few(answer, completions):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    def stateful(completions, trainer_state, missing=None, **columns):
        return [trainer_state.global_step + (missing is None)] * len(completions)

    class State:
        global_step = 3

    rewards = Rewards([everything, few, stateful])
    rewards.trainer_state = State
    scores = rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS)
    assert seen == {"answer": COLUMNS["answer"], "trainer_state": State, "prompts": PROMPTS,
                    "completions": COMPLETIONS, "ids": IDS,
                    "log_metric": seen["log_metric"], "log_extra": seen["log_extra"]}  # fmt: skip
    assert scores.each["few"].tolist() == [1.0, 0.0, 0.0]
    assert scores.total.tolist() == [5.0, 4.0, 4.0]
    assert scores.total.dtype == torch.float32 and scores.steps is None


def test_weights_and_missing_scores():
    def some(completions, **kwargs):
        return [None, 2, None]

    def others(completions, **kwargs):
        return [1.0, True, None]

    scores = score([some, others], [0.5, 3.0])
    assert scores.total[:2].tolist() == [3.0, 4.0] and scores.total[2].isnan()
    assert scores.each["some"][1] == 2.0 and scores.each["some"][[0, 2]].isnan().all()
    assert scores.each["others"][:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", [torch.tensor, numpy.array, tuple, list])
def test_any_sequence_of_numbers(kind):
    assert score(lambda completions: kind([1.0, 2.0, 3.0])).total.tolist() == [1.0, 2.0, 3.0]
    assert score(lambda completions: list(kind([1, 2, 3]))).total.tolist() == [1.0, 2.0, 3.0]


def test_async_functions_run_at_the_same_time_even_inside_a_loop():
    both = []

    def waiting(me):
        async def function(completions, **kwargs):
            both.append(me)
            while len(both) < 2:  # alone it would never return
                await asyncio.sleep(0)
            return [float(me)] * len(completions)

        return function

    class Caller:
        async def __call__(self, completions, **kwargs):
            return [0.5] * len(completions)

    async def inside():
        return score([waiting(1), waiting(2), Caller(), length])

    scores = asyncio.run(asyncio.wait_for(inside(), 30))
    assert scores.total.tolist() == [4.5, 4.5, 5.5]
    assert list(scores.each) == ["function", "function_2", "Caller", "length"]


def test_all_rollouts_share_one_event_loop():
    """A client or a lock that a reward keeps belongs to the loop that it was first used in."""
    lock = asyncio.Lock()

    async def locked(completions):
        async with lock:
            await asyncio.sleep(0)
        return [1.0] * len(completions)

    rewards = Rewards([locked, locked])  # one waits for the other
    for _ in range(2):
        assert rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS).total.tolist() == [2.0] * 3


def test_rewards_may_log():
    def logs(completions, log_metric, log_extra):
        log_metric("share", 0.5)
        log_metric("share", 1.0)
        log_extra("read", [text * 2 for text in completions])
        return [1.0] * len(completions)

    scores = score([logs, length])
    assert scores.metrics == {"share": [0.5, 1.0]}
    assert scores.extra == {"read": ["22", "33", "6666"]}


def test_steps_and_numbers_together():
    def steps(completions, **kwargs):
        return [[(0, 1.0), (1, 0.5)], None, []]

    scores = score([steps], [2.0])
    assert scores.steps == [[(0, 2.0), (1, 1.0)], [], []]
    assert scores.total[0] == 3.0 and scores.total[1:].isnan().all()

    scores = score([steps, length], [2.0, 10.0])
    assert scores.steps == [[(0, 2.0), (1, 1.0), (1, 10.0)], [(1, 10.0)], [(1, 20.0)]]
    assert scores.total.tolist() == [13.0, 10.0, 20.0]


def function_of(result):
    def bad(completions, **kwargs):
        return result

    return bad


@pytest.mark.parametrize(
    "result, message",
    [
        ([1.0, 2.0], "reward bad must return one value per completion, 3, got 2"),
        (1.0, "one value per completion, 3, got 1.0"),
        (None, "one value per completion, 3, got None"),
        (torch.tensor(1.0), "one value per completion, 3, got 1.0"),
        ([1.0, math.nan, 2.0], "bad: value 1 must be finite, or None for no score, got nan"),
        ([1.0, 2.0, math.inf], "bad: value 2 must be finite, or None for no score, got inf"),
        (["1", 1, 1], "bad: value 0 must be a number or None, got '1'"),
        ([{}, 1, 1], "bad: value 0 must be a number or None, got {}"),
        ([[1], [], []], r"a step of completion 0 must be \(end_token, score\), got 1"),
        ([[(0, 1)], [(2, 1)], []], "end_token of completion 1 must be .* its 2 tokens, got 2"),
        ([[(-1, 1)], [], []], "end_token of completion 0 .* got -1"),
        ([[(0.0, 1)], [], []], "end_token of completion 0 .* got 0.0"),
        ([[(0, math.nan)], [], []], "step score 0 must be finite"),
        ([[(0, "x")], [], []], "step score 0 must be a number"),
    ],
)
def test_invalid_results_are_rejected_by_function_and_value(result, message):
    with pytest.raises(ValueError, match=message):
        score(function_of(result))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failing_reward_names_its_example(is_async):
    def check(completions):
        return [1 / (len(text) - 2) for text in completions]

    async def check_later(completions):
        return check(completions)

    check.pure = check_later.pure = True
    message = (
        r"reward check(_later)? failed at test_trainer_rewards.py:\d+ on example 2 of 3 "
        r"\(ZeroDivisionError: .*\); "
        "prompt: '5\\?6='; completion: '66'"
    )
    with pytest.raises(RuntimeError, match=message) as raised:
        score(check_later if is_async else check)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_reward_that_fails_on_a_batch_only_says_so():
    def batches(completions):
        if len(completions) > 1:
            raise KeyError("two")
        return [1.0]

    batches.pure = True
    with pytest.raises(RuntimeError, match=r"on 3 examples .* none alone \(KeyError: 'two'"):
        score(batches)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_failing_reward_is_not_called_again(is_async):
    """It may cost money, or count: only one that says it is pure is."""
    calls = []

    def paid(completions):
        calls.append(len(completions))
        raise TimeoutError("no answer")

    async def paid_later(completions):
        return paid(completions)

    message = (
        r"reward paid(_later)? failed at test_trainer_rewards.py:\d+ on a batch of 3 completions "
        r"\(TimeoutError: no answer\); its first prompt: .*pure = True"
    )
    with pytest.raises(RuntimeError, match=message):
        score(paid_later if is_async else paid)
    assert calls == [3]


class Parses:
    async def __call__(self, completions, parse=lambda text: json.loads(text)):
        return [parse("{") for _ in completions]


@pytest.mark.parametrize(
    "function",
    [
        lambda completions: [json.loads("{") for _ in completions],
        lambda completions: [torch.stack([]) for _ in completions],
        Parses(),
    ],
    ids=["of Python", "of a package", "async"],
)
def test_an_error_in_a_library_names_the_line_of_the_user(function):
    code = function.__code__ if inspect.isfunction(function) else type(function).__call__.__code__
    line = code.co_firstlineno
    with pytest.raises(TrainingError, match=rf"failed at test_trainer_rewards.py:{line} on a b"):
        score(function)


def test_a_missing_column_is_named():
    def needs(completions, solution):
        return [1.0] * 3

    def needs_it_too(completions, solution, **columns):
        return [1.0] * 3

    for function in (needs, needs_it_too):
        with pytest.raises(ValueError, match="needs.* requires solution, .*available are .*answer"):
            score(function)


@pytest.mark.parametrize(
    "functions, weights, message",
    [
        ([], None, "at least one function, got none"),
        ([3], None, "must be functions or their names, got 3"),
        ([length], [1.0, 2.0], r"one finite number per reward, 1, got \[1.0, 2.0\]"),
        ([length], [math.nan], "one finite number per reward, 1"),
        (
            ["exact_mach"],
            None,
            r"one of .*, got 'exact_mach' \(did you mean exact_match\?\)",
        ),
        (["nowhere.py:f"], None, "there is no file nowhere.py"),
        (["no.such.module:f"], None, "module no.such.module cannot be imported"),
        (["math:gdc"], None, r"math has no function gdc \(did you mean gcd\?\)"),
        (["exact_match", "json:zzz"], None, "json has no function zzz, only .*loads"),
        (["exact_match,math:gcd"], None, r"several are a list, \[exact_match, math:gcd\], got"),
        ("math:gcd exact_match", None, r"several are a list, \[math:gcd, exact_match\], got"),
        ([__file__], None, "test_trainer_rewards.py:function"),
    ],
)
def test_rewards_that_cannot_be_resolved(functions, weights, message):
    with pytest.raises(ValueError, match=message):
        Rewards(functions, weights)


def test_functions_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def good(completions, **kwargs):\n    return [7.0] * len(completions)\n")
    rewards = Rewards(
        [f"{path}:good", "grpo_fused.trainer.rewards.builtin:exact_match", "exact_match"]
    )
    assert list(rewards.functions) == ["good", "exact_match", "exact_match_2"]
    assert rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS).total.tolist() == [9.0, 7.0, 7.0]
    path.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"cannot be imported \(ZeroDivisionError at mine.py:1: "):
        Rewards(f"{path}:good")
    path.write_text("def good(:\n")
    with pytest.raises(ValueError, match=r"\(SyntaxError: invalid syntax \(mine.py, line 1\)\)"):
        Rewards(f"{path}:good")


def test_builtin_rewards():
    chat = [[{"role": "assistant", "content": text}] for text in (" 2 ", "3", "x")]
    assert exact_match(chat, [2, "4", "y"]) == [1.0, 0.0, 0.0]
    assert set(BUILTIN) == {"exact_match", "math_verify", "reasoning_gym"}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_builtin_names_the_package_that_it_needs(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = PACKAGES[name]
    with pytest.raises(ValueError, match=f"{name} needs {package}: pip install {package}"):
        Rewards(name)


def test_math_is_compared_by_value():
    pytest.importorskip("math_verify")
    texts = [r"So \boxed{\frac{1}{2}}.", "The answer is 42.", "41", "no idea", "7"]
    answers = ["0.5", "Tom has 40 + 2 = 42\n#### 42", "42", "3", "Nobody knows!"]
    assert math_verify(texts, answers) == [1.0, 1.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    "answer", [r"2\sqrt{3}", r"\frac{1}{3}", r"\sqrt{2}", "x^2+1", "(3,4)", "1,234", "12%", "-7"]
)
def test_math_reads_answers_whole(answer):
    pytest.importorskip("math_verify")
    texts = [rf"So \boxed{{{answer}}}.", "The answer is 2."]
    assert math_verify(texts, [answer] * 2) == [1.0, 0.0]


ENDLESS = ["9**9**9**9", r"$\int_0^1 x^{x^{x^x}} dx$", "$10000000!$"]


def test_math_in_any_thread():
    """Of several at a time, and in an event loop."""
    pytest.importorskip("math_verify")
    found = {}

    def work(name):
        found[name] = math_verify(["1/2", f"{name}"], ["0.5", "1"])

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [1.0, 0.0], 1: [1.0, 1.0], 2: [1.0, 0.0]}

    async def later(completions, answer):
        return math_verify(completions, answer)

    assert score([later, "math_verify"]).each["later"].tolist() == [1.0, 0.0, 0.0]


def test_no_answer_stops_a_run(monkeypatch):
    """Neither of a completion nor of a row, which is one that cannot be parsed."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(math_process, "LIMIT", 1.0)
    math_process.math_process(os.getpid()).close()
    with pytest.warns(UserWarning, match="math_verify: an answer took longer than 1 s"):
        assert math_verify([*ENDLESS[:2], "2"], ["2"] * 3) == [0.0, 0.0, 1.0]
    assert math_verify(["2", "2"], ["2", ""]) == [1.0, None]
    process = math_process.math_process(os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM):  # which reach a whole group or job
        os.kill(process._child.pid, number)
    assert process.ask("2", "2.0")
    os.kill(process._child.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="math_verify: an answer ended its process"):
        assert not process.ask("2", "2.0")
    assert process.ask("2", "2.0")
    process.close()


def test_math_without_its_package_says_so(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('no sympy')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"math-verify cannot be imported \(ImportError: no sym"):
        math_process.MathProcess().ask("2")


def test_columns_of_the_data_do_not_replace_completions():
    """A data set of answers by another model, say."""
    columns = {"completions": ["a"] * 3, "completion_ids": ["b"] * 3, "trainer_state": ["c"] * 3}
    seen = {}

    def reward(**given):
        seen.update(given)
        return [0.0] * 3

    Rewards(reward)(PROMPTS, COMPLETIONS, IDS, COLUMNS | columns)
    assert seen["completions"] == COMPLETIONS and seen["completion_ids"] == IDS
    assert seen["trainer_state"] is None


def test_names_of_rewards_are_unique():
    def f(completions):
        return [1.0] * len(completions)

    def f_2(completions):
        return [2.0] * len(completions)

    for functions in ([f_2, f, f], [f, f, f_2]):
        rewards = Rewards(functions)
        assert len(rewards.functions) == 3
        assert rewards(PROMPTS, COMPLETIONS, IDS, COLUMNS).total.sum() == 3 * 4


def test_numbers_where_other_ranks_have_steps():
    scores = Rewards([lambda completions: [0.5, None, 2.0], exact_match], [2.0, 1.0])(
        PROMPTS, COMPLETIONS, [[1, 2], [3], []], COLUMNS | {"answer": ["x"] * 3}
    )
    assert scores.steps is None
    steps = scores.as_steps([[1, 2], [3], []])
    assert steps == [[(1, 1.0), (1, 0.0)], [(0, 0.0)], []]


def test_a_task_scores_its_own_rows():
    pytest.importorskip("reasoning_gym")
    from grpo_fused.trainer.run.data import load_rows

    rows = load_rows("reasoning_gym:basic_arithmetic", task_size=2)
    entries = [row["entry"] for row in rows]
    assert reasoning_gym([rows[0]["answer"], "nothing"], entries) == [1.0, 0.0]
