"""Would a test notice if a sign of a loss were flipped? One sign at a time, in a copy of the package.

``pytest -m benchmark -s tests/agents/test_sign_flips.py``, with ``-k grpo`` for one file. A minus is dropped, + and −
change places, one in each copy; the tests that stand on the function must then fail. A flipped sign that they let pass
is a failure of this command, unless it stands in `EQUIVALENT` with the reason why no test could notice it.

No sign of a loss is what counts places: whatever stands in a subscript, −1 and its like, and what goes up or down by an
integer (axes, sizes, steps); formulas are written with floats here.
"""

import ast
import compileall
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Target(NamedTuple):
    """Functions, and the tests that must notice a flipped sign in them.

    Attributes:
        module: their file.
        functions: as they are called in it, ``Class.method`` for a method.
        file: of the tests.
        tests: few and cheap, since they are run once for every sign; parameters in brackets where some are enough.
    """

    module: str
    functions: tuple[str, ...]
    file: str
    tests: tuple[str, ...]


LOSSES = "tests/agents/test_losses.py"

TARGETS = (
    Target("agents/bc.py", ("bc_loss",), LOSSES, ("test_imitation_by_hand",)),
    Target("agents/reward_weighted_bc.py", ("weighted_bc_loss",), LOSSES, ("test_weighted_imitation_by_hand",)),
    Target("agents/asft.py", ("advantage_weights",), LOSSES, ("test_advantage_weights_by_hand",)),
    Target("agents/asft.py", ("ASFT._advantages",), LOSSES, ("test_advantages_by_hand",)),
    Target("agents/asft.py", ("ASFT.batch_loss",), LOSSES, ("test_the_batchs_mean_is_subtracted_by_hand",)),
    Target("agents/exp_rsft.py", ("exp_reward_weights",), "tests/agents/test_exp_rsft.py", ("test_weights_by_hand",)),
    Target(
        "agents/filtered_bc.py",
        ("top_events",),
        "tests/agents/test_filtered_bc.py",
        ("test_the_top_by_hand", "test_rounding_does_not_add_an_event"),
    ),
    Target(
        "agents/conditioned_bc.py",
        ("conditioned_states", "ConditionedPolicy.states"),
        "tests/agents/test_conditioned_bc.py",
        ("test_the_state_by_hand", "test_outliers_are_cut"),
    ),
    Target("agents/cql.py", ("cql_loss",), LOSSES, ("test_conservative_loss_by_hand",)),
    Target("agents/cql.py", ("QFunctionAgent._q",), LOSSES, ("test_conservative_q_learning_in_the_agent",)),
    Target(
        "agents/ips.py",
        ("importance_weights", "ips_loss"),
        "tests/agents/test_ips.py",
        ("test_weights_and_losses_by_hand", "test_gradient_of_the_weights"),
    ),
    Target(
        "agents/distributions.py", ("divergence",), "tests/agents/test_distributions.py", ("test_divergence_by_hand",)
    ),
    Target(
        "agents/ips.py",
        ("OffPolicyAgent.batch_loss", "IPS.losses"),
        "tests/agents/test_ips.py",
        ("test_the_loss_in_the_agent",),
    ),
    Target(
        "agents/doubly_robust.py",
        ("doubly_robust_loss",),
        "tests/agents/test_ips.py",
        ("test_doubly_robust_by_hand",),
    ),
    Target(
        "agents/fast_ppo.py",
        ("clipped_surrogate_loss", "normalised_advantages"),
        "tests/agents/test_fast_ppo.py",
        ("test_the_surrogate_by_hand", "test_advantages_by_hand", "test_advantages_that_hardly_differ_by_hand"),
    ),
    Target(
        "agents/fast_ppo.py",
        ("ActorCritic.loss", "FastPPO._played"),
        "tests/agents/test_fast_ppo.py",
        ("test_a_rollout_is_what_it_says", "test_its_gradient_is_stable_baselines3s[True-ours]"),
    ),
    Target("agents/ppo.py", ("_penalised", "penalised_reward"), LOSSES, ("test_penalised_reward_by_hand",)),
    Target(
        "agents/ppo.py",
        ("PPO.fit",),
        "tests/agents/test_fast_ppo.py",
        ("test_fitting_climbs_the_penalised_reward_as_far_as_stable_baselines3s",),
    ),
    Target(
        "agents/ppo.py",
        ("_Watch._on_step",),
        "tests/agents/test_ppo.py",
        ("test_rewards_in_the_buffer_are_the_models_less_the_log_ratio[0.7]",),
    ),
    Target(
        "agents/sb3.py",
        ("BackbonePolicy.evaluate_actions", "masked_log_probs"),
        "tests/agents/test_ppo.py",
        ("test_the_policy_is_the_backbone",),
    ),
    Target(
        "agents/reward_shaping.py",
        ("uncertainty_weighted", "bounded"),
        "tests/agents/test_reward_shaping.py",
        ("test_by_hand",),
    ),
    Target(
        "agents/grpo.py",
        ("group_advantages", "grpo_loss", "k3", "regularised_reward"),
        "tests/agents/test_grpo.py",
        (
            "test_advantages_by_hand",
            "test_the_least_deviation_by_hand",
            "test_the_clipped_loss_by_hand",
            "test_gradient_of_the_clipped_loss",
            "test_k3_by_hand",
            "test_the_regularised_reward_by_hand",
        ),
    ),
    Target(
        "agents/grpo.py",
        ("GRPO.batch_loss", "GRPO.objective"),
        "tests/agents/test_grpo.py",
        ("test_the_loss_in_the_agent", "test_its_step_is_reinforce_on_advantages", "test_the_objective_in_the_agent"),
    ),
    Target(
        "agents/off_policy_reinforce.py",
        ("pairwise_loss", "squares", "one_sided_loss"),
        "tests/agents/test_off_policy_reinforce.py",
        (
            "test_pairs_by_hand",
            "test_gradient_of_the_pairs",
            "test_regularisers_by_hand",
            "test_gradients_of_the_other_regularisers",
        ),
    ),
    Target(
        "agents/off_policy_reinforce.py",
        ("GroupREINFORCE._losses", "GroupREINFORCE.batch_loss"),
        "tests/agents/test_off_policy_reinforce.py",
        (
            "test_weights_shape_the_data",
            "test_imitation_finds_q_times_one_plus_the_advantage",
            "test_squares_find_where_their_pull_is_the_policys",
            "test_logits_become_log_probabilities_by_hand",
        ),
    ),
    Target(
        "agents/rsdpo.py",
        ("dpo_loss", "disjoint"),
        LOSSES,
        ("test_preference_loss_by_hand", "test_disjoint_by_hand"),
    ),
    Target(
        "agents/rsdpo.py",
        ("RejectionSampled.problem",),
        LOSSES,
        ("test_pairs_are_those_that_the_ensemble_is_sure_of",),
    ),
    Target("agents/rsipo.py", ("ipo_loss",), "tests/agents/test_rsipo.py", ("test_the_loss_by_hand",)),
    Target(
        "agents/iterative_dpo.py",
        ("_Rounds.objective", "_Rounds._next"),
        "tests/agents/test_iterative_dpo.py",
        ("test_the_objective_does_not_notice_a_new_round",),
    ),
    Target(
        "agents/online_ppo.py",
        ("OnlinePPO.fit", "HeldOut.earned"),
        "tests/agents/test_online_ppo.py",
        (
            "test_the_held_out_estimate_is_right[0.5]",
            "test_it_learns_from_training_users_and_is_kept_by_validation_users",
        ),
    ),
    Target(
        "agents/truth_supervised.py",
        ("satisfaction_loss",),
        "tests/agents/test_truth_supervised.py",
        ("test_the_loss_by_hand",),
    ),
    Target("agents/base.py", ("mean_loss",), LOSSES, ("test_the_mean_loss_counts_events_by_hand",)),
    Target(
        "recsim_gr/prefixes.py",
        ("prefix_mask", "chosen_log_probs", "prefix_log_probs"),
        "tests/test_prefixes.py",
        ("test_log_probabilities_are_those_by_all_logits", "test_the_imitation_loss_is_the_one_by_all_logits"),
    ),
)

