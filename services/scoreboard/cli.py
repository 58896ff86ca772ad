import click


@click.group()
def main() -> None:
    """A live top 10."""
