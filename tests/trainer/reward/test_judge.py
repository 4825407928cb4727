"""The judge against a table of a person's verdicts, and against answers that mean harm."""

import concurrent.futures
import os
import re
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from itertools import cycle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_fast.records import DataError
from prism_fast.reward import Reward, is_right, verifiable_reward
from prism_fast.reward.answer import Verdict, judge, symbolic, symbolic_server
from prism_fast.reward.answer.answers import read
from tests.trainer.reward.judged_pairs import RIGHT, WRONG


def respond(answer):
    return f"<caption>c</caption><think>t</think><answer>{answer}</answer>"


@pytest.fixture(scope="module", autouse=True)
def started():
    symbolic.start()  # so that no test pays for it


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_right(answer, gold):
    assert is_right(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_wrong(answer, gold):
    assert not is_right(answer, gold)


def test_the_table_is_large_and_consistent():
    assert len(set(RIGHT)) >= 150 and len(set(WRONG)) >= 100
    assert not set(RIGHT) & set(WRONG)


def test_readme_table_is_true_and_of_the_judged_pairs():
    text = Path(symbolic.__file__).with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\| `([^`|]+)` \| `([^`|]+)` \| (\w+) \|$", text, re.MULTILINE)
    assert len(rows) == sum(line.endswith((" right |", " wrong |")) for line in text.splitlines()) >= 40
    for answer, gold, verdict in rows:
        assert (answer, gold) in {"right": RIGHT, "wrong": WRONG}[verdict]
        assert is_right(answer, gold) == (verdict == "right")


# ---- the reward


def test_reward():
    assert verifiable_reward(respond(" 10 "), "10") == Reward(1.0, 1.0, True)
    assert verifiable_reward(respond("11"), "10") == Reward(0.2, 0.0, True)
    assert verifiable_reward("10", "10") == Reward(0.0, 0.0, False)
    assert verifiable_reward(respond("10") + respond("10"), "10") == Reward(0.0, 0.0, False)
    weighted = verifiable_reward(respond("10"), "10", accuracy_weight=0.5, format_weight=0.1)
    assert weighted == Reward(0.6, 1.0, True)


def test_equivalents_are_any_of():
    assert verifiable_reward(respond("car"), "automobile", equivalents=("car", "auto")).accuracy == 1.0
    assert verifiable_reward(respond("bus"), "automobile", equivalents=["car", "auto"]).accuracy == 0.0


def test_length_limit():
    for length, right in ((1023, 1.0), (1024, 0.0), (100_000, 0.0)):
        assert verifiable_reward(respond("x" * length), "x" * length).accuracy == right
    assert verifiable_reward(respond(""), "x").accuracy == 0.0


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((None, "1"), {}, "response: expected a string, got NoneType"),
        (("x", 1), {}, "gold: expected a string"),
        (("x", " "), {}, "gold: expected a string that is not empty"),
        (("x", "1"), {"equivalents": "12"}, "equivalents: expected a sequence of strings"),
        (("x", "1"), {"equivalents": None}, "equivalents: expected a sequence of strings"),
        (("x", "1"), {"equivalents": [1]}, "equivalents: expected a sequence of strings"),
    ],
)
def test_bad_arguments(arguments, keywords, message):
    with pytest.raises(ValueError, match=message):
        verifiable_reward(*arguments, **keywords)


# ---- properties

words = st.sampled_from(
    [*"0123456789", "12", "1,234", ".5", "\\frac", "{", "}", "(", ")", "^", "/", "+", "-", "±", "%"]
)
words |= st.sampled_from(
    ["kg", "B", ")", ":", "and", ",", ";", "x", "=", "\\text", "$", "sqrt", "√", "½", "pm", "five"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(words, min_size=1, max_size=12), st.sampled_from([answer for answer, _ in RIGHT]), st.booleans())
def test_any_text_is_judged_without_an_error(pieces, gold, spaced):
    text = (" " if spaced else "").join(pieces)
    read(text)
    assert is_right(text, text)
    if not any(map(str.isalpha, gold)):  # no expression that math-verify would be asked about
        assert is_right(text, gold) in (True, False)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers(a, b):
    assert is_right(f"{a:,}", str(b)) == (a == b)
    assert is_right(f"${a}$ kg", f"{a} kg")
    assert is_right(f"{a} kg", f"{b} kg") == (a == b)


@settings(max_examples=200, deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.integers(-99, 99), st.integers(1, 99), st.integers(1, 9))
def test_fractions(a, b, c, d, k):
    assert is_right(rf"\frac{{{a * k}}}{{{b * k}}}", f"{a}/{b}")
    assert is_right(f"{a}/{b}", rf"\frac{{{c}}}{{{d}}}") == (Fraction(a, b) == Fraction(c, d))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=2, max_size=6))