OTHERS = {
    "agents/base.py": {
        "Agent.__init__": "a difference of sets of names",
        "BackboneAgent.fit": "a clock",
        "last_logits": "what may not be chosen: the contract of all agents",
    },
    "agents/baselines.py": {"_normalised": "of policies that learn nothing"},
    "agents/fast_ppo.py": {
        "LoggedContexts.draw": "which contexts come",
        "FastPPO.run": "a learning rate and a clock",
    },
    "agents/grpo.py": {
        "OldPolicy.draw": "a counter",
        "GRPO.fit": "a clock",
        "GRPO._groups": "a clock",
    },
    "agents/iterative_dpo.py": {
        "round_starts": "a difference of sets of steps",
        "_Rounds._evaluating": "a clock",
    },
    "agents/ppo.py": {"PPOConfig.rate": "a learning rate", "_Watch._on_rollout_end": "a clock"},
    "agents/rsdpo.py": {"drawn_pairs": "seeds"},
    "agents/sb3.py": {"BackboneQNetwork._predict": "what may not be chosen, by DQN, which is no agent of ours"},
}
"""Functions of the agents whose signs are in no loss, by file, and what they are in."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "agents/fast_ppo.py",
        "FastPPO._played",
        "logits - logits.amax(dim=1, keepdim=True)",
    ): "a level that keeps exp in range: draws are by shares",
}
"""(file, function, expression) whose sign no test could notice flipped, and why."""


# -- signs --------------------------------------------------------------------------------------------------------


class Sign(NamedTuple):
    """A sign that may be flipped.

    Attributes:
        line: where it stands.
        before, after: its expression.
        brief: the two in a few words.
    """

    line: int
    before: str
    after: str
    brief: str


class Signs(ast.NodeTransformer):
    """Finds all signs under a node, and flips one of them.

    Args:
        flip: which, in the order in which they are found; by default none.
    """

    def __init__(self, flip: int = -1) -> None:
        self.flip, self.found = flip, list[Sign]()

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        node.value = self.visit(node.value)
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if not isinstance(node.op, ast.USub) or counts(node.operand):
            return self.generic_visit(node)
        return self._flipped(node, node.operand, f"−({brief(node.operand)}) → no −")

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, ast.Add | ast.Sub) or counts(node.right):
            return self.generic_visit(node)
        flipped = ast.BinOp(node.left, other(node.op), node.right)
        return self._flipped(node, flipped, f"{brief(node.left, -1)} {change(node.op)} {brief(node.right)}")

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        if not isinstance(node.op, ast.Add | ast.Sub) or counts(node.value):
            return self.generic_visit(node)
        flipped = ast.AugAssign(node.target, other(node.op), node.value)
        return self._flipped(node, flipped, f"{brief(node.target)} {change(node.op)}= {brief(node.value)}")

    def _flipped(self, node: ast.expr | ast.stmt, flipped: ast.AST, words: str) -> ast.AST:
        self.found.append(Sign(node.lineno, ast.unparse(node), ast.unparse(flipped), words))
        return self.generic_visit(flipped if len(self.found) - 1 == self.flip else node)


def counts(node: ast.expr) -> bool:
    """Whether it is an integer as it is written: an axis, a size, a step."""
    return isinstance(node, ast.Constant) and isinstance(node.value, int)


def other(sign: ast.operator) -> ast.operator:
    """The other of + and −."""
    return ast.Sub() if isinstance(sign, ast.Add) else ast.Add()


def change(sign: ast.operator) -> str:
    """What happens to it."""
    return "[+ → −]" if isinstance(sign, ast.Add) else "[− → +]"


def brief(node: ast.expr, end: int = 1, width: int = 24) -> str:
    """The first, or the last, letters of an expression."""
    text = ast.unparse(node)
    if len(text) <= width:
        return text
    return text[:width] + "…" if end > 0 else "…" + text[-width:]


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """All functions of a module and methods of its classes by name."""
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}": part for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def signs_of(source: str) -> dict[str, list[Sign]]:
    """The signs of a module by function; functions that have some."""
    found = {}
    for name, node in functions(ast.parse(source)).items():
        finder = Signs()
        finder.visit(node)
        if finder.found:
            found[name] = finder.found
    return found


def flipped(source: str, function: str, number: int) -> str:
    """The module with one sign of a function flipped."""
    tree = ast.parse(source)
    Signs(number).visit(functions(tree)[function])
    return ast.unparse(ast.fix_missing_locations(tree))


# -- the copy -----------------------------------------------------------------------------------------------------


FORKS = """
import json, os, signal, sys
import hypothesis.strategies, pytest, scipy.stats, stable_baselines3, torch

