"""docs/your_own_agent.md, done as it says."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recsim_gr.agents import AGENTS
from recsim_gr.agents.base import load_agent
from recsim_gr.cli import USER_ERROR, main

PAGE = (Path(__file__).parents[1] / "docs" / "your_own_agent.md").read_text(encoding="utf-8")
SHORTER = ["--noise-levels", "1", "--workers", "1", "--agents", "BC", "Oracle"]
"""What the test adds to the page's command, for time's sake."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory with the page's file in it."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_module.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    before = dict(AGENTS)
    yield tmp_path
    AGENTS.clear()
    AGENTS.update(before)
    sys.modules.pop("my_module", None)


def test_the_page_keeps_its_word(here: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (command,) = re.findall(r"```bash\nrecsim-gr (.*?)\n```", PAGE)
    assert main([*shlex.split(command), *SHORTER]) == 0
    rows = pq.read_table(here / "runs" / "mine" / "results.parquet").to_pylist()
    values = {row["agent"]: row["value"] for row in rows if row["metric"] == "value_top10"}
    assert set(values) == {"BC", "Oracle", "MyAgent"}
    identity = json.loads((here / "runs" / "mine" / "config.json").read_text())
    assert identity["agent_configs"]["MyAgent"]["slope"] == 2.0
    assert "MyAgent" in (here / "runs" / "mine" / "report.html").read_text(encoding="utf-8")


def test_processes_of_a_run_know_it_too(here: Path) -> None:
    command = ["run", "landscape", "--preset", "smoke", "--agents", "BC", "Oracle", "my_module:MyAgent", "--out", "two"]
    assert main([*command, "--workers", "2"]) == 0
    rows = pq.read_table(here / "two" / "results.parquet").to_pylist()
    assert {row["agent"] for row in rows if row["agent"]} == {"BC", "Oracle", "MyAgent"}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_module:Absent", "module 'my_module' has no class 'Absent' that is an Agent"),
        ("my_module:MyConfig", "module 'my_module' has no class 'MyConfig' that is an Agent"),
        ("my_modul:MyAgent", "module 'my_modul' cannot be imported (ModuleNotFoundError"),
        ("broken:MyAgent", "module 'broken' cannot be imported (ZeroDivisionError"),
        ("taken:Mine", "there is already an agent 'BC'"),
        ("Nobody", "no agent 'Nobody'"),
        (":", "cannot be imported"),
    ],
)
def test_mistakes_are_one_line(name: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    (here / "taken.py").write_text("from recsim_gr.agents import BC\n\n\nclass Mine(BC):\n    pass\n", encoding="utf-8")
    assert main(["run", "landscape", "--preset", "smoke", "--agent", name, "--out", "wrong"]) == USER_ERROR
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not (here / "wrong").exists()


def test_a_saved_agent_does_not_bring_its_module(here: Path) -> None:
    """Loading runs no code: a name with a module in it is not looked up."""
    AGENTS["BC"]().config  # noqa: B018  (registered)
    (here / "evil.py").write_text("raise SystemExit('ran')\n", encoding="utf-8")
    (here / "saved").mkdir()
    about = {"agent": "evil:Agent", "config": {}, "shape": {}}
    (here / "saved" / "agent.json").write_text(json.dumps(about), encoding="utf-8")
    sys.path.insert(0, str(here))
    with pytest.raises(Exception, match="no agent 'evil:Agent'"):
        load_agent(here / "saved")
