"""Write the list of prompts that ships: ``python -m recipes.prompts``."""

from __future__ import annotations

import typer

from recipes.prompts.making import write_prompts

if __name__ == "__main__":
    typer.echo(f"wrote {write_prompts()}")