for line in sys.stdin:
    child = os.fork()
    if not child:
        signal.alarm(1800)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=line", *json.loads(line)])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""A process that has imported what is not ours, and runs pytest in a fork of it every time: in a quarter of the time
that a new process would take, most of which is imports."""


class Copy:
    """A copy of the package with its tests, links and all, and a process in which it is what is imported. Compiled
    files are told from their source by its content, not by its time and size, which a flipped sign may leave as they
    are.

    Args:
        folder: where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("recsim_gr", "agents", "envs", "benchmarks", "tests"):
            without = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=without)
        shutil.copy(ROOT / "pyproject.toml", folder)
        compileall.compile_dir(folder, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKS],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: list[str]) -> tuple[int, str]:
        """pytest's exit code and what it printed; it stops at the first failure."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(tests) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, (self.folder / "output.txt").read_text(encoding="utf-8")

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()

    def caught_by(self, module: str, source: str, tests: list[str]) -> str:
        """The test that fails with another source of a module; nothing where all pass.

        Raises:
            RuntimeError: neither.
        """
        path = self.folder / module
        original = path.read_bytes()
        path.write_text(source, encoding="utf-8")
        try:
            code, output = self.run(tests)
        finally:
            path.write_bytes(original)
        failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", output, re.MULTILINE)
        if code == 0:
            return ""
        if code == 1 and failed:
            return failed[1]
        raise RuntimeError(f"pytest ends with {code} on another {module}:\n{output}")


def nodes_of(target: Target) -> list[str]:
    """As pytest takes them."""
    return [f"{target.file}::{name}" for name in target.tests]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """One for all, in which all tests pass as it is."""
    made = Copy(tmp_path_factory.mktemp("copy"))
    try:
        code, output = made.run([test for target in TARGETS for test in nodes_of(target)])
        assert code == 0, output
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def tally() -> Iterator[list[str]]:
    """What became of every flipped sign, told in the end."""
    said: list[str] = []
    yield said
    kinds = {kind: said.count(kind) for kind in ("caught", "equivalent", "survived")}
    print(f"\n{len(said)} signs flipped: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))


# -- the lists and the rules, which are held whenever tests are run -----------------------------------------------


def test_every_sign_of_the_agents_is_somebodys() -> None:
    """A new function with a sign must be given its tests in `TARGETS`, or its reason in `OTHERS`."""
    listed = {(target.module, name) for target in TARGETS for name in target.functions}
    others = {(module, name) for module, reasons in OTHERS.items() for name in reasons}
    found = {
        (f"agents/{path.name}", name)
        for path in (ROOT / "agents").glob("*.py")
        for name in signs_of(path.read_text(encoding="utf-8"))
    }
    assert not listed & others
    assert not found - listed - others
    assert not others - found
    assert not {(module, name) for module, name in listed if module.startswith("agents/")} - found


def test_listed_tests_and_equivalents_are_there() -> None:
    for target in TARGETS:
        names = functions(ast.parse((ROOT / target.file).read_text(encoding="utf-8")))
        assert {test.partition("[")[0] for test in target.tests} <= set(names), target
    for module, function, before in EQUIVALENT:
        signs = signs_of((ROOT / module).read_text(encoding="utf-8"))[function]
        assert before in [sign.before for sign in signs], (module, function, before)


def test_signs_are_found_and_flipped_one_at_a_time() -> None:
    source = "def f(a, b):\n    c = -a * (b - 1.0)\n    c += a.sum(-1)\n    return c + b"
    signs = signs_of(source)["f"]
    assert [sign.before for sign in signs] == ["-a", "b - 1.0", "c += a.sum(-1)", "c + b"]
    assert [sign.after for sign in signs] == ["a", "b + 1.0", "c -= a.sum(-1)", "c - b"]
    assert [sign.line for sign in signs] == [2, 2, 3, 4]
    whole = ast.unparse(ast.parse(source))
    for number, sign in enumerate(signs):
        assert flipped(source, "f", number) == whole.replace(sign.before, sign.after)


def test_what_counts_places_is_no_sign() -> None:
    source = """
