"""What a training shows while it runs: steps, tokens/s, loss, the last validation figure, time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REDRAWS = 2
"""A second, on a terminal: four took .6 % of the time."""

LINES = 10
"""A run, elsewhere."""


class TrainingProgress:
    """A bar on a terminal, a line every tenth of the run elsewhere; an observer of `recsim_gr.training.train`::

        with TrainingProgress(Console(), training.steps, "pretraining") as progress:
            pretrain(log, training=training, progress=progress)

    Args:
        console: where it is shown; a quiet one shows nothing.
        total_steps: of the whole run, those of a resumed one that are behind it included.
        what: what is trained.
    """

    def __init__(self, console: Console, total_steps: int, what: str) -> None:
        self.console, self.total, self.what = console, total_steps, what
        self._tokens, self._loss, self._checked = 0, float("nan"), ""
        self._began = self._drawn = time.perf_counter()
        self._first: int | None = None
        self._tenths = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=REDRAWS,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total_steps, figures="")

    def __enter__(self) -> Self:
        self._began = self._drawn = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_step(self, step: int, loss: float, tokens: int) -> None:
        """``step`` steps are done, the last one with that loss over that many events."""
        if self._first is None:  # a resumed run starts in the middle
            self._first = step - 1
            self._tenths = self._first * LINES // self.total
        self._tokens += tokens
        self._loss = loss
        if self.console.is_terminal:
            now = time.perf_counter()
            if now - self._drawn >= 1.0 / REDRAWS or step >= self.total:
                self._drawn = now
                self._bar.update(self._task, completed=step, figures=self.figures())
        elif step * LINES // self.total > self._tenths:
            self._tenths = step * LINES // self.total
            line = f"{self.what}: step {step:,} of {self.total:,}, {self.figures()}{self._left(step)}"
            self.console.print(line, markup=False, highlight=False)

    def on_check(self, step: int, objective: float) -> None:
        """The validation objective after ``step`` steps."""
        self._checked = f", validation {objective:.4g}"
        self._bar.update(self._task, completed=step, figures=self.figures())

    @property
    def tokens_per_second(self) -> float:
        """Since the run, or its resumption, began; checks included."""
        return self._tokens / max(time.perf_counter() - self._began, 1e-9)

    def figures(self) -> str:
        """Tokens/s, loss, and the last validation figure where there is one."""
        return f"{self.tokens_per_second:,.0f} tokens/s, loss {self._loss:.4g}{self._checked}"

    def _left(self, step: int) -> str:
        done, left = step - (self._first or 0), self.total - step
        if left <= 0:
            return ""
        seconds = round((time.perf_counter() - self._began) / done * left)
        return f", {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
