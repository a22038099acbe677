"""What a script finds, printed as it comes and kept in a file with the day, the machine and the versions, if asked."""

from __future__ import annotations

import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

LIBRARIES = ("torch", "transformers")


class Results:
    """Lines in Markdown for people, in `folder`/DAY-NAME.md where a folder is given."""

    def __init__(self, name: str, folder: Path | None) -> None:
        today = date.today().isoformat()
        self._file = folder / f"{today}-{name}.md" if folder else None
        if self._file:
            self._file.write_text("")
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.say(f"# {name.capitalize()}, {today}\n\n`{command}`\n\n{machine()}")

    def say(self, text: str) -> None:
        """Print, and keep what is there even if what follows ends early."""
        print(text, flush=True)
        if self._file:
            with self._file.open("a") as file:
                file.write(text + "\n")


def machine() -> str:
    """Hardware and versions."""
    parts = [f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
             *(f"{name} {version(name)}" for name in LIBRARIES)]  # fmt: skip
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        parts = [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB", *parts, f"CUDA {torch.version.cuda}"]
    return ", ".join(parts)


def verdict(bar: str, reached: float, wanted: float) -> str:
    """Whether a bar of the GPU is met; elsewhere there is none."""
    if reached != reached:
        return f"- {bar}: **not measured**, {wanted:g} wanted"
    if not torch.cuda.is_available():
        return f"- {bar}: {reached:.2f} of {wanted:g}; **no verdict without a GPU**"
    return f"- {bar}: {reached:.2f} of {wanted:g}, **{'met' if reached >= wanted else 'missed'}**"
