"""Runs steps through the store, watched: tracked in MLflow and shown with an estimate."""

from __future__ import annotations

from sicog_exp.progress import Display
from sicog_exp.store import Artifact, Step, Store
from sicog_exp.tracking import Tracker


class Runner:
    """`run` is all the loop needs. `generation` names what the steps are for, `done` lists every step's artifact."""

    def __init__(self, store: Store, tracker: Tracker, display: Display) -> None:
        self.store, self.tracker, self.display = store, tracker, display
        self.generation = 0
        self.done: list[tuple[int, Artifact]] = []

    def run(self, step: Step) -> Artifact:
        """The step's artifact: read if it is finished, made, tracked and shown otherwise."""
        name = f"G{self.generation} {step.name}"
        self.display.start(name)
        artifact = self.store.find(step)
        if artifact:
            self.tracker.link_cached(step, self.generation, artifact)
        else:
            artifact = self._make(step)
        self.display.finish(name, artifact.cached)
        self.done.append((self.generation, artifact))
        return artifact

    def _make(self, step: Step) -> Artifact:
        run_id = self.tracker.start_step(step, self.generation)
        try:
            artifact = self.store.run(step, self.display.advance, run_id)
        except BaseException as error:
            self.tracker.fail_step(run_id, error)
            raise
        self.tracker.finish_step(run_id, artifact)
        return artifact
