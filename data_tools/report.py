"""Where people are told something."""

from rich.console import Console

console = Console(highlight=False, soft_wrap=True)
