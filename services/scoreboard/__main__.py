"""``python -m services.scoreboard``: how the supervisor and the migration are started."""

from services.scoreboard.cli import main

main(prog_name="scoreboard")