def test_lists_keep_their_order_and_sets_do_not(numbers):
    text = ", ".join(map(str, numbers))
    turned = ", ".join(map(str, reversed(numbers)))
    assert is_right(turned, text) == (numbers == numbers[::-1])
    assert is_right(f"{{{turned}}}", rf"\{{{text}\}}")


# ---- what may be thrown away, and what may not (the table in README.md)

plain_golds = st.sampled_from(["12", "-3.5", "5 cm", "3/4", "2 m/s", "x+1", "2r", "B", "(1, 2)", "{1, 2}", "θ", "cat"])


@settings(max_examples=150, deadline=None)
@given(
    plain_golds,
    st.sampled_from(["{}", r"\({}\)", "${}$", r"\boxed{{{}}}", "**{}**", "The answer is {}.", "  {} ", r"\,{}\;"]),
)
def test_dress_is_thrown_away(gold, dress):
    assert is_right(dress.format(gold), gold)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 999),
    st.sampled_from(["cm", "kg", "m/s", "J", "kN", "mL"]),
    st.sampled_from(
        [
            "{}~{}",
            r"{}\,\mathrm{{{}}}",
            r"{} \mathrm{{~{}}}",
            r"{}\ \text{{ {}}}",
            r"{}\thinspace {}",
            r"${}~\mathrm{{{}}}$",
            "{} {}",
            "{}{}",
        ]
    ),
)
def test_spaces_before_units_are_thrown_away(number, unit, spelling):
    assert is_right(spelling.format(number, unit), f"{number} {unit}")
    assert is_right(f"{number} {unit}", spelling.format(number, unit))
    assert not is_right(spelling.format(number + 1, unit), f"{number} {unit}")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["12", "-3", "5 cm", "3/4", "1990"]),
    st.sampled_from(["{} or 77", "77 or {}", "not {}", "{} is wrong", "less than {}", "{} (not 77)", "it isn't {}"]),
    st.sampled_from(["{}", "The answer is {}", "So, {}", "I get {}", "Total: {}", "The number is {}"]),
)
def test_negations_and_alternatives_are_kept(gold, shape, sentence):
    assert is_right(sentence.format(gold), gold)
    assert not is_right(sentence.format(shape.format(gold)), gold)
    assert not is_right(shape.format(gold), gold)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from("npqruvwxyz"), st.sampled_from(["{}", "2{}", "{}^2", "{}!", "a{}", "y = {}"]))
def test_the_case_of_symbols_is_kept(letter, shape):
    assert not is_right(shape.format(letter), shape.format(letter.upper()))
    assert is_right(shape.format(letter), shape.format(letter))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(-9, 9),
    st.integers(1, 9),
    st.sampled_from(["()", "[]", "(]", "[)"]),
    st.sampled_from(["()", "[]", "(]", "[)"]),
)
def test_ends_signs_and_order_are_kept(low, width, ours, theirs):
    def interval(ends, a=low, b=low + width):
        return f"{ends[0]}{a}, {b}{ends[1]}"

    signs = ["<" if end in "()" else "<=" for end in theirs]
    assert is_right(interval(ours), interval(theirs)) == (ours == theirs)
    assert is_right(interval(ours), f"{low} {signs[0]} x {signs[1]} {low + width}") == (ours == theirs)
    assert not is_right(interval(ours, low + width, low), interval(ours))
    if low or low + width:
        assert not is_right(interval(ours, -low, -low - width), interval(ours))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 4))
def test_repetition_in_sets_is_kept(numbers, again):
    more = [*numbers, numbers[again % len(numbers)]]
    assert not is_right("{" + ", ".join(map(str, more)) + "}", "{" + ", ".join(map(str, numbers)) + "}")


# ---- hostile answers

