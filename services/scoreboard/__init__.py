"""The command `scoreboard`: runs the whole cluster on one machine and speaks to it."""