def f(x, n, k):
    for i in range(n + 1):
        k += 1
    return x[:, -n, k - n].sum(dim=-1, keepdim=True).view(-1, x.shape[0] - 1).gather(-1, x[k + n])
class C:
    def g(self, x):
        return [-x[-1]]
"""
    assert [sign.before for signs in signs_of(source).values() for sign in signs] == ["-x[-1]"]
    assert list(signs_of(source)) == ["C.g"]


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.benchmark
def test_it_is_the_copy_that_is_tested(copy: Copy) -> None:
    with pytest.raises(RuntimeError, match="this is the copy"):
        copy.caught_by("agents/bc.py", "raise ImportError('this is the copy')", nodes_of(TARGETS[0]))


@pytest.mark.benchmark
def test_a_sign_that_nothing_tests_survives(copy: Copy) -> None:
    """Beside one that a test looks at."""
    source = (copy.folder / "agents/bc.py").read_text(encoding="utf-8") + "\n\ndef nobody(x):\n    return -x\n"
    assert copy.caught_by("agents/bc.py", flipped(source, "nobody", 0), nodes_of(TARGETS[0])) == ""
    assert copy.caught_by("agents/bc.py", flipped(source, "bc_loss", 0), nodes_of(TARGETS[0])) == TARGETS[0].tests[0]


@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("target", "function"),
    [(target, name) for target in TARGETS for name in target.functions],
    ids=[f"{Path(target.module).stem}.{name}" for target in TARGETS for name in target.functions],
)
def test_a_flipped_sign_is_noticed(target: Target, function: str, copy: Copy, tally: list[str]) -> None:
    source = (copy.folder / target.module).read_text(encoding="utf-8")
    wrong = []
    print(f"\n{target.module}: {function}")
    for number, sign in enumerate(signs_of(source)[function]):
        test = copy.caught_by(target.module, flipped(source, function, number), nodes_of(target))
        reason = EQUIVALENT.get((target.module, function, sign.before))
        tally.append("caught" if test else "equivalent" if reason else "survived")
        line = source.splitlines()[sign.line - 1].strip()
        print(f"  {tally[-1]:<10} {sign.line:>4}  {line}\n{'':19}{sign.brief}: {test or reason or 'NO TEST FAILS'}")
        if bool(test) == bool(reason):
            wrong.append(
                f"{sign.before} → {sign.after}: {'is caught, so it is not equivalent' if test else 'survives'}"
            )
    assert not wrong