HOSTILE = [
    "9**9**9**9",
    "9^9^9^9",
    "10^10^10",
    r"10^{10^{10}}",
    "1e999999999",
    "9" * 1000,
    "1/" * 400 + "1",
    "(" * 1000,
    "(" * 500 + "1" + ")" * 500,
    "{" * 1000,
    "-" * 1000,
    "2^" * 400 + "2",
    r"\frac{" * 150,
    r"\frac{1}{" * 100 + "1" + "}" * 100,
    r"\sqrt{" * 140 + "2" + "}" * 140,
    "sqrt" * 250,
    "1," * 500,
    "1, " * 340,
    "±" * 1000,
    "A)" * 500,
    "A. " * 340,
    "x=" * 500,
    "and " * 250,
    "\ufdfa" * 1000,
    "½" * 1000,
    "\u202e" * 1000,
    "\0" * 1000,
    "five hundred " * 75,
    "1 h " * 250,
    "m^9" * 300,
    "$" * 1001,
    "\\" * 1000,
    " " * 500 + "x" + " " * 500,
    "x^{9^{9^{9^9}}}",
    "(x+1)^{100000}",
    "(999999999!)x",
    r"\sum_{i=1}^{1000000000} i^x",
    r"\int_0^1 \sin(x^x) dx",
    "(" * 100 + "x" + ")" * 100,
    "x!!!!!!!!!!",
    r"\begin{pmatrix}" + "1&" * 100 + r"1\end{pmatrix}^{999}",
    *(
        piece * (1020 // len(piece))
        for piece in ("1=", "1=2=", "(5)", "1-", "+5", "1'234", "5 x ", "-∞", "a=b=", "]1,2[")
    ),
    *(piece * (1020 // len(piece)) for piece in ("the ", "so ", "first ", "one out of ", "two and a half ", "M", "aB")),
    *(
        piece * (1020 // len(piece))
        for piece in (r"{1 \over 2}", r"\boxed{1}", r"\dot{1}", r"\SI{5}{m}", "{x|", "[[1]", "5 (5)")
    ),
    "0." + "12" * 480 + "...",
    "the " + "abcdefghijklmnopqrst " * 40 + "is 5",
    "total" + " a" * 480 + ": 5",
]


# The same in a form that passes the rules of our own, so that math-verify meets them, and in sizes.
TOWERS = ["x" + "^{9" * k + "}" * k for k in (2, 3, 4, 8, 24)] + ["x+" + "9^" * k + "9" for k in (2, 3, 9, 90)]
TOWERS += [r"x+\sqrt{" * k + "2" + "}" * k for k in (1, 3, 9, 20, 36)]
TOWERS += [r"x+\frac{1}{" * k + "x" + "}" * k for k in (2, 5, 10, 20, 25)] + [
    "x+" + "(" * k + "2" + ")" * k for k in (3, 40, 99)
]
TOWERS += (
    [f"x+{10**k}!" for k in (2, 3, 5, 9, 12)]
    + [f"{'9' * k}!x" for k in (2, 4, 6, 40)]
    + ["x" + "!" * k for k in (2, 5, 20)]
)
TOWERS += [f"(x+y+z)^{{{10**k}}}" for k in (1, 2, 3, 4, 9)] + [f"x^{{{10**k}}}-1" for k in (1, 3, 5, 9, 99)]
TOWERS += [
    rf"\sum_{{i=1}}^{{{10**k}}} {body}" for k in (1, 3, 6, 12) for body in ("i^x", r"\frac{1}{i}", r"\sin(i)", "i!")
]
TOWERS += [rf"\prod_{{i=1}}^{{{10**k}}} {body}" for k in (1, 3, 6, 12) for body in ("(x+i)", "i^i")]
TOWERS += [
    rf"\int_0^{{{k}}} {body} dx"
    for k in (1, 99)
    for body in (r"\sin(x^x)", r"e^{x^5}", r"\frac{1}{x^9+x+1}", r"\ln(\sin x)")
]
TOWERS += [rf"\lim_{{x\to {k}}} {body}" for k in ("0", r"\infty") for body in (r"(\sin x)^{x^x}", r"\frac{x!}{x^x}")]
TOWERS += [rf"\binom{{{10**k}}}{{{10**k // 2}}}x" for k in (2, 4, 6, 9)] + [
    rf"\log_{{2}} {'9' * k}x" for k in (3, 99, 250)
]
TOWERS += [r"\begin{pmatrix}" + r"\\ ".join(["&".join(["x"] * k)] * k) + r"\end{pmatrix}^{9}" for k in (2, 4, 8, 10)]
TOWERS += [r"\det\begin{pmatrix}" + r"\\ ".join(["&".join(["x"] * k)] * k) + r"\end{pmatrix}" for k in (2, 4, 8)]
TOWERS += ["+".join(f"x^{{{i}}}" for i in range(k)) for k in (9, 40)] + [
    "".join(f"(x-{i})" for i in range(k)) for k in (9, 40)
]
TOWERS += [r"\sin(" * k + "x" + ")" * k for k in (2, 6, 20, 40)] + ["|" * k + "x" + "|" * k for k in (1, 2, 9, 99)]
TOWERS += [f"x < {'9' * k}" for k in (9, 290)] + [r"\{" + ",".join(f"x+{i}" for i in range(k)) + r"\}" for k in (9, 60)]
TOWERS += [
    "x" * 10**5,
    "9" * 10**5,
    "(" * 10**5,
    r"\frac{" * 10**4,
    "é" * 10**5,
    "x\u0301" * 300,
    "\U0001d465+1" * 100,
    "²" * 900,
]
TOWERS += (
    [f"gcd({10**k}!, x)" for k in (2, 6)] + [f"{10**k} \\mod x" for k in (2, 99)] + ["i^" * 90 + "i", "e^" * 90 + "x"]
)
TOWERS += [f"{f}({'x^' * k}x)" for f in ("sin", "exp", "ln", "tan", r"\sec") for k in (1, 3, 9, 40)]
TOWERS += [f"({inner})^{{1/{k}}}" for inner in ("x^9+1", "9^{9999}x", "x!") for k in (2, 7, 999, 10**9)]
TOWERS += [f"x = {10**k}^{{{10**k}}}" for k in (2, 4, 6)]


def judged_within_the_limits(answer, gold):
    own, before = time.process_time(), set(symbolic._client.known)
    verdict = verifiable_reward(respond(answer), gold)
    asked = [reply for question, reply in symbolic._client.known.items() if question not in before]
    cpu = time.process_time() - own + sum(reply.seconds for reply in asked)
    assert not verdict.late and cpu < 1.2 and sum(reply.calls for reply in asked) <= symbolic.CALLS, (answer[:40], cpu)
    return verdict


@pytest.mark.slow
def test_hostile_answers_are_wrong_within_the_limits():
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # One gold each, in turn: neighbours in the lists differ by a number, so that every form meets all three.
    for answer, gold in zip(HOSTILE + TOWERS, cycle(["x+1", "5", r"\frac{1}{x}"])):
        assert judged_within_the_limits(answer, gold).accuracy == 0.0, (answer[:40], gold)
    assert is_right("y+1", "1+y")  # and the judge goes on
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB
    assert len(HOSTILE + TOWERS) >= 200


def test_the_symbolic_parts_of_one_answer_share_the_limits():
    pairs = [(f"(x+{k})^2", f"x^2+{2 * k}x+{k * k}") for k in range(2, 12)]
    together = (", ".join(answer for answer, _ in pairs), ", ".join(gold for _, gold in pairs))
    symbolic._client.known.clear()
    assert judge(*together) == Verdict(False, costly=True)
    known = symbolic._client.known.values()
    assert sum(reply.calls for reply in known) <= symbolic.CALLS and sum(reply.seconds for reply in known) < 1.2
    # What is remembered costs what it cost: a verdict does not depend on what was asked before.
    assert all(is_right(*pair) for pair in pairs)
    assert judge(*together) == Verdict(False, costly=True)


@pytest.mark.slow
def test_verdicts_are_the_same_beside_busy_processes():
    pairs = [("x+1", r"\frac{x^2-1}{x-1}"), ("y = 2x-1", "y = 2x+1"), (r"\int_0^1 \sin(x^x) dx", "x+1")]
    pairs += [("x!!!!!!!!!!", "x+1"), ("(x+1)^{100000}", "x+1"), ("x^{9^{9^{9^9}}}", "x+1"), ("sin(x)", r"\sin x")]

    def verdicts():
        symbolic._client.known.clear()
        return [judge(*pair) for pair in pairs], [reply[:2] for reply in symbolic._client.known.values()]

    quiet = verdicts()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        assert verdicts() == quiet
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_no_verdict_is_asked_for_twice_counted_and_not_remembered(monkeypatch):
    tries = []

    def never(*_):
        tries.append(1)
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(symbolic, "_converse", never)
        patch.setattr(symbolic._client, "_running", lambda: None)
        assert judge("l+1", "1+l") == Verdict(False, late=True)
        reward = verifiable_reward(respond("l+1"), "1+l")
        assert reward.late and reward.accuracy == 0.0 and len(tries) == 4
    assert is_right("l+1", "1+l")


def test_a_process_that_hangs_or_is_killed_gives_no_verdict(monkeypatch):
    symbolic.start()
    stopped = symbolic._client.process.pid
    monkeypatch.setattr(symbolic, "_read_line", lambda *_, read=symbolic._read_line: read(_[0], seconds.pop(0)))
    seconds = [0.2, 60.0, 60.0]  # for the reply, and then for the second try: a start, and its reply
    os.kill(stopped, signal.SIGSTOP)
    assert is_right("h+1", "1+h") and symbolic._client.process.pid != stopped


def test_a_start_that_fails_is_one_line(monkeypatch):
    monkeypatch.setattr(symbolic, "_client", symbolic._Client())
    for program in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(
            DataError, match=r"math-verify's process did not start: .*; try: .* -c 'import math_verify'"
        ):
            is_right("x+9", "9+x")


def test_nothing_is_opened_or_started_in_the_child(tmp_path):
    (tmp_path / "secret").write_text("x")

    def refused(action):
        with pytest.raises(PermissionError):
            action()

    refused(lambda: symbolic_server._refuse("open", (str(tmp_path / "secret"), "r", 0)))
    refused(lambda: symbolic_server._refuse("open", (os.__file__, "w", os.O_WRONLY)))
    for event in ("os.exec", "os.fork", "os.system", "subprocess.Popen", "socket.connect", "os.posix_spawn"):
        refused(lambda event=event: symbolic_server._refuse(event, ()))
    symbolic_server._refuse("open", (os.__file__, "r", os.O_CLOEXEC))  # a library that is imported late


def test_code_is_never_run(tmp_path):
    spoil = tmp_path / "spoil"
    for gold in ("5", "x+1", "Symbol('x')"):
        for code in (
            f"__import__('os').system('touch {spoil}')",
            f"open('{spoil}', 'w')",
            f"exec(\"open('{spoil}','w')\")",
        ):
            is_right(code, gold)
            symbolic.equal(gold, code, symbolic.Allowance())
            symbolic.equal(gold, rf"\text{{{code}}}", symbolic.Allowance())
    assert not spoil.exists()


# ---- the process of math-verify


def test_plain_answers_never_start_the_process(monkeypatch):
    def refuse(*_):
        raise AssertionError("math-verify was asked")

    monkeypatch.setattr(symbolic, "equal", refuse)
    answers = ["7", "12", "3+7", "x", "3;7", "-1", "", "1.5", "7 7", "the sum", "B", "((", "=", "7=", "+", "7 +"]
    answers += ["2, 3", "7^", "\\frac{", "7 kg", "x+7", "max(3, 7)"]
    for answer in answers:
        for gold in ("7", "12", "2, 3, 7, 9", "B", "yes", "cat", "1/2"):
            verifiable_reward(respond(answer), gold)


def test_thousands_of_judgements_are_cheap():
    """By the functions that are called, some 60 a judgement: every text is read once."""
    golds, calls = [str(number) for number in range(50)], []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event.endswith("call") else None)
    try:
        for number in range(4000):
            verifiable_reward(respond(str(number % 97)), golds[number % 50])
    finally:
        sys.setprofile(None)
    assert len(calls) < 4000 * 200


def test_called_from_threads():
    pairs = [(f"{k}+y+z", f"z+y+{k}", True) for k in range(12)] + [(f"{k}+y", f"y-{k + 1}", False) for k in range(12)]
    pairs += [(str(k), "3", k == 3) for k in range(12)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        verdicts = list(pool.map(lambda pair: is_right(pair[0], pair[1]), pairs))
    assert verdicts == [right for *_, right in pairs]


def test_survives_the_death_of_the_process():
    symbolic.start()
    os.kill(symbolic._client.process.pid, signal.SIGKILL)
    assert is_right("k+2+1", "1+2+k")


def test_a_forked_child_starts_its_own_process():
    symbolic.start()
    ours = symbolic._client.process.pid
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            right = is_right("f+5", "5+f") and symbolic._client.process.pid != ours
            symbolic._client.stop()
            os.write(writer, b"y" if right else b"n")
            status = 0
        finally:
            os._exit(status)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"y"
    os.close(reader)
    os.close(writer)
    assert symbolic._client.process.pid == ours and is_right("f+6", "6+f")


def test_the_process_ends_with_ours():
    code = """
from prism_fast.reward import is_right
from prism_fast.reward.answer import symbolic
assert symbolic._client.process is None
assert is_right("x+1", "1+x")
print(symbolic._client.process.pid, flush=True)
{end}
"""
    for end in ("", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"):
        run = subprocess.run([sys.executable, "-c", code.format(end=end)], capture_output=True, text=True, timeout=60)
        server = int(run.stdout)
        deadline = time.monotonic() + 60  # of a hang
        while _alive(server) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _alive(server)


def _alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_without_math_verify_it_says_so(monkeypatch):
    monkeypatch.setattr(symbolic, "_client", symbolic._Client())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert verifiable_reward(respond("5"), "5").accuracy == 1.0
    with pytest.raises(RuntimeError, match=r"pip install math-verify"):
        verifiable_reward(respond("x+9"), "9+x")
