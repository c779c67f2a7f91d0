"""`headsink bench ...`: run a measurement and write its JSON. A module for each command, or for those that share a folder."""

import typer

from headsink.cli.bench.domains import domains
from headsink.cli.bench.families import families
from headsink.cli.bench.memory import memory
from headsink.cli.bench.quality import quality
from headsink.cli.bench.serving import serving
from headsink.cli.bench.speed import speed
from headsink.cli.bench.suite import everything, rerun, results
from headsink.cli.command import add_command
from headsink.cli.serve import PASS_ON

bench = typer.Typer(
    help="Measure headsink on this machine, side by side with what one would use otherwise.", no_args_is_help=True
)
add_command(bench, domains)
add_command(bench, quality)
add_command(bench, speed)
add_command(bench, memory)
add_command(bench, families)
add_command(bench, serving, context_settings=PASS_ON)
add_command(bench, everything, name="all")
add_command(bench, rerun)
add_command(bench, results)
